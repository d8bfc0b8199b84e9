"""Start processes: the torchrun wrapper, the program of one rank, and the submission to Slurm.

Read in this order:

- `worker.py`: what every rank runs
- `elastic_agent.py`: what starts and watches the ranks of one node
- `slurm_submit.py`: what puts a run into the queue of a cluster
"""
