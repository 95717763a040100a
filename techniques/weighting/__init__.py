"""Techniques for the `weighting` slot."""
