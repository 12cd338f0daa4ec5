"""Galleries: embeddings of known identities, among which the nearest to a query are searched."""
