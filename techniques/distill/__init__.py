"""Techniques for the `distill` slot."""
