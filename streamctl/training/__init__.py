"""The stages pretrain, annotate, sft and rl, and the training loop that they share."""
