"""The update of the weights. Reading order: adamw (the optimizer), clipping (of gradients), lr_schedule."""
