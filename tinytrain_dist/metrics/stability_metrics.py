"""Combine what all ranks measured inside the model into the numbers of a run, the same in every layout.

A rank measures the maximum of the embedding's norms, and for each of its micro-batches and each block a sum of squares
and a maximum (training/stability_probe.py). Sums are exact before they are rounded once, so that their order does not
matter. Must not know tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

HEAD_NUMBERS = 2  # of a rank before those of its micro-batches: largest norm of an embedding, elements in an activation


def stability_groups(
    rows: Sequence[Sequence[float]], grad_norms: dict[str, float], layer_sizes: dict[str, int]
) -> dict[str, dict[str, float]]:
    """Return the groups of numbers of a step.

    rows: for each rank HEAD_NUMBERS, then for each micro-batch and block the sum of squares of its output and its
    largest attention score. grad_norms, layer_sizes: by layer, which are the blocks and other modules.
    """
    blocks = [layer for layer in layer_sizes if layer.startswith("layers.")]
    numbers = [row[HEAD_NUMBERS:] for row in rows]
    elements = rows[0][1] * sum(len(row) for row in numbers) / (2 * len(blocks))
    squares = {block: [row[2 * i :: 2 * len(blocks)] for row in numbers] for i, block in enumerate(blocks)}
    scores = {block: [row[2 * i + 1 :: 2 * len(blocks)] for row in numbers] for i, block in enumerate(blocks)}
    largest_scores = {block: _largest(_flat(values)) for block, values in scores.items()}
    return {
        "grad_rms_by_layer": {layer: norm / math.sqrt(layer_sizes[layer]) for layer, norm in grad_norms.items()},
        "activation_rms_by_layer": {block: _root_mean(_flat(parts), elements) for block, parts in squares.items()},
        "attention_logit_max_by_layer": largest_scores,
        "stability": {
            "embedding_norm_max": _largest([row[0] for row in rows]),
            "attention_logit_max": _largest(largest_scores.values()),
        },
    }


def _flat(parts: Sequence[Sequence[float]]) -> list[float]:
    return [value for part in parts for value in part]


def _largest(values: Iterable[float]) -> float:
    """Return the largest value, or NaN if one is NaN."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else max(values)


def _root_mean(squares: Sequence[float], count: float) -> float:
    finite = all(map(math.isfinite, squares))  # math.fsum refuses others
    return math.sqrt(math.fsum(squares) / count) if finite else math.nan
