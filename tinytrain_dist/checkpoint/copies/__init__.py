"""Copy committed checkpoints to another disk or an object store while training continues.

Reading order: `remote_folder`, the files at a URL, `streamed_digest`, then `copy_layout`, what a copy is and which ones
stay. `worker` is the program that copies, in a process of its own. `worker_process` talks to it, `copier` decides what
it copies, and `start` begins it, and downloads a copy for a run without checkpoints.
"""
