"""What is learned from runs: curves, comparisons, statistics."""
