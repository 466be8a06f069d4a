"""Filters: drafts -> screened drafts."""
