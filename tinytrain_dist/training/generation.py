"""Generate text with a trained model: draw tokens one by one, and decode them as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def draw_token(
    logits_v: Tensor, rng: np.random.Generator, temperature: float, top_k: int | None, top_p: float | None
) -> int:
    """One token id. temperature 0 takes the likeliest; top_k and top_p cut the tail before drawing.

    Drawn on the host in float64 from one number of `rng`, so that the device decides nothing but the logits.
    """
    logits = logits_v.double().cpu().numpy()
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    if temperature == 0:
        return int(order[0])
    weights = np.exp((logits[order] - logits[order[0]]) / temperature)
    below = np.cumsum(weights) / weights.sum()
    if top_p is not None:
        kept = int(np.searchsorted(below, top_p)) + 1  # the fewest whose sum reaches top_p
        below = below[:kept] / below[:kept][-1]
    return int(order[min(int(np.searchsorted(below, rng.random(), side="right")), len(below) - 1)])


def generate(
    model: nn.Module,
    ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    seed: int = 0,
    stop_id: int | None = None,
    *,
    context_len: int | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """Return the IDs that the model writes after `ids`: max_new_tokens, or fewer if it draws `stop_id` (left out).

    The model sees the last context_len ids (None: its configuration's), counted from position 0 as in training. The
    same seed gives the same ids. on_token is told each id as it comes. Errors: ValueError if `ids` is empty.
    """
    window = context_len or getattr(getattr(model, "config", None), "context_len", None)
    if not ids or not window:
        raise ValueError("generate: needs at least one id to start from, and a context_len")
    rng, known = np.random.default_rng(seed), list(ids)
    device = next(model.parameters()).device
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits_btv = model(torch.tensor([known[-window:]], device=device))
        drawn = draw_token(logits_btv[0, -1], rng, temperature, top_k, top_p)
        if drawn == stop_id:
            break
        known.append(drawn)
        if on_token:
            on_token(drawn)
    return known[len(ids) :]


class TextStream:
    """Turns ids into text piece by piece: a piece comes when the bytes of its last character are complete."""

    def __init__(self, tokenizer: Any, ids: Sequence[int]) -> None:
        """`ids`: the prompt, which decides whether the first piece starts with a space."""
        self.tokenizer, self.ids = tokenizer, list(ids)
        self.start, self.shown = max(0, len(self.ids) - 8), len(self.ids)

    def add(self, new: int) -> str:
        """Take one id; the text that can be shown now."""
        self.ids.append(new)
        piece = self.rest()
        if piece.endswith("\ufffd"):  # in the middle of a character
            return ""
        if piece:
            self.start, self.shown = self.shown, len(self.ids)
        return piece

    def rest(self) -> str:
        """Return the text that was not shown yet, complete or not."""
        return self._decode(self.ids[self.start :])[len(self._decode(self.ids[self.start : self.shown])) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text
