"""Texts of token IDs: byte-level tokenizers without a library, others with it, and none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")
from tokenizers import Tokenizer

from tests.helpers.tokenizers import FAMILIES, TEXTS, write_tokenizer
from tinytrain_dist.data.statistics.token_texts import end_of_text_id, read_token_texts, vocabulary_size
from tinytrain_dist.errors import DataError


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_what_was_encoded(tmp_path: Path, family: str) -> None:
    texts, note = read_token_texts(write_tokenizer(tmp_path / family, family))
    tokenizer = Tokenizer.from_file(str(tmp_path / family / "tokenizer.json"))
    assert (texts.known, note) == (True, "")
    assert texts.size == tokenizer.get_vocab_size()
    for text in {text.strip() for text in TEXTS}:
        assert texts.text(tokenizer.encode(text, add_special_tokens=False).ids).strip() == text
    assert set(texts.special.values()) >= {"</s>"} if family in ("llama2", "t5") else texts.special


def test_bytes_special_tokens_and_unknown_ids_are_visible(tmp_path: Path) -> None:
    texts, _ = read_token_texts(write_tokenizer(tmp_path / "gpt2", "gpt2"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "gpt2" / "tokenizer.json"))
    first, *_, last = tokenizer.encode("北").ids
    assert texts.text([first]).startswith("\\xe5")
    assert texts.text([last]).endswith("\\x97")
    assert texts.text([tokenizer.token_to_id("<|endoftext|>"), first, 99_999, -1]).endswith("<id 99999><id -1>")
    assert texts.text([tokenizer.token_to_id("<|endoftext|>")]) == "<|endoftext|>"


def test_ids_that_the_library_does_not_know(tmp_path: Path) -> None:
    texts, _ = read_token_texts(write_tokenizer(tmp_path / "llama2", "llama2"))
    assert texts.text([1, 5000, 2]) == "<s><id 5000></s>"
    tokenizer = Tokenizer.from_file(str(tmp_path / "llama2" / "tokenizer.json"))
    ids = tokenizer.encode("two words", add_special_tokens=False).ids
    assert texts.text([*ids, 5000, *ids]) == "two words<id 5000>two words"


def test_without_a_tokenizer_there_are_numbers(tmp_path: Path) -> None:
    texts, note = read_token_texts(tmp_path)
    assert texts.text([3, 70_000]) == "3 70000"
    assert "no tokenizer.json in" in note
    assert end_of_text_id(tmp_path, texts) == (None, "")
    assert vocabulary_size(tmp_path, texts) == (None, "")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"model": {"vocab": {"a": "x"}}}', "{", '{"model": {"type": "What"}}']
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer.json: is not a tokenizer \(.*\); put the original back, or remove"):
        read_token_texts(tmp_path)


def test_where_the_end_and_the_size_are_said(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "qwen", "qwen")
    texts, _ = read_token_texts(folder)
    names = {name: token for token, name in texts.special.items()}
    assert end_of_text_id(folder, texts) == (names["<|im_end|>"], "tokenizer_config.json")
    assert vocabulary_size(folder, texts) == (texts.size, "tokenizer.json")
    (folder / "tokenizer_config.json").unlink()
    assert end_of_text_id(folder, texts) == (names["<|endoftext|>"], "its name in tokenizer.json")
    (folder / "meta.json").write_text(json.dumps({"eos_id": 3, "vocab_size": 400}))
    assert end_of_text_id(folder, texts) == (3, "meta.json")
    assert vocabulary_size(folder, texts) == (400, "meta.json")
    (folder / "meta.json").write_text("{")
    with pytest.raises(DataError, match=r"meta.json: cannot be read"):
        end_of_text_id(folder, texts)
