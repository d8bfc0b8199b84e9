"""Say what an update costs: the floating-point operations of Newton-Schulz, and the memory traffic of each optimizer.

Must not know torch: `tinytrain plan` uses these numbers for GPUs that this machine does not have.
"""

from __future__ import annotations

# Bytes read and written for each weight, all float32. AdamW is one kernel. Muon has several: for the momentum 44, to
# apply the result 38. What only the owner of a matrix does is not included.
UPDATE_BYTES = {"adamw": 28, "muon": 82}


def newton_schulz_flops(rows: int, columns: int, steps: int) -> float:
    """Return the operations to orthogonalize a matrix: in each step, two products with it and a square of k x k."""
    k, n = sorted((rows, columns))
    return steps * (4.0 * k * k * n + 2.0 * k**3)


def newton_schulz_bytes(rows: int, columns: int, bytes_per_value: int) -> int:
    """Return the memory that orthogonalizing takes: the matrix twice, and two squares of k x k."""
    k = min(rows, columns)
    return 2 * bytes_per_value * (rows * columns + k * k)
