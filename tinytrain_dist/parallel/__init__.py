"""Distribute a finished model over ranks, sum its gradients, and check that replicas stay equal.

Read `parallelize.py` first. It applies, in this order, activation checkpointing, torch.compile, and DDP or FSDP2.
"""
