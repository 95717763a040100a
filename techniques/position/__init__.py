"""Techniques for the `position` slot."""
