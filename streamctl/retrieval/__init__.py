"""What other users took, and what is alike: the evidence that a thought weighs."""
