"""`tinytrain sample`: generate text with a trained model.

Must not know how the model was trained or on how many ranks.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tinytrain_dist.checkpoint.discovery import find_model
from tinytrain_dist.checkpoint.load_model import load_model
from tinytrain_dist.checkpoint.load_tokenizer import end_id, ids_before_document, load_tokenizer
from tinytrain_dist.cli.arguments import call_verb
from tinytrain_dist.cli.tables import PathArgument
from tinytrain_dist.config.model_config import ModelConfig
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.training.generation import TextStream, generate


@dataclasses.dataclass(frozen=True)
class Options:
    """Generate text with a trained model."""

    checkpoint: PathArgument
    """A checkpoint, a run (its newest valid checkpoint is used), or a Hugging Face folder, such as an export."""
    ema: bool = False
    """Use the moving average of the weights (see ema_decay)."""
    prompt: str = ""
    """Text to continue (empty: start a new document)."""
    prompt_ids: str | None = None
    """Token IDs to continue instead of a prompt, such as 1,2,3. Needs no tokenizer."""
    max_new_tokens: int = 100
    """Largest number of tokens to generate; the text also ends at the end of a document."""
    temperature: float = 0.8
    """Randomness of the text (0: always the likeliest token; 1: by the model's probabilities; more: more random)."""
    top_k: int | None = 50
    """Draw only from the k likeliest tokens (None: from all)."""
    top_p: float | None = None
    """Draw only from the likeliest tokens that together have this probability (None: from all)."""
    seed: int = 0
    """The same seed gives the same text; sample i, counted from 1, uses seed + i - 1."""
    num_samples: int = 1
    """Number of texts to generate."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on (auto: cuda if available, else cpu)."""

    def check(self) -> None:
        """Raise ConfigError with all problems. Not in __post_init__, whose errors tyro reports in its own way."""
        problems = [
            f"{name}: {getattr(self, name)} must be {expected}"
            for name, ok, expected in (
                ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
                ("num_samples", self.num_samples >= 1, "at least 1"),
                ("temperature", 0 <= self.temperature < float("inf"), "0 (the likeliest token) or greater"),
                ("top_k", self.top_k is None or self.top_k >= 1, "at least 1 (None: no limit)"),
                ("top_p", self.top_p is None or 0 < self.top_p <= 1, "greater than 0 and at most 1 (None: no limit)"),
                ("seed", self.seed >= 0, "0 or greater"),
            )
            if not ok
        ]
        if self.prompt and self.prompt_ids is not None:
            problems.append(f"prompt: {self.prompt!r} and prompt_ids {self.prompt_ids} are both set; give one of them")
        if self.device == "cuda" and not torch.cuda.is_available():
            problems.append("device: is cuda, but this machine has no CUDA device that torch can use; leave it out")
        if problems:
            raise ConfigError(problems, "the settings of sample")


def main(args: list[str]) -> int:
    """Print the prompt and the text that the model generates after it, token by token."""
    options = call_verb(Options, "sample", args)
    options.check()
    checkpoint = find_model(options.checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    stop_id = end_id(checkpoint)
    first_ids = ids_before_document(checkpoint, tokenizer)
    prompt_ids = _prompt_ids(options, checkpoint, tokenizer, first_ids, stop_id)
    use_cuda = options.device != "cpu" and torch.cuda.is_available()
    model = load_model(checkpoint, torch.device("cuda" if use_cuda else "cpu"), average=options.ema)
    _check_prompt(prompt_ids, model.model_config)
    for number in range(options.num_samples):
        if options.num_samples > 1:
            separator = "\n" if number else ""
            print(f"{separator}--- {number + 1} of {options.num_samples} ---")
        hidden_ids = {*first_ids, stop_id}
        _print_sample(options, model, tokenizer, prompt_ids, hidden_ids, stop_id, options.seed + number)
    return 0


def _print_sample(
    options: Options,
    model: nn.Module,
    tokenizer: Any,
    prompt_ids: list[int],
    hidden_ids: set[int | None],
    stop_id: int | None,
    seed: int,
) -> None:
    """Print one sample on stdout: text token by token, or without a tokenizer all IDs at the end.

    hidden_ids: those of the prompt that are not text.
    """
    stream = TextStream(tokenizer, prompt_ids) if tokenizer else None

    def show(new_id: int) -> None:
        if stream:
            print(stream.add(new_id), end="", flush=sys.stdout.isatty())

    if tokenizer:
        shown_ids = [token_id for token_id in prompt_ids if token_id not in hidden_ids]
        print(tokenizer.decode(shown_ids, skip_special_tokens=False), end="", flush=True)
    new_ids = generate(
        model,
        prompt_ids,
        options.max_new_tokens,
        options.temperature,
        options.top_k,
        options.top_p,
        seed,
        stop_id,
        on_token=show,
    )
    print(stream.rest() if stream else ",".join(map(str, [*prompt_ids, *new_ids])))


def _prompt_ids(
    options: Options, checkpoint: Path, tokenizer: Any, first_ids: list[int], stop_id: int | None
) -> list[int]:
    if options.prompt_ids is not None:
        try:
            return [int(word) for word in options.prompt_ids.replace(" ", "").split(",")]
        except ValueError:
            raise ConfigError(f"prompt_ids: {options.prompt_ids!r} is not a list of ids such as 1,2,3") from None
    if options.prompt and tokenizer is None:
        raise ConfigError(
            f"prompt: {options.prompt!r} cannot become ids, because {checkpoint} has no tokenizer.json; give "
            "--prompt-ids 1,2,3, or train with data that `tinytrain prepare` made"
        )
    if options.prompt:
        # a terminal that is not UTF-8 gives bytes as lone surrogates, which no tokenizer accepts
        prompt = options.prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False).ids
        return [*first_ids, *ids]
    if first_ids:
        return first_ids
    if stop_id is None:
        raise ConfigError(
            f"prompt: is empty, and {checkpoint}/config.json names no end-of-text id to start a new document from; "
            "give --prompt or --prompt-ids"
        )
    return [stop_id]


def _check_prompt(ids: list[int], config: ModelConfig) -> None:
    """Check that the IDs are in the vocabulary; print a note if the prompt is too long. Errors: ConfigError."""
    vocab_size = config.vocab_size or 0
    invalid = [token_id for token_id in ids if not 0 <= token_id < vocab_size]
    if invalid:
        raise ConfigError(f"prompt_ids: {invalid[0]} is not an id of this model; they go from 0 to {vocab_size - 1}")
    if len(ids) > config.context_len:
        print(
            f"note: the prompt has {len(ids)} tokens; the model sees only the last {config.context_len} (context_len)",
            file=sys.stderr,
        )
