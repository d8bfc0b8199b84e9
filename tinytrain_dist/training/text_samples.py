"""Write texts with the model under training at each evaluation, from the same prompts all run.

Must not know how the model is spread: every rank runs the same forward passes, and one of them shows the text.
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

PROMPTS, PROMPT_TOKENS, TEMPERATURE = 3, 16, 0.8


class TextSampler:
    """Continuations of the first windows of the evaluation, a function of the weights, the seed and the step."""

    def __init__(
        self, config: TrainingConfig, context: DistributedContext, prompts: Callable[[int, int], Tensor]
    ) -> None:
        """prompts(rows, tokens): ids to go on from. No text without a tokenizer beside the data. A collective."""
        self.config, self.context, self.prompts = config, context, prompts
        wanted = config.sample_tokens and config.val_data and context.is_main
        self._tokenizer: Any = (
            _load_tokenizer(Path(config.train_files[0]).with_name("tokenizer.json")) if wanted else None
        )
        self.on = context.any_rank(self._tokenizer is not None)  # one looks: a file may be there for some ranks only

    @torch.no_grad()
    def write(self, model: nn.Module, step: int) -> list[tuple[str, str]]:
        """(beginning, continuation) of each text; empty where nobody reads it. A collective, as forward passes are."""
        if not self.on:
            return []
        # without compiled code, which would be compiled again for each length
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
        with contextlib.suppress(Exception):  # as with _load
            return [(self._decode(row[:start]), self._decode(row[start:])) for row in rows]
        return []

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


def _load_tokenizer(path: Path) -> Any:
    """Load the tokenizer in `path`; None if it cannot be used, since a sample must not end a run."""
    with contextlib.suppress(Exception):  # tokenizers is an extra, and raises bare Exception for what it cannot read
        from tokenizers import Tokenizer

        check_regular(path)
        return Tokenizer.from_file(str(path))
    return None
