"""One file per accountant: receipts and delta -> epsilon."""
