"""A run: built in order (`build.py`), then trained (`trainer.py`).

A `Trainer` is composed of a train step, an evaluator, a saver, metrics and a log. Read `trainer.py` first, then
`train_step.py`.
"""
