"""Tasks: a dataset, its plain loss and its metrics."""
