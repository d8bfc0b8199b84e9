"""The update of the weights: AdamW, gradient clipping, and the learning-rate schedule."""
