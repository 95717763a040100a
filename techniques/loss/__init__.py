"""Techniques for the `loss` slot."""
