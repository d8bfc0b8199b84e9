"""Check tokenizers: both encoders give the same token IDs, and files of tokenizers are read or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.prepared_text import byte_level_bpe, run_prepare, story
from tinytrain_dist.data.preparation.tokenizer import (
    Encoder,
    Vocabulary,
    byte_of_character,
    load_vocabulary,
    why_not_fast,
)
from tinytrain_dist.errors import DataError


@pytest.fixture(scope="module")
def encoder(vocabulary: Vocabulary) -> Encoder:
    """An encoder that uses tiktoken; not to be changed."""
    return Encoder(vocabulary, use_fast=True)


@settings(deadline=None, max_examples=300)
@given(text=st.text() | st.text(alphabet=" \t\n\r\u3000\u0085'sdtlvem1aé北\u0301<|>") | st.integers(0, 99).map(story))
def test_tiktoken_and_tokenizers_give_the_same_ids(encoder: Encoder, text: str) -> None:
    assert encoder.fast is not None
    ids = encoder.encode(text)
    assert ids.tolist() == encoder.encode_slow(text).tolist()
    assert encoder.slow.decode(ids.tolist(), skip_special_tokens=False) == text


def test_text_on_which_tiktoken_panics_is_encoded_by_tokenizers(vocabulary: Vocabulary) -> None:
    class PanicException(BaseException):
        """Stands for the exception that a panic in Rust raises in Python."""

    class PanickingEncoding:
        def encode_to_numpy(self, text: str, disallowed_special: object) -> NoReturn:
            raise PanicException(text)

    encoder = Encoder(vocabulary, use_fast=True)
    expected = encoder.encode("the wolf").tolist()
    encoder.fast = PanickingEncoding()  # type: ignore[assignment]
    assert encoder.encode("the wolf").tolist() == expected


def test_tiktoken_is_not_used_if_its_ids_differ(vocabulary: Vocabulary) -> None:
    letters = sorted(byte_of_character())
    # "abc" is merged through "bc" only: tokenizers has no rule for "ab" + "c", tiktoken needs none.
    tokenizer = byte_level_bpe([*letters, "ab", "bc", "abc"], [("a", "b"), ("b", "c"), ("a", "bc")])
    tokenizer.add_special_tokens(["<|endoftext|>"])
    without_rule = Vocabulary(tokenizer.to_str(), 260, "<|endoftext|>", 259, "byte-level BPE", "\\S+|\\s+")
    assert why_not_fast(vocabulary, ["abc", story(1)]) is None
    assert why_not_fast(without_rule, []) is None
    assert "differ" in str(why_not_fast(without_rule, ["xabc"]))
    tokenizer.add_tokens(["wolf"])
    with_added_text = Vocabulary(tokenizer.to_str(), 261, "<|endoftext|>", 259, "byte-level BPE", "\\S+|\\s+")
    assert "not special" in str(why_not_fast(with_added_text, []))


def test_the_end_of_document_token_is_taken_from_tokenizer_config_json(
    corpus: Path, tmp_path: Path, vocabulary: Vocabulary
) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(vocabulary.text.replace("<|endoftext|>", "</s>"))
    with pytest.raises(DataError, match=r"no token '<\|endoftext\|>'.*--eos-token"):
        load_vocabulary(str(folder), None)
    assert load_vocabulary(str(folder), "</s>").eos_id == 0
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert run_prepare(corpus, tmp_path / "out", tokenizer=str(folder))["tokenizer"]["eos_token"] == "</s>"


@pytest.mark.parametrize("data", [None, b"\xff", b"{}", b'{"model": 3}'])
def test_a_file_that_is_not_a_tokenizer_is_an_error(corpus: Path, tmp_path: Path, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / "t.json").write_bytes(data)
    with pytest.raises(DataError, match=r"--tokenizer .*t\.json cannot be used"):
        run_prepare(corpus, tmp_path / "out", tokenizer=str(tmp_path / "t.json"))
