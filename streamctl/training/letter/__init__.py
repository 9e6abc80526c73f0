"""The paper's letter: thoughts are tokens of the vocabulary (`pretrain.thoughts=vocabulary`)."""
