"""Synthesizers: an adapter -> drafts."""
