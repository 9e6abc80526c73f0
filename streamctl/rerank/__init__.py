"""A second look at candidates, for any method: features, a learned ranker, and its fit."""
