"""The only place that loops over tiles: it streams a loss over every pair of the batch."""
