"""Re-ranking for any method: features of candidates, a learned ranker, and how it is fitted."""
