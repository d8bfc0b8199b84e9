"""Check that the tokenizer stored beside token files is compared with the files and with initial weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")

from tests.helpers.tokenizers import FAMILIES, write_tokenizer
from tinytrain_dist.data.stored_tokenizer import check_source_of_weights, check_tokenizer, tokens_around
from tinytrain_dist.errors import DataError

AROUND = {"llama2": ["<s>"], "llama3": ["<|begin_of_text|>"], "gpt2": [], "qwen": [], "t5": ["</s>"]}
OLD: dict[str, Any] = {"tokenizer": {"eos_token": "</s>"}}
NEW: dict[str, Any] = {"tokenizer": {"ids_before_document": [1]}}


def data_folder(folder: Path, family: str, meta: dict[str, Any]) -> Path:
    write_tokenizer(folder, family)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_that_older_data_lacks_are_a_warning(tmp_path: Path, family: str) -> None:
    folder = data_folder(tmp_path, family, OLD)
    assert tokens_around(json.loads((folder / "tokenizer.json").read_text())) == AROUND[family]
    warnings = check_tokenizer(folder)
    assert bool(warnings) == bool(AROUND[family])
    assert all(f"puts {AROUND[family][0]!r} around every text" in line for line in warnings)
    assert check_tokenizer(data_folder(tmp_path, family, NEW)) == []


def test_the_post_processor_of_bert_counts_too() -> None:
    assert tokens_around({"post_processor": {"type": "RobertaProcessing", "cls": ["<s>", 0], "sep": ["</s>", 2]}}) == [
        "<s>",
        "</s>",
    ]
    assert tokens_around({"post_processor": None}) == []


def test_a_tokenizer_that_did_not_make_the_files_is_refused(tmp_path: Path) -> None:
    folder = data_folder(tmp_path, "llama3", {})
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    meta = {**NEW, "digests": {"tokenizer.json": digest}}
    assert check_tokenizer(data_folder(tmp_path, "llama3", meta)) == []
    with pytest.raises(DataError, match=r"tokenizer\.json: is not the one that the token files beside it were made"):
        check_tokenizer(data_folder(tmp_path, "gpt2", meta))


def test_weights_that_were_trained_with_other_ids_are_a_warning(tmp_path: Path) -> None:
    source, same, other = (tmp_path / name for name in ("source", "same", "other"))
    data_folder(same, "llama3", NEW)
    data_folder(other, "qwen", NEW)
    write_tokenizer(source, "llama3")
    assert check_source_of_weights(source, same) == []
    (warning,) = check_source_of_weights(source, other)
    assert f"run tinytrain prepare again with --tokenizer {source}" in warning
    assert check_source_of_weights(tmp_path / "none", other) == []


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_a_damaged_file_is_reported(tmp_path: Path, text: str) -> None:
    folder = data_folder(tmp_path, "gpt2", NEW)
    (folder / "meta.json").write_text(text)
    with pytest.raises(DataError, match=r"meta\.json: cannot be read"):
        check_tokenizer(folder)
