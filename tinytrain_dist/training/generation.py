"""Generate text with a trained model: draw tokens one by one, and decode them as they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def draw_token(
    logits_v: Tensor, rng: np.random.Generator, temperature: float, top_k: int | None, top_p: float | None
) -> int:
    """Draw a token ID. temperature 0 takes the likeliest one; top_k and top_p first exclude unlikely ones.

    The draw is computed on the host in float64 from one number of `rng`, so only the logits depend on the device.
    """
    logits = logits_v.double().cpu().numpy()
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    if temperature == 0:
        return int(order[0])
    weights = np.exp((logits[order] - logits[order[0]]) / temperature)
    cumulative = np.cumsum(weights) / weights.sum()
    if top_p is not None:
        kept = int(np.searchsorted(cumulative, top_p)) + 1  # the fewest tokens that together reach top_p
        cumulative = cumulative[:kept] / cumulative[:kept][-1]
    drawn = int(np.searchsorted(cumulative, rng.random(), side="right"))
    return int(order[min(drawn, len(cumulative) - 1)])  # the last sum may be less than 1 by rounding


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
    """Return the IDs that the model generates after `ids`: max_new_tokens, or fewer if it draws `stop_id`.

    `stop_id` is not returned. The model sees the last context_len IDs (None: as many as its configuration says), with
    positions from 0 as in training. The same seed gives the same IDs. on_token: called with each new ID.
    Errors: ValueError if `ids` is empty, or context_len is unknown.
    """
    window = context_len or getattr(getattr(model, "config", None), "context_len", None)
    if not ids or not window:
        raise ValueError("generate: needs at least one id to start from, and a context_len")
    rng = np.random.default_rng(seed)
    known = list(ids)
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
    """Decode IDs into text piece by piece. Each piece ends with a complete character."""

    def __init__(self, tokenizer: Any, ids: Sequence[int]) -> None:
        """Begin after the prompt `ids`; the first piece starts with a space only if the prompt requires it."""
        self.tokenizer = tokenizer
        self.ids = list(ids)
        # Tokens are decoded together with a few earlier ones, on which spaces depend.
        self.start = max(0, len(self.ids) - 8)  # index of the first ID to decode
        self.shown = len(self.ids)  # number of IDs whose text was returned

    def add(self, new: int) -> str:
        """Add one ID, and return the text that can be shown now."""
        self.ids.append(new)
        piece = self.rest()
        if piece.endswith("\ufffd"):  # in the middle of a character
            return ""
        if piece:
            self.start = self.shown
            self.shown = len(self.ids)
        return piece

    def rest(self) -> str:
        """Return the text that was not shown yet, complete or not."""
        shown_text = self._decode(self.ids[self.start : self.shown])
        return self._decode(self.ids[self.start :])[len(shown_text) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text
