"""Techniques for the `ffn` slot."""
