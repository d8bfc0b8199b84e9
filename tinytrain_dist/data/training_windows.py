"""Hold the windows of tokens that a step reads, with what a loss and attention must know about them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """Windows of tokens for some sample slots, on the CPU."""

    tokens: Tensor  # [n, context_len + 1], any integer type
    counted: Tensor | None = None  # bool [n, context_len]: which targets count; None: all
    # int32 [n, context_len]: index of the document within its window that each input token belongs to, 0, 1, ...;
    # None: not separated
    documents: Tensor | None = None
