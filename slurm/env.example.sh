# shellcheck shell=bash
# Settings that a site needs beyond Slurm's own variables. Copy it to slurm/env.sh and keep the lines that your site needs: every
# job reads that file before anything else, and launch/submit.py copies it with the code.

# Modules: a batch shell starts without what your login shell has loaded.
# module load cuda/12.8

# The Python of the run, where it is not .venv of the checkout (a shared environment, conda).
# export PYTHON=/path/to/env/bin/python

# NCCL takes the first interface that looks right. Where that is a slow management network, name the fast one; ^ excludes.
# export NCCL_SOCKET_IFNAME=ib0          # or: ^lo,docker0
# export NCCL_IB_HCA=mlx5_0,mlx5_1       # the InfiniBand adapters, where some belong to storage
# gloo (checkpoints, decisions) uses the interface on the way to the other nodes; only where that is wrong:
# export GLOO_SOCKET_IFNAME=ib0

# AWS with EFA: without it NCCL falls back to TCP.
# export FI_PROVIDER=efa

# One line per communicator: which network NCCL has chosen. Look at it first when several nodes are slow.
# export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET

# How often the job may requeue itself (20): a month in jobs of one day needs more.
# export MAX_REQUEUES=40

# How often torchrun restarts the processes in place after one has died (3; 0: only requeues restart the run).
# export MAX_RESTARTS=0

# Everything inside a container: apptainer, or pyxis. The checkout and the working folder are mounted; name the others.
# export CONTAINER=/path/to/image.sif
# export CONTAINER_IMAGE=nvcr.io#nvidia/pytorch:25.09-py3
# export CONTAINER_MOUNTS=/data,/scratch
# export CONTAINER_PYTHON=python3

# Without GPUs: processes on each node.
# export PROCESSES_PER_NODE=4
true # sourcing this file as it is must not fail
