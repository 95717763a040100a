"""Techniques for the `data` slots: transforms of the training set, samplers and batches."""
