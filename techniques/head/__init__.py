"""Techniques for the `model.head` slot."""
