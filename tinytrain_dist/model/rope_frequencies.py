"""Scale the frequencies of a rotary embedding for contexts longer than those that a model was trained with.

Must not know configurations. Each function computes in the order of Hugging Face's, because at position 100,000 a
difference in the last bit of a frequency moves an angle by 0.01 radians.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def llama3_frequencies(
    frequencies: Tensor, factor: float, original_context_len: int, low_freq_factor: float, high_freq_factor: float
) -> Tensor:
    """Divide low frequencies by the factor, keep high ones, and interpolate between them.

    frequencies: [e / 2] in radians per position, from high to low; returns the same shape. A frequency is low if it has
    fewer than low_freq_factor full rotations within the original context, and high with more than high_freq_factor.
    """
    rotations = original_context_len * frequencies / (2 * math.pi)
    blend = (rotations - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blend = blend.clamp(0.0, 1.0)  # 0 for low frequencies and 1 for high ones
    return (1 - blend) * frequencies / factor + blend * frequencies


def yarn_frequencies(
    powers: Tensor, theta: float, factor: float, original_context_len: int, beta_fast: float, beta_slow: float
) -> Tensor:
    """Divide frequencies with fewer than beta_slow rotations by the factor, and keep those with more than beta_fast.

    Between the two, the blend is linear in the index of the pair, whose ends are rounded outwards to whole indices.
    powers: [e / 2], the inverse frequencies theta**(2i / e); returns frequencies of the same shape. Rotations are full
    ones within the original context. Source: Peng et al. 2023 (arXiv 2309.00071).
    """
    pairs = powers.shape[0]

    def index_of(rotations: float) -> float:
        """Return the index, not rounded, of the pair that has so many rotations within the original context."""
        return 2 * pairs * math.log(original_context_len / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(index_of(beta_fast)), 0)
    last: float = min(math.ceil(index_of(beta_slow)), 2 * pairs - 1)
    if first == last:
        last += 0.001  # as Hugging Face does: one step instead of a ramp
    indices = torch.arange(pairs, dtype=torch.float32, device=powers.device)
    kept = 1 - ((indices - first) / (last - first)).clamp(0, 1)
    return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept
