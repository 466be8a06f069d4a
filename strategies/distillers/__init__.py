"""Distillers: drafts -> lessons."""
