# shellcheck shell=bash
# Settings of your site. Copy this file to slurm/env.sh and keep the lines that your site needs. Every job reads slurm/env.sh
# first, and tinytrain submit copies it with the code.

# Modules: a batch shell does not have the modules that your login shell has loaded.
# module load cuda/12.8

# The Python of the run, if it is not .venv of the checkout (a shared environment, conda).
# export PYTHON=/path/to/env/bin/python

# NCCL uses the first interface that looks suitable. If that is a slow management network, name the fast one; ^ excludes.
# export NCCL_SOCKET_IFNAME=ib0          # or: ^lo,docker0
# export NCCL_IB_HCA=mlx5_0,mlx5_1       # the InfiniBand adapters to use, if others belong to storage
# gloo (checkpoints, control messages) uses the interface that leads to the other nodes. Set this only if that is wrong:
# export GLOO_SOCKET_IFNAME=ib0

# AWS with EFA: without it NCCL falls back to TCP.
# export FI_PROVIDER=efa

# Make NCCL log which network it uses, one line per communicator. Look at this first if several nodes are slow.
# export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET

# How often the job may requeue itself (20). A month in jobs of one day needs more.
# export MAX_REQUEUES=40

# How often torchrun restarts the processes after one has died (3; 0: never, so that only requeues restart the run).
# export MAX_RESTARTS=0

# Run everything in a container: apptainer, or pyxis. The checkout and the working folder are mounted; name other folders.
# export CONTAINER=/path/to/image.sif
# export CONTAINER_IMAGE=nvcr.io#nvidia/pytorch:25.09-py3
# export CONTAINER_MOUNTS=/data,/scratch
# export CONTAINER_PYTHON=python3

# Number of processes on each node, without GPUs.
# export PROCESSES_PER_NODE=4
true # sourcing this file as it is must not fail
