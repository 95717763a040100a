"""Techniques for the `norm` slot."""
