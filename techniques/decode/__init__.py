"""Techniques for the `decode` slot."""
