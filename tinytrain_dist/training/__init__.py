"""Build a run (`build.py`) and train it (`trainer.py`).

A `Trainer` is composed of a train step, an evaluator, a saver, metrics and a log. Read `trainer.py` first, then
`train_step.py`.
"""
