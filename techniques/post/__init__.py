"""Techniques for the `post` slot."""
