"""`tinytrain sample`: write text with a trained model.

Must not know how the model was trained or on how many ranks.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn

from tinytrain_dist.checkpoint.discovery import find_checkpoint
from tinytrain_dist.checkpoint.load_model import load_model
from tinytrain_dist.cli.tables import PathArgument
from tinytrain_dist.config.model_config import ModelConfig
from tinytrain_dist.errors import CheckpointError, ConfigError, TinytrainError
from tinytrain_dist.training.generation import TextStream, generate


@dataclasses.dataclass(frozen=True)
class Options:
    """Write text with a trained model."""

    checkpoint: PathArgument
    """A checkpoint, or a run: its newest valid checkpoint."""
    prompt: str = ""
    """Text to go on from; empty: a new document."""
    prompt_ids: str | None = None
    """Token ids to go on from, as 1,2,3, in place of a prompt; needs no tokenizer."""
    max_new_tokens: int = 100
    """Tokens to write at most; the end of the document ends the text as well."""
    temperature: float = 0.8
    """0: always the likeliest token; 1: as the model has it; above: wilder."""
    top_k: int | None = 50
    """Draw from the k likeliest tokens only; None: from all."""
    top_p: float | None = None
    """Draw from the fewest tokens that together have this probability."""
    seed: int = 0
    """The same seed gives the same text; sample number i has seed + i - 1."""
    num_samples: int = 1
    """How many texts."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: cuda where there is one."""

    def check(self) -> None:
        """Raise ConfigError with everything that is wrong; not in __post_init__, which tyro reports in its own way."""
        found = [
            f"{name}: {getattr(self, name)} must be {what}"
            for name, ok, what in (
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
            found.append(f"prompt: {self.prompt!r} and prompt_ids {self.prompt_ids} are both set; give one of them")
        if self.device == "cuda" and not torch.cuda.is_available():
            found.append("device: cuda, but this machine has no CUDA device that torch can use; leave it out")
        if found:
            raise ConfigError(found, "the settings of sample")


def main(args: list[str]) -> int:
    """`tinytrain sample`: the prompt and what the model makes of it, on stdout as it comes."""
    options = tyro.cli(Options, prog="tinytrain sample", args=args)
    options.check()
    checkpoint = find_checkpoint(options.checkpoint, "model")
    tokenizer, end = load_tokenizer(checkpoint), end_id(checkpoint)
    ids = _prompt_ids(options, checkpoint, tokenizer, end)
    cuda = options.device != "cpu" and torch.cuda.is_available()
    model = load_model(checkpoint, torch.device("cuda" if cuda else "cpu"))
    _check_prompt(ids, model.model_config)
    for number in range(options.num_samples):
        if options.num_samples > 1:
            print(f"{chr(10) if number else ''}--- {number + 1} of {options.num_samples} ---")
        _write(options, model, tokenizer, ids, end, options.seed + number)
    return 0


def _write(options: Options, model: nn.Module, tokenizer: Any, ids: list[int], end: int | None, seed: int) -> None:
    """One sample on stdout: text piece by piece, or without a tokenizer the ids."""
    text = TextStream(tokenizer, ids) if tokenizer else None

    def show(drawn: int) -> None:
        if text:
            print(text.add(drawn), end="", flush=sys.stdout.isatty())

    if tokenizer:
        print(tokenizer.decode([i for i in ids if i != end], skip_special_tokens=False), end="", flush=True)
    new = generate(
        model, ids, options.max_new_tokens, options.temperature, options.top_k, options.top_p, seed, end, on_token=show
    )
    print(text.rest() if text else ",".join(map(str, [*ids, *new])))


def load_tokenizer(checkpoint: Path) -> Any:
    """Load the tokenizer in the checkpoint's folder; None if it has none.

    Errors: TinytrainError if `tokenizers` is not installed; CheckpointError if the file is not a tokenizer.
    """
    path = checkpoint / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise TinytrainError(
            "tokenizers: is not installed, and text needs it; pip install 'tinytrain_dist[prep]', or use --prompt-ids"
        ) from None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for whatever it cannot read
        raise CheckpointError(f"{path}: is not a tokenizer ({error}); use --prompt-ids") from None
    tokenizer.encode_special_tokens = True  # as in preparation: text that looks like a special token is text
    return tokenizer


def end_id(checkpoint: Path) -> int | None:
    """Return the end-of-text ID that config.json names, if any."""
    path = checkpoint / "config.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return found[0] if isinstance(found, list) else found


def _prompt_ids(options: Options, checkpoint: Path, tokenizer: Any, end: int | None) -> list[int]:
    if options.prompt_ids is not None:
        try:
            ids = [int(word) for word in options.prompt_ids.replace(" ", "").split(",")]
        except ValueError:
            raise ConfigError(f"prompt_ids: {options.prompt_ids!r} is not a list of ids such as 1,2,3") from None
        return ids
    if options.prompt and tokenizer is None:
        raise ConfigError(
            f"prompt: {options.prompt!r} cannot become ids, because {checkpoint} has no tokenizer.json; give "
            "--prompt-ids 1,2,3, or train with data that `tinytrain prepare` made"
        )
    if options.prompt:
        # a terminal that is not UTF-8 gives bytes as lone surrogates, which no tokenizer takes
        prompt = options.prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        found: list[int] = tokenizer.encode(prompt, add_special_tokens=False).ids
        return found
    if end is None:
        raise ConfigError(
            f"prompt: is empty, and {checkpoint}/config.json names no end-of-text id to start a new document from; "
            "give --prompt or --prompt-ids"
        )
    return [end]


def _check_prompt(ids: list[int], config: ModelConfig) -> None:
    """Errors: ConfigError for ids outside the vocabulary. A prompt that is cut gets a word on stderr."""
    vocab_size = config.vocab_size or 0
    bad = [i for i in ids if not 0 <= i < vocab_size]
    if bad:
        raise ConfigError(f"prompt_ids: {bad[0]} is not an id of this model; they go from 0 to {vocab_size - 1}")
    if len(ids) > config.context_len:
        print(
            f"note: the prompt has {len(ids)} tokens; the model sees the last {config.context_len} (context_len)",
            file=sys.stderr,
        )
