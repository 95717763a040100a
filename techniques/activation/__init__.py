"""Techniques for the `activation` slot."""
