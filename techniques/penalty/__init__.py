"""Techniques for the `penalty` slot."""
