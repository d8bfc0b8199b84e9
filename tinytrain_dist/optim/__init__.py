"""The update of the weights: adamw, clipping (gradient norm) and lr_schedule, in this reading order."""
