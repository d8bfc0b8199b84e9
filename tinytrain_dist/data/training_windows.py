"""Hold the windows of tokens that a rank trains on, with what the loss and the attention must know about them.

Must not know files, ranks or models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE_INDEX = -100  # the target of a position whose prediction does not count


@dataclass(frozen=True)
class Windows:
    """Windows of tokens for some sample slots, on the CPU.

    * `tokens`: [n, context_len + 1], of any integer type: the inputs, and the token after the last one.
    * `counted`: bool [n, context_len]: which targets count in the loss. None: all of them.
    * `documents`: int32 [n, context_len]: the document within its window that each input token belongs to: 0, 1, ... in
      ascending order. None: documents are not separated. They are those of the whole windows, also if `tokens` and
      `counted` are only some of their columns.
    * `sources`: int64 [n]: the source of each window. None: there is only one, or it does not matter.
    """

    tokens: Tensor
    counted: Tensor | None = None
    documents: Tensor | None = None
    sources: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_counted(self) -> int:
        """Return the number of targets that count."""
        if self.counted is None:
            return len(self.tokens) * (self.tokens.shape[1] - 1)
        return int(self.counted.sum())

    def take_columns(self, columns: slice) -> Windows:
        """Return these columns of all windows: tokens with their targets, and which of them count.

        The documents stay whole, because attention to them reaches other columns.
        """
        start, stop = columns.start, columns.stop
        if start == 0 and stop == self.tokens.shape[1] - 1:
            return self
        return replace(
            self,
            tokens=self.tokens[:, start : stop + 1].contiguous(),
            counted=None if self.counted is None else self.counted[:, start:stop].contiguous(),
        )

    def pin_memory(self) -> Windows:
        """Return the windows in pinned memory, from which a GPU copies without waiting."""
        return Windows(
            self.tokens.pin_memory(),
            None if self.counted is None else self.counted.pin_memory(),
            None if self.documents is None else self.documents.pin_memory(),
            None if self.sources is None else self.sources.pin_memory(),
        )


def separate_documents(tokens: Tensor, begins: Tensor, counted: Tensor | None = None) -> Windows:
    """Return windows whose documents are separated.

    tokens: [n, context_len + 1]. begins: bool, of the same shape: where a document begins. counted: as in Windows.
    The first token of a document does not count as a target, because the input before it belongs to another document.
    """
    inside = begins[:, :-1].clone()
    inside[:, 0] = False  # the first document of a window is number 0, wherever it began
    continues = ~begins[:, 1:]
    return Windows(
        tokens,
        continues if counted is None else counted & continues,
        inside.cumsum(dim=1, dtype=torch.int32),
    )
