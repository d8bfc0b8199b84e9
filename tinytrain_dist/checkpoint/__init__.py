"""Checkpoints: complete and verified, or absent.

- `state.py`: what of a model and optimizer is saved
- `sharded_io.py`: how all ranks write and read one checkpoint
- `safetensors_io.py`, `manifest.py`, `hashing.py`, `verify.py`: folders of tensors on disk
- `manager.py`, `async_save.py`: the checkpoints of one run
- `save_load.py`: checkpoints of own loops
"""
