"""Research and teaching on one machine: the only place that sees both sides."""
