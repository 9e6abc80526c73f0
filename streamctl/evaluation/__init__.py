"""The table of methods and controls, its intervals and plots, refit, update and reproduce."""
