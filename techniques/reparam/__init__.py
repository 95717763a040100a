"""Techniques for the `reparam` slot."""
