"""Spread a finished model over ranks, sum its gradients, and check that replicas stay equal.

Read `parallelize.py` first: it states the order activation checkpointing, compile, DDP / FSDP2 / HSDP.
"""
