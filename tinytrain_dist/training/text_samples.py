"""Generate sample texts with the model at each evaluation, always from the same prompts.

Must not know how the model is distributed: every rank runs the same forward passes, and rank 0 decodes the text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.utils.regular_files import check_regular
from tinytrain_dist.utils.shard_paths import data_folders

PROMPTS = 3
PROMPT_TOKENS = 16
TEMPERATURE = 0.8


class TextSampler:
    """Continue the first evaluation windows. The texts depend only on the weights, the seed and the step."""

    def __init__(
        self, config: TrainingConfig, context: DistributedContext, prompts: Callable[[int, int], Tensor]
    ) -> None:
        """Load the tokenizer beside the training data; without one, generate no text. A collective.

        prompts(rows, tokens): returns the IDs to continue.
        """
        self.config = config
        self.context = context
        self.prompts = prompts
        wanted = config.sample_tokens and config.val_data and context.is_main
        self._tokenizer: Any = (
            _load_tokenizer(data_folders(config.train_files)[0] / "tokenizer.json") if wanted else None
        )
        # all ranks follow rank 0, because only some ranks may see the file
        self.enabled = context.any_rank(self._tokenizer is not None)

    @torch.no_grad()
    def write(self, model: nn.Module, step: int) -> list[tuple[str, str]]:
        """Return (prompt, continuation) of each text; [] on other ranks than rank 0. A collective."""
        if not self.enabled:
            return []
        # eager, because compiled code would be compiled again for each length
        eager: Any = torch.compiler.set_stance("force_eager") if self.config.compile else contextlib.nullcontext()
        start = max(1, min(PROMPT_TOKENS, self.config.context_len // 2))
        ids = self.prompts(PROMPTS, start).to(self.context.device)
        rng = np.random.default_rng((self.config.seed, step))
        with eager:
            for _ in range(min(self.config.sample_tokens, self.config.context_len - start)):
                logits_bv = model(ids)[:, -1].double().cpu().numpy()
                drawn = np.argmax(logits_bv / TEMPERATURE + rng.gumbel(size=logits_bv.shape), axis=1)
                ids = torch.cat([ids, torch.from_numpy(drawn).to(ids.device)[:, None]], dim=1)
        if self._tokenizer is None:
            return []
        rows = ids.tolist()
        with contextlib.suppress(Exception):  # a sample must not end a run
            return [(self._decode(row[:start]), self._decode(row[start:])) for row in rows]
        return []

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


def _load_tokenizer(path: Path) -> Any:
    """Load the tokenizer in `path`; None if it cannot be used, since a sample must not end a run."""
    if not path.is_file():
        return None
    with contextlib.suppress(Exception):  # tokenizers is an extra, and raises bare Exception for what it cannot read
        check_regular(path)
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(path))
    return None
