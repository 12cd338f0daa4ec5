"""Cached gradients: batches whose activations do not fit in memory, encoded in chunks, twice."""
