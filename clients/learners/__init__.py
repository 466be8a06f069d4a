"""Learners: private rows -> a release and its receipt."""
