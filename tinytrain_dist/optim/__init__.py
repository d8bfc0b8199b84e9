"""The update of the weights.

Reading order: build (the optimizer of a run), base, run_optimizer, step_settings, adamw, clipping (of gradients),
lr_schedule, weight_average.
"""
