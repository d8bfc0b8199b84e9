"""Check how many bytes of text each token ID stands for, from a tokenizer or from a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinytrain_dist.data.bytes_per_token import bytes_per_token
from tinytrain_dist.errors import DataError


def sizes_in(folder: Path, vocab_size: int) -> list[int] | None:
    sizes = bytes_per_token(folder, vocab_size)
    return None if sizes is None else sizes.tolist()


def test_sizes_of_a_byte_level_bpe_add_up_to_the_bytes_of_the_text(tmp_path: Path) -> None:
    tokenizer = pytest.importorskip("tinytrain_dist.data.preparation.tokenizer")
    text = "Grüße, 日本語 👩‍👧 and  plain\twords words words\r\n" * 3
    vocabulary = tokenizer.train_bpe([text], 300)
    (tmp_path / "tokenizer.json").write_text(vocabulary.text)
    sizes = bytes_per_token(tmp_path, 320)
    assert sizes is not None
    ids = tokenizer.Encoder(vocabulary, use_fast=False).encode(text + "🦆")
    assert len(set(ids.tolist())) > 10
    assert sizes[ids].sum() == len((text + "🦆").encode())
    assert sizes[vocabulary.eos_id] == 0
    assert sizes[vocabulary.size :].sum() == 0  # IDs that only pad the vocabulary stand for no text
    with pytest.raises(DataError, match=r"tokenizer\.json: does not fit vocab_size 5 \(it has \d+ ids\); correct"):
        bytes_per_token(tmp_path, 5)


def test_an_added_token_counts_its_bytes_unless_it_is_special(tmp_path: Path) -> None:
    tokenizer = {
        "model": {"type": "BPE", "vocab": {"a": 0, "Ġa": 1}},
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [{"id": 2, "content": "é!", "special": False}, {"id": 0, "content": "a", "special": True}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert sizes_in(tmp_path, 4) == [0, 2, 3, 0]


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"model": {"type": "WordPiece", "vocab": {"a": 0}}, "decoder": {"type": "ByteLevel"}, "added_tokens": []},
        {"model": {"type": "BPE", "vocab": {"a": 0}}, "decoder": None, "added_tokens": []},
        {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}, "decoder": {"type": "Metaspace"}, "added_tokens": []},
    ],
    ids=["WordPiece", "BPE of characters", "Unigram"],
)
def test_sizes_of_another_tokenizer_are_known_only_from_a_table(tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    assert sizes_in(tmp_path, 3) is None
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert sizes_in(tmp_path, 3) is None
    np.save(tmp_path / "token_bytes.npy", [0, 4, 1])
    assert sizes_in(tmp_path, 3) == [0, 4, 1]
    with pytest.raises(DataError, match=r"token_bytes\.npy: does not fit vocab_size 4 "):
        bytes_per_token(tmp_path, 4)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"type": "BPE", "vocab": 3}}'])
def test_a_broken_tokenizer_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=r"tokenizer\.json: does not fit vocab_size 3 "):
        bytes_per_token(tmp_path, 3)
