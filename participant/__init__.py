"""The participant daemon of one site. Torch is imported in training, dp_sgd, data and evaluation only."""
