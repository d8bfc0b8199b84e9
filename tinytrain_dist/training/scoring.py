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

from tinytrain_dist.data.token_file import SlicedTokens
from tinytrain_dist.data.training_windows import IGNORE_INDEX
from tinytrain_dist.metrics.perplexity import perplexity_of

LOGITS_AT_ONCE = 2**26  # values; 256 MiB in float32


@dataclass(frozen=True)
class TokenMarks:
    """What is known of each token of a sequence besides its ID."""

    counted: npt.NDArray[np.bool_] | None = None  # whether it counts as a target; None: all do
    documents: npt.NDArray[np.int64] | None = None  # number of its document, ascending; None: not separated


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
    tokens: int  # that were predicted and count, each once
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
    tokens: SlicedTokens,
    windows: Sequence[Window],
    device: torch.device,
    progress: Callable[[int], None] = lambda _: None,
    marks: TokenMarks = TokenMarks(),
) -> list[float]:
    """Return the summed loss (nats) of the scored predictions of each window whose targets count.

    model: called with IDs [batch, length], returns logits [batch, length, vocabulary]. If documents are separated, it
    is called with IDs, None and documents. progress: called with the number of windows after each batch.
    """
    losses: list[float] = []
    position = 0
    while position < len(windows):
        batch = _equal_windows(windows, position, model)
        rows = _spans(tokens, batch, device)
        arguments: list[Tensor | None] = [rows[:, :-1]]
        if marks.documents is not None:
            documents = _spans(marks.documents, batch, device)
            arguments += [None, (documents[:, :-1] - documents[:, :1]).int()]
        targets = rows[:, 1:]
        if marks.counted is not None:
            targets = targets.masked_fill(_spans(marks.counted, batch, device)[:, 1:] == 0, IGNORE_INDEX)
        losses += _summed_losses(model(*arguments), targets, [window.scored for window in batch])
        position += len(batch)
        progress(len(batch))
    return losses


def _spans(values: SlicedTokens, windows: Sequence[Window], device: torch.device) -> Tensor:
    """Return the values of the tokens of each window, with the one after them: int64 [windows, length + 1]."""
    spans = np.stack([np.asarray(values[window.begin : window.end + 1]).astype(np.int64) for window in windows])
    return torch.from_numpy(spans).to(device)


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
    rows = logits.float().flatten(0, 1)
    losses = F.cross_entropy(rows, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none").view(targets.shape)
    return [float(row[-count:].double().sum()) for row, count in zip(losses, scored, strict=True)]


def summarize(losses: Sequence[float], windows: Sequence[Window], marks: TokenMarks = TokenMarks()) -> Score:
    """Return the loss per token that counts over all windows, with its standard error; NaN if none counts.

    The error is that of a ratio of sums over windows, which are taken as independent (Cochran, Sampling Techniques,
    chapter 6). Text has longer-range correlations, so it is a lower bound.
    """
    counts = np.array([_num_counted(window, marks) for window in windows], dtype=np.float64)
    sums = np.array(losses)
    total = float(counts.sum())
    if not total:
        return Score(math.nan, math.nan, 0, len(windows), 0.0)
    loss = float(sums.sum()) / total
    error = math.nan
    if len(windows) > 1:
        residuals = sums - loss * counts
        error = math.sqrt(len(windows) / (len(windows) - 1) * float((residuals**2).sum())) / total
    return Score(loss, error, int(total), len(windows), float(sums.sum()))


def _num_counted(window: Window, marks: TokenMarks) -> int:
    """Return how many of the predictions that a window scores count."""
    if marks.counted is None:
        return window.scored
    return int(marks.counted[window.end - window.scored + 1 : window.end + 1].sum())
