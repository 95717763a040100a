"""Techniques for the `init` slot."""
