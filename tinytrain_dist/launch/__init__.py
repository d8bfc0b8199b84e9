"""Start processes: on one machine, on each of several nodes, and through Slurm; and the program of one rank.

Read in this order:

- `start.py`: what `tinytrain train` starts, and how nodes find each other
- `rank_program.py`: what every rank runs
- `elastic_agent.py`: what starts and watches the ranks of one node
- `slurm_submit.py`: what submits a run to the queue of a cluster
"""
