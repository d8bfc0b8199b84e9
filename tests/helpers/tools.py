"""Make runs on a small text, read them and damage them, for the tests of the `tinytrain` verbs.

Must not know what is asserted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.training import train

TEXT = "def add(a, b):\n    return a + b  # naïve — 加法 \U0001f600\n"
EOS = 0
RUNS: dict[str, dict[str, Any]] = {"one": {}, "split": {"max_shard_bytes": 8000}, "other": {"lr_max": 0.02}}
Cli = Callable[..., tuple[int, str, str]]


def make_text_runs(folder: Path) -> Path:
    """Train runs over the same byte-level text, each on one rank, and return their folder."""
    pytest.importorskip("tokenizers")
    from tinytrain_dist.data.preparation.tokenizer import Encoder, train_bpe

    vocabulary = train_bpe([TEXT], 280)
    ids = np.append(Encoder(vocabulary, use_fast=False).encode(TEXT), vocabulary.eos_id).astype(np.uint16)
    assert vocabulary.eos_id == EOS
    for name in ("train", "val"):
        np.save(folder / f"{name}.npy", np.tile(ids, 40))
    (folder / "meta.json").write_text(json.dumps({"vocab_size": vocabulary.size, "eos_id": vocabulary.eos_id}))
    (folder / "tokenizer.json").write_text(vocabulary.text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for name, settings in RUNS.items():
        train(folder, name, 1, **settings)
    return folder


def newest(run: Path) -> Path:
    """Return the last checkpoint of a run of 6 steps."""
    return run / "checkpoints" / "checkpoint-00000006"


def flip_bit(path: Path, back: int = 1) -> None:
    """Change one bit of a file, `back` bytes before its end."""
    data = bytearray(path.read_bytes())
    data[-back] ^= 1
    path.write_bytes(data)


def weights_file(checkpoint: Path) -> Path:
    """Return the first file of weights."""
    return next(checkpoint.glob("model-*.safetensors"))


def lines_with(text: str, word: str) -> list[str]:
    """Return the lines of a text that contain a word."""
    return [line for line in text.splitlines() if word in line]


def read_picture(path: Path) -> bytes:
    """Return the bytes of a PNG picture."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return data
