"""The embedded corpus: an invented field of knowledge, its public handbook, four houses' letters and an exam."""
