"""Start processes: a torchrun wrapper, the program of one rank, and a command that submits runs to Slurm.

Read in this order:

- `rank_program.py`: what every rank runs
- `elastic_agent.py`: what starts and watches the ranks of one node
- `slurm_submit.py`: what submits a run to the queue of a cluster
"""
