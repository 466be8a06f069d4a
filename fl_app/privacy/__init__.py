"""Budget, accounting and noise: what a release costs and who enforces it."""
