"""Techniques for the `gradient` slot."""
