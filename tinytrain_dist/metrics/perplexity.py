"""Compute the perplexity of a loss. Must not import torch."""

from __future__ import annotations

import math

LARGEST_LOSS = 700.0  # exp(710) overflows


def perplexity_of(loss: float) -> float:
    """Return exp(loss), or a huge number where that would overflow. NaN for NaN."""
    return math.exp(LARGEST_LOSS if loss > LARGEST_LOSS else loss)
