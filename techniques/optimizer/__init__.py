"""Techniques for the `optimizer` slot."""
