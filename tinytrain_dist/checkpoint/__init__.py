"""Save, verify, find and load checkpoints.

Reading order:

* What is on disk: `manifest` (the format), `file_digests`, `safetensors_io` (one file of tensors), `verify`.
* What is saved, and how all ranks write and read it: `state_collection`, `sharded_io`, `async_save`.
* The checkpoints of one run: `resume_rules`, `retention`, `checkpoint_folder`, `manager`.
* Copies of them elsewhere: `copies/`.
* For users of the library and for commands: `own_training_loop`, `discovery`, `load_model`, `huggingface_import`,
  `huggingface_files`, `state_digests`.
"""
