"""One file per metric: predictions and references -> Score."""
