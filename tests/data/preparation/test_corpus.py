"""Check how files become documents: finding sources, decompressing, decoding, separating and cutting."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.prepared_text import all_documents, run_prepare, story, zstandard
from tinytrain_dist.data.preparation.sources import find_sources
from tinytrain_dist.data.preparation.text_documents import SEPARATOR, cut
from tinytrain_dist.errors import DataError

# --- sources ---------------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_text_files_and_reports_how_many_it_skips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / ".git").mkdir()
    for name in ("b.txt", "deep/a.PY", ".git/c.txt", ".hidden.txt", "deep/d.txt.gz", "x.png", "y.png", "README"):
        (tmp_path / "in" / name).write_bytes(gzip.compress(b"z") if name.endswith("gz") else name.encode())
    run_prepare(tmp_path / "in", tmp_path / "out")
    assert all_documents(tmp_path / "out") == sorted(["b.txt", "deep/a.PY", "z"])
    assert (
        "skipped 3 files that are not .txt, .md, .py, .jsonl, .parquet, .arrow (2 .png, 1 README)"
        in capsys.readouterr().err
    )
    run_prepare(
        (str(tmp_path / "in"), str(tmp_path / "in" / "README"), str(tmp_path / "in" / "b.txt")), tmp_path / "more"
    )
    assert all_documents(tmp_path / "more") == sorted(["README", "b.txt", "deep/a.PY", "z"])
    assert "1 of 1 files were already given" in capsys.readouterr().err


def test_the_standard_library_is_read_without_tests_and_files_about_the_machine() -> None:
    (source,) = find_sources(["stdlib"], print)
    root = sysconfig.get_paths()["stdlib"]
    names = [os.path.relpath(path, root).split(os.sep) for path in source.files]
    assert ["os.py"] in names
    assert ["json", "decoder.py"] in names
    assert len(names) > 300
    assert not {"test", "tests", "idle_test", "site-packages", "__pycache__"} & {
        part for name in names for part in name
    }
    assert not [name for name in names if name[-1].startswith("_sysconfigdata")]


BAD_SOURCES: list[tuple[tuple[str, ...], str]] = [
    ((), "no source was given"),
    (("missing.txt",), r"missing\.txt: there is no such file or folder"),
    (("nothing://example.org/a.txt",), "the protocol 'nothing' is not known"),
    (("*.nope",), r"\*\.nope: no file matches this glob"),
    (("empty",), r"empty: the folder contains no \.txt, \.md, \.py, \.jsonl, \.parquet, \.arrow file"),
    (("dangling.txt",), r"dangling\.txt: cannot be read \(No such file"),
    (("pipe.txt",), r"pipe\.txt: is not a regular file"),
]


@pytest.mark.parametrize(("sources", "message"), BAD_SOURCES)
def test_a_source_that_cannot_be_read_is_an_error_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("dangling.txt").symlink_to("nowhere")
    os.mkfifo("pipe.txt")
    with pytest.raises(DataError, match=message):
        run_prepare(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- compressed files ------------------------------------------------------------------------------------------------


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_compressed_files_are_read_like_plain_files(tmp_path: Path, kind: str, suffix: str) -> None:
    texts = [story(seed) for seed in range(40)]
    plain = "<|endoftext|>".join(texts) if kind == "txt" else "\n".join(json.dumps({"body": text}) for text in texts)
    data = plain.encode()
    halves = data[: len(data) // 2], data[len(data) // 2 :]
    compress = COMPRESS.get(suffix, bytes)
    path = tmp_path / f"a.{kind}{suffix}"
    path.write_bytes(b"".join(map(compress, halves)))  # two members, as `cat a.gz b.gz` makes them
    run_prepare(path, tmp_path / "out", text_field="body")
    assert all_documents(tmp_path / "out") == sorted(texts)


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("how", ["cut short", "damaged"])
def test_a_damaged_compressed_file_is_named(tmp_path: Path, suffix: str, how: str) -> None:
    data = COMPRESS[suffix](b"".join(story(seed).encode() for seed in range(500)))
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(data[: len(data) // 2] if how == "cut short" else b"\0\0\0\0" + data)
    with pytest.raises(DataError, match=rf"a\.txt\{suffix}: the compressed data is damaged or cut short"):
        run_prepare(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- documents -------------------------------------------------------------------------------------------------------


def test_without_separators_a_document_is_a_file_or_a_line(tmp_path: Path) -> None:
    for index in range(6):
        (tmp_path / f"{index}.md").write_bytes(f"\ufeffone {index}\r\n\r\ntwo {index}\n".encode())
    run_prepare(tmp_path, tmp_path / "files")
    assert all_documents(tmp_path / "files") == sorted(f"one {i}\r\n\r\ntwo {i}\n" for i in range(6))
    run_prepare(tmp_path / "*.md", tmp_path / "lines", split_by="line")
    assert all_documents(tmp_path / "lines") == sorted([f"one {i}" for i in range(6)] + [f"two {i}" for i in range(6)])


def test_separators_are_removed_and_line_ends_within_documents_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"<|endoftext|>a\n\nb\n<|endoftext|>\n\n<|endoftext|> c<|endoftext|>\n")
    (tmp_path / "b.jsonl").write_text('{"text": "d<|endoftext|>e\\n"}\n\n{"text": ""}\n')
    run_prepare((str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")), tmp_path / "out")
    assert all_documents(tmp_path / "out") == sorted(["a\n\nb", " c", "d", "e\n"])


@settings(deadline=None, max_examples=300)
@given(
    text=st.lists(st.sampled_from(["a", "b", "\n", "é", "北", "😀", "<|", "endoftext|>", "<|endoftext|>"]))
    .map("".join)
    .map(str.encode),
    limit=st.integers(4, 40),
    block=st.integers(1, 50),
)
def test_cutting_keeps_every_byte_and_does_not_depend_on_the_blocks(text: bytes, limit: int, block: int) -> None:
    blocks = [text[start : start + block] for start in range(0, len(text), block)]
    pieces = list(cut(blocks, SEPARATOR, limit))
    assert b"".join(piece + SEPARATOR * ended for _, piece, ended in pieces) == text
    assert all(text[offset : offset + len(piece)] == piece for offset, piece, _ in pieces)
    assert all(len(piece) <= limit and SEPARATOR not in piece and piece.decode() is not None for _, piece, _ in pieces)
    assert pieces == list(cut([text], SEPARATOR, limit))


def test_a_long_text_is_cut_at_line_ends(tmp_path: Path) -> None:
    lines = [f"{index} {story(index, 12)}\n" for index in range(2000)]
    (tmp_path / "book.txt").write_bytes("".join(lines).encode())
    meta = run_prepare(tmp_path / "book.txt", tmp_path / "out")
    documents = all_documents(tmp_path / "out")
    assert meta["max_document_bytes"] == 4096
    assert len(documents) > 20
    assert all(len(document.encode()) <= 4096 and document.endswith("\n") for document in documents)
    assert sorted(line for document in documents for line in document.splitlines(keepends=True)) == sorted(
        "".join(lines).splitlines(keepends=True)
    )


# --- text that cannot be used ----------------------------------------------------------------------------------------


BAD_TEXT: list[tuple[str, bytes, str]] = [
    ("a.txt", b"", r"no text: 1 files with 0 bytes"),
    ("a.txt", b" \n\t\n", r"no text: 1 files with 4 bytes"),
    ("a.txt", b"one document", r"all of the text is one document of 12 bytes"),
    ("a.txt", b"x" * 200_000 + b"\xe9t\xe9", r"a\.txt: byte 0xe9 at offset 200000 is not UTF-8.*--errors replace"),
    ("a.txt", b"a<|endoftext|>\xff", r"a\.txt: byte 0xff at offset 14 is not UTF-8"),
    ("a.txt.gz", gzip.compress(b"ab\xff"), r"byte 0xff at offset 2 of the decompressed text"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl: byte 0xff at offset 24 is not UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n\n{"text" "b"}\n', r"a\.jsonl: line 3 is not JSON.*one JSON object on every line"),
    (
        "a.jsonl",
        b'{"text": "a"}\n{"body": 3}\n',
        r"line 2 has no string in the field 'text' \(the line has body: int\); set --text-field",
    ),
    ("a.jsonl", b'{"text": null}\n', r"line 1 has no string in the field 'text' \(the line has text: NoneType\)"),
    ("a.jsonl", b"[1]\n", r"line 1 has no string in the field 'text' \(the line is of type list, not an object\)"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: character 0 of field 'text' is half a surrogate pair"),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD_TEXT)
def test_text_that_cannot_be_used_is_an_error_and_nothing_is_written(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        run_prepare(tmp_path / name, tmp_path / "out", max_document_bytes=1000)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_line_that_is_too_long_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinytrain_dist.data.preparation.text_documents._JSON_LINE_BYTES", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + json.dumps({"text": "b" * 1000}) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl: line 2 is longer than 1,000 bytes"):
        run_prepare(tmp_path / "a.jsonl", tmp_path / "out")


def test_with_errors_replace_bytes_that_are_not_utf8_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 <|endoftext|>\xffb")
    (tmp_path / "b.jsonl").write_text('{"text": "x\\ud800y"}\n')
    run_prepare((str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")), tmp_path / "out", errors="replace")
    assert all_documents(tmp_path / "out") == sorted(["caf\ufffd ", "\ufffdb", "x\ufffdy"])
