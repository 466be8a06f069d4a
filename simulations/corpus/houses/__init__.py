"""The four houses that people write to: one file per house, words only, no logic."""
