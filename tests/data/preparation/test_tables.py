"""Tables give the same documents as JSON lines; a table that cannot be read is named with its row or row group."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.prepared_text import all_documents, content, run_prepare
from tests.helpers.tables import ROWS, pa, parquet, save_with_datasets, write_arrow, write_json_lines, write_parquet
from tinytrain_dist.data.preparation import table_documents
from tinytrain_dist.data.preparation.prepare import prepare
from tinytrain_dist.errors import DataError

TOKEN_FILES = ["train.npy", "train.documents.npy", "val.npy", "val.documents.npy", "tokenizer.json"]


def tokens(folder: Path) -> dict[str, bytes]:
    """The files of a data set whose bytes do not name the sources."""
    return {name: data for name, data in content(folder).items() if name in TOKEN_FILES}


def test_every_kind_of_table_gives_the_tokens_of_the_same_json_lines(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    settings: dict[str, Any] = {"max_document_bytes": 5000, "filter": ("language == en", "meta.n < 100")}
    run_prepare(write_json_lines(tmp_path / "a.jsonl"), tmp_path / "lines", **settings)
    kept = [row["text"] for row in ROWS if row["language"] == "en" and row["id"] < 100]
    assert all_documents(tmp_path / "lines") == sorted(kept)
    write_parquet(tmp_path / "a.parquet")
    write_arrow(tmp_path / "file.arrow")
    write_arrow(tmp_path / "stream.arrow", stream=True)
    save_with_datasets(tmp_path / "set")
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "dict"))
    (tmp_path / "set" / "cache-1.arrow").write_bytes(b"left by Dataset.map")
    for name in ("a.parquet", "file.arrow", "stream.arrow", "set", "dict"):
        run_prepare(tmp_path / name, tmp_path / f"{name}.out", **settings)
        assert tokens(tmp_path / f"{name}.out") == tokens(tmp_path / "lines"), name
    meta = json.loads((tmp_path / "set.out" / "meta.json").read_text())
    assert meta["sources"][0]["files"] == 3
    assert meta["sources"][0]["sha256_of"] == "documents"


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary"])
def test_every_type_of_text_is_read(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_documents, "_BATCH_BYTES", 1000)  # several parts of each row group
    table = pa.table({"text": [row["text"] for row in ROWS]})
    column = table["text"].dictionary_encode() if kind == "dictionary" else table["text"].cast(getattr(pa, kind)())
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    run_prepare(tmp_path / "a.parquet", tmp_path / "out", max_document_bytes=5000)
    assert all_documents(tmp_path / "out") == sorted(row["text"] for row in ROWS)


def test_a_nested_column_holds_the_text(tmp_path: Path) -> None:
    rows = [{"message": {"body": row["text"]}} for row in ROWS]
    for path in (write_json_lines(tmp_path / "a.jsonl", rows), write_parquet(tmp_path / "a.parquet", rows)):
        run_prepare(path, tmp_path / path.suffix, text_field="message.body", max_document_bytes=5000)
        assert all_documents(tmp_path / path.suffix) == sorted(row["text"] for row in ROWS)


def cut_short(write: Callable[..., Path], **options: Any) -> Callable[[Path], Path]:
    def write_and_cut(path: Path) -> Path:
        data = write(path, **options).read_bytes()
        path.write_bytes(data[: len(data) * 2 // 3])
        return path

    return write_and_cut


def with_text(*texts: Any) -> Callable[[Path], Path]:
    return lambda path: write_parquet(path, [{"text": text, "n": 1} for text in texts], row_group_size=2)


BAD_TABLES: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "cut short": (cut_short(write_parquet), {}, "the file cannot be read, because the file is damaged or cut short"),
    "arrow cut short": (cut_short(write_arrow), {}, "the file is damaged or cut short"),
    "stream cut short": (cut_short(write_arrow, stream=True), {}, r"batch \d+ cannot be read, because the file is dam"),
    "no column": (
        with_text("a"),
        {"text_field": "body"},
        r"has no column 'body' \(text: string, n: int64\); set --text",
    ),
    "no text": (with_text("a"), {"text_field": "n"}, r"has int64 and not text in the column 'n' .*; set --text-field"),
    "null": (with_text("a", "b", None), {}, r"row group 2, row 1 has no text in the column 'text' \(it is null\)"),
    "no filter": (with_text("a"), {"filter": ("x > 1",)}, "has no column 'x', which --filter 'x > 1' needs"),
    "bad filter": (
        with_text("a"),
        {"filter": ("n == en",)},
        "--filter 'n == en': the field is a number, and 'en' is n",
    ),
    "nothing kept": (with_text("a"), {"filter": ("n > 1",)}, "--filter and --ids keep no document of 1 files"),
}


@pytest.mark.parametrize("what", BAD_TABLES)
def test_a_table_that_cannot_be_used_is_named_and_nothing_is_written(tmp_path: Path, what: str) -> None:
    write, settings, message = BAD_TABLES[what]
    path = write(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a\.parquet: .*{message}|^no text: {message}"):
        run_prepare(path, tmp_path / "out", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_files_with_other_columns_are_all_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    write_parquet(tmp_path / "b.parquet", [{"body": "x"}])
    write_parquet(tmp_path / "c.parquet", [{"text": 3}])
    with pytest.raises(DataError) as caught:
        run_prepare(tmp_path, tmp_path / "out")
    assert "b.parquet: has no column 'text' (body: string)" in str(caught.value)
    assert "c.parquet: has int64 and not text in the column 'text'" in str(caught.value)
    assert "--format text" not in str(caught.value)


def test_the_splits_of_a_dataset_dict_must_be_chosen(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=part, test=part).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match=r"is a DatasetDict with the splits train, test; give .* such as \S+/d/train"):
        run_prepare(tmp_path / "d", tmp_path / "out")
    state = json.loads((tmp_path / "d" / "train" / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (tmp_path / "d" / "train" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"saved it with an index of its rows.*flatten_indices"):
        run_prepare(tmp_path / "d" / "train", tmp_path / "out")


def test_a_missing_library_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"not installed; pip install 'tinytrain_dist\[parquet\]'"):
        run_prepare(tmp_path / "a.parquet", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(DataError, match=r"s3://b/a: needs .* not installed; pip install 'tinytrain_dist\[s3\]'"):
        prepare("s3://b/a", str(tmp_path / "out"))
