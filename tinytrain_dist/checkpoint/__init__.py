"""Save, verify, find and load checkpoints.

Reading order:

* What is on disk: `manifest` (the format), `hashing`, `safetensors_io` (one file of tensors), `verify`.
* What is saved, and how all ranks write and read it: `state`, `sharded_io`, `async_save`.
* The checkpoints of one run: `compatibility`, `retention`, `checkpoint_folder`, `manager`.
* For users of the library and for commands: `save_load`, `discovery`, `load_model`, `hf_import`, `digests`.
"""
