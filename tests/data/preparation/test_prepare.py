"""Check what `prepare` writes, that it writes the same each time, and how it divides and samples documents."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.prepared_text import (
    STORIES,
    all_documents,
    byte_level_bpe,
    content,
    documents_of,
    run_prepare,
    story,
)
from tests.helpers.ranks import REPOSITORY
from tinytrain_dist.data.preparation import planning, sample
from tinytrain_dist.data.preparation.prepare import prepare
from tinytrain_dist.data.preparation.sample import Sample
from tinytrain_dist.data.preparation.tokenizer import Vocabulary, byte_of_character
from tinytrain_dist.errors import ConfigError, DataError

tokenizers = pytest.importorskip("tokenizers")
TOKEN_FILES = ["train.npy", "train.documents.npy", "val.npy", "val.documents.npy"]

# --- output ----------------------------------------------------------------------------------------------------------


def test_every_document_is_in_one_of_the_two_files_and_meta_json_describes_them(corpus: Path, tmp_path: Path) -> None:
    meta = run_prepare(corpus, tmp_path / "out")
    assert all_documents(tmp_path / "out") == sorted(story(seed) for seed in range(STORIES))
    assert meta == json.loads((tmp_path / "out" / "meta.json").read_text())
    for side in ("train", "val"):
        documents, ids = documents_of(tmp_path / "out", side), np.load(tmp_path / "out" / f"{side}.npy")
        assert ids.dtype == np.uint16
        assert ids.ndim == 1
        assert meta[f"{side}_tokens"] == len(ids)
        assert meta[f"{side}_documents"] == len(documents) > 0
        starts = np.load(tmp_path / "out" / f"{side}.documents.npy")
        assert starts.dtype == np.int64
        assert starts.tolist() == [0, *(np.where(ids == meta["eos_id"])[0][:-1] + 1)]
        assert meta[f"{side}_bytes"] == sum(len(document.encode()) for document in documents)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in content(tmp_path / "out").items()}
    assert meta["digests"] == {name: digests[name] for name in [*TOKEN_FILES, "tokenizer.json"]}
    assert meta["sources"] == [
        {
            "path": str(corpus),
            "files": 1,
            "bytes": corpus.stat().st_size,
            "sha256": hashlib.sha256(corpus.read_bytes()).hexdigest(),
        }
    ]
    assert meta["dtype"] == "uint16"
    assert meta["vocab_size"] == 320
    assert meta["tokenizer"]["kind"] == "byte-level BPE"


def test_a_second_run_writes_the_same_bytes_with_another_hash_seed(corpus: Path, tmp_path: Path) -> None:
    code = "import sys; from tinytrain_dist.cli.prepare import main; sys.exit(main(sys.argv[1:]))"
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(REPOSITORY), "RAYON_NUM_THREADS": seed}
        arguments = [str(corpus), "--out", seed, "--vocab-size", "320", "--workers", "1"]
        subprocess.run([sys.executable, "-c", code, *arguments], env=environment, cwd=tmp_path, check=True)
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_more_than_65536_ids_are_written_as_uint32(corpus: Path, tmp_path: Path) -> None:
    letters = sorted(byte_of_character())
    pairs = [(a, b) for a in letters for b in letters]
    tokenizer = byte_level_bpe([*letters, *(a + b for a, b in pairs)], pairs)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "big.json"))
    meta = run_prepare(corpus, tmp_path / "out", tokenizer=str(tmp_path / "big.json"))
    assert meta["vocab_size"] == 256 + 65536 + 1
    assert meta["dtype"] == "uint32"
    assert np.load(tmp_path / "out" / "train.npy").dtype == np.uint32
    assert np.load(tmp_path / "out" / "train.npy").max() == meta["eos_id"] == 65792
    assert all_documents(tmp_path / "out") == sorted(story(seed) for seed in range(STORIES))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "big.json").read_bytes()


def test_transformers_loads_the_output_folder(corpus: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    meta = run_prepare(corpus, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    ids = np.load(tmp_path / "out" / "train.npy").tolist()
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == meta["eos_id"]
    assert len(tokenizer) == meta["vocab_size"]
    assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids


# --- training and validation documents -------------------------------------------------------------------------------


def test_train_and_val_share_no_document_and_val_is_never_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": story(seed % 5)}) + "\n" for seed in range(50)))
    meta = run_prepare(tmp_path / "a.jsonl", tmp_path / "little", val_fraction=1e-9)
    assert (meta["train_documents"], meta["val_documents"]) == (40, 10)
    meta = run_prepare(tmp_path / "a.jsonl", tmp_path / "much", val_fraction=0.999999)
    assert (meta["train_documents"], meta["val_documents"]) == (10, 40)
    assert not set(documents_of(tmp_path / "much", "train")) & set(documents_of(tmp_path / "much", "val"))


def test_the_val_file_gets_the_requested_fraction(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(4000)))
    meta = run_prepare(tmp_path / "a.jsonl", tmp_path / "out", val_fraction=0.25)
    assert 900 < meta["val_documents"] < 1100
    assert meta["train_documents"] + meta["val_documents"] == 4000


# --- the sample for the tokenizer ------------------------------------------------------------------------------------


@given(order=st.permutations(range(40)), most=st.integers(1, 400))
def test_the_sample_does_not_depend_on_the_order_of_documents(order: list[int], most: int) -> None:
    documents = [b"x" * (1 + 7 * index % 60) for index in range(40)]

    def drawn(indices: Iterable[int]) -> list[bytes]:
        drawn_sample = Sample(most)
        for index in indices:
            drawn_sample.add(index, documents[index])
            drawn_sample.add(index, documents[index])  # a copy of a document does not count
        assert drawn_sample.bytes == sum(map(len, drawn_sample.documents())) <= most
        return drawn_sample.documents()

    assert drawn(order) == drawn(range(40)) == documents[: len(drawn(range(40)))]


def test_the_tokenizer_is_trained_on_a_bounded_number_of_different_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "_TRAINING_WORD_BYTES", 100)
    repeated = [b"again and again\n"] * 50
    different = [b"word%c%c\n" % (65 + i, 65 + j) for i in range(20) for j in range(20)]
    assert b"".join(sample.training_texts(repeated)) == b"".join(repeated)
    assert len(b"".join(sample.training_texts(different))) <= 200


# --- messages and errors ---------------------------------------------------------------------------------------------


def test_a_tokenizer_that_tiktoken_cannot_represent_is_used_with_a_message(
    corpus: Path, tmp_path: Path, vocabulary: Vocabulary, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(vocabulary.text)
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.save(str(tmp_path / "lower.json"))
    run_prepare(corpus, tmp_path / "out", tokenizer=str(tmp_path / "lower.json"))
    messages = capsys.readouterr().err
    assert "encoding with tokenizers: tiktoken, which" in messages
    assert "it normalizes text" in messages
    assert all_documents(tmp_path / "out") == sorted(story(seed).lower() for seed in range(STORIES))


def test_a_small_val_file_and_a_small_vocabulary_are_reported(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = run_prepare(corpus, tmp_path / "out", vocab_size=50_000, val_fraction=1e-9)
    messages = capsys.readouterr().err
    assert meta["vocab_size"] < 50_000
    assert f"{meta['vocab_size']:,} IDs, fewer than the 50,000 of --vocab-size" in messages
    assert f"val.npy has only {meta['val_tokens']:,} tokens" in messages
    assert "train.npy has only" not in messages
    assert np.load(tmp_path / "out" / "train.npy").max() < meta["vocab_size"]
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert len(tokenizer.get_vocab()) == meta["vocab_size"]


def test_all_wrong_settings_are_reported_at_once(corpus: Path, tmp_path: Path) -> None:
    wrong = {"val_fraction": 1.0, "max_document_bytes": 3, "sample_bytes": 2, "workers": 0, "eos_token": "x"}
    with pytest.raises(ConfigError) as caught:
        run_prepare(corpus, tmp_path / "out", vocab_size=256, **wrong)
    names = [problem.split(":")[0] for problem in caught.value.problems]
    assert sorted(names) == sorted([*wrong, "vocab_size"])
    with pytest.raises(ConfigError, match="vocab_size: 500 has no effect with tokenizer t"):
        prepare((str(corpus),), str(tmp_path / "out"), vocab_size=500, tokenizer="t")


def test_a_source_that_changes_while_it_is_read_is_an_error(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threshold = planning._threshold

    def change_source_first(*arguments: Any) -> int:
        with corpus.open("ab") as file:
            file.write(b" more")
        return threshold(*arguments)

    monkeypatch.setattr(planning, "_threshold", change_source_first)
    with pytest.raises(DataError, match="a source changed between its first and second reading"):
        run_prepare(corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()
