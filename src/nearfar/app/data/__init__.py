"""Read what DATA names: vectors, images and texts, with identities or as labelled pairs."""
