"""From labelled items or pairs to a run folder: read, split, train, fit a threshold, write."""
