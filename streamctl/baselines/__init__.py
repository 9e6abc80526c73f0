"""Methods to compare with, a file each, all with the Recommender interface."""
