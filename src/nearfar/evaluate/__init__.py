"""What a verifier is worth: pairs, their distances, and the figures made from them."""
