"""Orthogonalize a matrix with the Newton-Schulz iteration: only products of matrices, no decomposition.

Must not know ranks or optimizers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinytrain_dist.model.matmul import runs_on_cuda

# The largest slope at zero, so that few steps suffice. Singular values end between 0.7 and 1.2, not exactly at 1.
# Source: Jordan et al. 2024, Muon (kellerjordan.github.io/posts/muon)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7  # the smallest norm to divide by: a matrix of zeros stays zero


def newton_schulz_dtype(param: Tensor) -> torch.dtype:
    """Return the type in which matrices of this parameter's device are orthogonalized: bf16 on a GPU, else float32.

    The iteration is meant to be inexact, so bf16 is enough, and the fastest on a GPU. CPUs without bf16 instructions
    emulate it.
    """
    return torch.bfloat16 if runs_on_cuda(param) else torch.float32


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """Return about U V^T of the matrix U S V^T, of the same shape and type: all its singular values become about 1."""
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix  # so that the square products are as small as possible
    x = x / x.norm().clamp(min=EPS)  # the largest singular value is then at most 1
    for _ in range(steps):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if is_tall else x
