"""The parts of benchmarks/chaos.py --nodes. Reading order: network, node, run_history, events, report."""
