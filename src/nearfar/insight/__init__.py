"""What a loss does to the rows it is given: explanations and forces."""
