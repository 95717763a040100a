"""Techniques for the `attention` slot."""
