"""Score a text with a model: the loss of every token once, in windows with a stated stride.

Must not know where the model or the tokens come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytrain_dist.metrics.perplexity import perplexity_of

LOGITS_AT_ONCE = 2**26  # values; 256 MiB in float32


@dataclass(frozen=True)
class Window:
    """A window of a token sequence: the model reads tokens begin .. end - 1, and each predicts the next one."""

    begin: int
    end: int
    scored: int  # number of its last predictions that count; those before it are context, scored by earlier windows


@dataclass(frozen=True)
class Score:
    """The loss of a model on a text."""

    loss: float  # nats per token
    standard_error: float  # of `loss`, over windows; NaN with fewer than two
    tokens: int  # that were predicted, each once
    windows: int
    loss_sum: float  # nats

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity_of(self.loss)

    def bits_per_byte(self, num_bytes: int) -> float:
        """Return the loss in bits per byte of the predicted text."""
        return self.loss_sum / math.log(2) / num_bytes


def sliding_windows(num_tokens: int, context_len: int, stride: int) -> list[Window]:
    """Return windows such that every token but the first is predicted by exactly one of them.

    The first window scores all its predictions, every further one its last `stride`, with at least
    context_len - stride tokens of context before them. The last one scores what is left.
    """
    end = min(context_len, num_tokens - 1)
    windows = [Window(0, end, end)]
    while end < num_tokens - 1:
        scored = min(stride, num_tokens - 1 - end)
        end += scored
        windows.append(Window(max(0, end - context_len), end, scored))
    return windows


@torch.no_grad()
def window_losses(
    model: nn.Module,
    tokens: npt.NDArray[Any],
    windows: Sequence[Window],
    device: torch.device,
    progress: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Return the summed loss (nats) of the scored predictions of each window.

    model: called with IDs [batch, length], returns logits [batch, length, vocabulary]. progress: called with the
    number of windows after each batch.
    """
    losses: list[float] = []
    position = 0
    while position < len(windows):
        batch = _equal_windows(windows, position, model)
        spans = np.stack([np.asarray(tokens[window.begin : window.end + 1]).astype(np.int64) for window in batch])
        rows = torch.from_numpy(spans).to(device)
        losses += _summed_losses(model(rows[:, :-1]), rows[:, 1:], [window.scored for window in batch])
        position += len(batch)
        progress(len(batch))
    return losses


def _equal_windows(windows: Sequence[Window], position: int, model: nn.Module) -> Sequence[Window]:
    """Return the windows from `position` on that have one length and fit into one forward pass."""
    length = windows[position].end - windows[position].begin
    vocab_size: Any = getattr(getattr(model, "model_config", None), "vocab_size", None) or 2**16
    limit = max(1, LOGITS_AT_ONCE // (length * vocab_size))
    last = position + 1
    while last < min(len(windows), position + limit) and windows[last].end - windows[last].begin == length:
        last += 1
    return windows[position:last]


def _summed_losses(logits: Tensor, targets: Tensor, scored: Sequence[int]) -> list[float]:
    """Return the summed cross-entropy of the last `scored` predictions of each row."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return [float(row[-count:].double().sum()) for row, count in zip(losses, scored, strict=True)]


def summarize(losses: Sequence[float], windows: Sequence[Window]) -> Score:
    """Return the loss per token over all windows, with its standard error.

    The error is that of a ratio of sums over windows, which are taken as independent (Cochran, Sampling Techniques,
    chapter 6). Text has longer-range correlations, so it is a lower bound.
    """
    counts = np.array([window.scored for window in windows], dtype=np.float64)
    sums = np.array(losses)
    total = float(counts.sum())
    loss = float(sums.sum()) / total
    error = math.nan
    if len(windows) > 1:
        residuals = sums - loss * counts
        error = math.sqrt(len(windows) / (len(windows) - 1) * float((residuals**2).sum())) / total
    return Score(loss, error, int(total), len(windows), float(sums.sum()))
