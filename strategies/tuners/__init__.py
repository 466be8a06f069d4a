"""Tuners: lessons -> target adapter."""
