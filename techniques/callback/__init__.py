"""Techniques for the `callback` slot."""
