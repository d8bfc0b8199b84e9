"""The update of the weights.

Reading order: build (the optimizer of a run), base (what an optimizer is), adamw, run_optimizer, step_settings,
clipping (of gradients), lr_schedule.
"""
