"""The stages of benchmarks/gpu.py. Reading order: plan (which there are), context, kernels, training, report."""
