"""Make small corpora, run `tinytrain prepare` on them, and decode what it wrote.

A test module that imports this file is skipped where the packages of `prepare` are missing.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("tiktoken")
zstandard = pytest.importorskip("zstandard")
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402  # after the skips above

from tinytrain_dist.data.preparation.prepare import prepare  # noqa: E402

STORIES = 120  # in the file of `write_stories`
_WORDS = "the of and to in that it was his he model token wolf naïve straße 北京 run(x): return x+1\n \n".split(" ")


def story(seed: int, words: int = 60) -> str:
    """Return some words in random order; the same for a seed each time."""
    draw = random.Random(seed)
    return " ".join(draw.choice(_WORDS) for _ in range(words)).strip()


def write_stories(path: Path) -> Path:
    """Write a file of 120 stories, separated as in TinyStories, and return its path."""
    path.write_bytes("\n<|endoftext|>\n".join(story(seed) for seed in range(STORIES)).encode())
    return path


def run_prepare(sources: Path | tuple[str, ...], out: Path, **settings: Any) -> dict[str, Any]:
    """Run `prepare` in this process with a small vocabulary; return what meta.json says."""
    defaults = {"workers": 1} if "tokenizer" in settings else {"workers": 1, "vocab_size": 320}
    return prepare(sources if isinstance(sources, tuple) else (str(sources),), str(out), **{**defaults, **settings})


def documents_of(folder: Path, side: str) -> list[str]:
    """Decode a token file back into its documents."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    meta = json.loads((folder / "meta.json").read_text())
    ids = np.load(folder / f"{side}.npy")
    assert ids[-1] == meta["eos_id"]
    ends = np.where(ids == meta["eos_id"])[0] + 1
    return [tokenizer.decode(document[:-1].tolist()) for document in np.split(ids, ends)[:-1]]


def all_documents(folder: Path) -> list[str]:
    """Return the documents of both token files, sorted."""
    return sorted(documents_of(folder, "train") + documents_of(folder, "val"))


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def byte_level_bpe(words: list[str], merges: list[tuple[str, str]]) -> Tokenizer:
    """Return a tokenizer with these words as IDs 0, 1, ... and without special tokens."""
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
