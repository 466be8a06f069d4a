"""Aggregators: uploads -> one adapter."""
