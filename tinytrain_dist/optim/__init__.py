"""The update of the weights.

Reading order: build (the optimizer of a run), adamw, clipping (of gradients), lr_schedule.
"""
