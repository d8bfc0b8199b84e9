"""Check which files `tinytrain prepare` reads as text, by their content, and which it refuses."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import random
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("tiktoken")
zstandard = pytest.importorskip("zstandard")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tinytrain_dist.data.preparation.content_type import NotTextError, text_format  # noqa: E402
from tinytrain_dist.data.preparation.corpus import Corpus  # noqa: E402
from tinytrain_dist.data.preparation.prepare import prepare  # noqa: E402
from tinytrain_dist.data.preparation.recognition import recognise  # noqa: E402
from tinytrain_dist.data.preparation.sources import find_sources  # noqa: E402
from tinytrain_dist.data.preparation.text_documents import Reading  # noqa: E402
from tinytrain_dist.errors import DataError  # noqa: E402

STORIES = [f"story {n}: the wolf ran home again" for n in range(40)]
JSON_LINES = "".join(json.dumps({"text": story, "id": 3}) + "\n" for story in STORIES).encode()
PLAIN = "\n".join(STORIES).encode()
PRETTY = json.dumps({"text": "a", "data": [1, 2]}, indent=2).encode()


def documents(*paths: Path, **settings: Any) -> list[bytes]:
    """The documents of some files as the command reads them."""
    reading = Reading(
        **{"text_field": "text", "split_by": "file", "errors": "strict", **settings}, max_document_bytes=10**6
    )
    sources = find_sources(map(str, paths), print)
    corpus = Corpus(sources, reading, recognise(sources, reading, print))
    return list(corpus.documents("reading"))


def complaint(*paths: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        documents(*paths, **settings)
    return str(caught.value)


def written(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


@pytest.mark.parametrize("name", ["a.json", "a.txt", "a.md", "a.ndjson", "a", "a.json.gz"])
def test_json_lines_are_read_as_such_whatever_their_name(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, name, gzip.compress(JSON_LINES) if name.endswith("gz") else JSON_LINES)
    assert documents(path) == [story.encode() for story in STORIES]
    said = f"{path}: read as JSON lines, the text from the field 'text' (--format text takes"
    assert (said in capsys.readouterr().out) == (name != "a.ndjson")
    assert documents(path, format="text") == [JSON_LINES]
    assert len(documents(path, text_field="absent", format="text")) == 1


def test_the_first_json_line_may_be_longer_than_what_is_looked_at(tmp_path: Path) -> None:
    long = "word " * 50_000
    path = written(tmp_path, "a.json", json.dumps({"text": long}).encode() + b"\n" + JSON_LINES)
    assert documents(path) == [long.encode(), *(story.encode() for story in STORIES)]
    path = written(tmp_path, "b.json", json.dumps({"data": [long]}).encode())
    assert "has no string in the field 'text'" in complaint(path)


OTHER_JSON = {
    "no such field": (b'{"body": "a"}\n{"body": "b"}\n', "JSON with the fields body: str; set --text-field"),
    "array": (json.dumps([{"text": story} for story in STORIES]).encode(), "a JSON array; write its"),
    "array over lines": (b'[\n {"text": "a"},\n {"text": "b"}\n]\n', "a JSON array"),
    "array of texts": (json.dumps(STORIES).encode(), "a JSON array"),
    "long array": (json.dumps([{"text": "word " * 50_000}] * 2).encode(), "a JSON array"),
    "one object": (PRETTY, "JSON, but not one object on every line"),
    "objects over lines": (PRETTY + b"\n" + PRETTY, "JSON, but not one object on every line"),
    "long object": (json.dumps({"text": "a", "data": ["word"] * 50_000}, indent=1).encode(), "JSON, but not one"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["a.json", "a.txt"])
@pytest.mark.parametrize("kind", OTHER_JSON)
def test_other_json_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    data, what = OTHER_JSON[kind]
    message = complaint(written(tmp_path, name, data))
    assert f"{tmp_path / name}: looks like {what}" in message
    assert "pass --format text" in message
    assert documents(tmp_path / name, format="text") == [data]


def test_a_json_name_without_json_is_refused(tmp_path: Path) -> None:
    assert "named .json, but not one JSON object on every line" in complaint(written(tmp_path, "a.json", PLAIN))
    assert documents(tmp_path / "a.json", format="text") == [PLAIN]


TEXTS = {
    "markdown": b"[![badge](x.svg)](y) and [[wiki]]\n\n<!-- note -->\n# Title\n",
    "numbers": b"[1] Somebody, A.: A book.\n[2] Another.\n",
    "an example": b'{"a": 1}\nis an object, and this is a text about it.\n',
    "braces": b"{\\displaystyle x} is a formula",
    "a quotation": b'"Hello," she said.\n"Bye," he said.\n',
    "html in a text": b"The tag <html> begins a page, <!doctype html> before it.\n",
    "byte-order mark": b"\xef\xbb\xbftext",
    "terminal colours": b"\x1b[31mred\x1b[0m\x0cpage\x1a",
    "an archive of 1985": b"PAR1 is no Parquet, ORC no ORC, MZ no program, ID3 no song, BZh no bzip2, RIFF",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_text_that_begins_like_something_else_is_text(tmp_path: Path, kind: str) -> None:
    assert documents(written(tmp_path, "a.txt", TEXTS[kind])) == [TEXTS[kind].removeprefix(b"\xef\xbb\xbf")]


def test_python_is_text_whatever_it_begins_with(tmp_path: Path) -> None:
    manifest = b'{"name": "an add-on", "text": "a"}\n'
    assert documents(written(tmp_path, "manifest.py", manifest)) == [manifest]


def tar_of(folder: Path) -> bytes:
    (folder / "inside").write_bytes(PLAIN)
    with tarfile.open(folder / "t", "w") as archive:
        archive.add(folder / "inside", "inside")
    return (folder / "t").read_bytes()


WORDS = " ".join(STORIES)
NOT_TEXT = {
    "pdf": (b"%PDF-1.7\n1 0 obj\n", "a PDF; extract its text first"),
    "html": (b"\n<!-- saved -->\n<!DOCTYPE html>\n<p>text", "HTML"),
    "html in capitals": (b"\xef\xbb\xbf<HTML lang=en><p>text", "HTML"),
    "xml": (b'<?xml version="1.0"?>\n<a/>', "XML"),
    "compressed parquet": (
        gzip.compress(b"PAR1\x15\x04" + b"x" * 80),
        "a compressed Parquet file; decompress it first",
    ),
    "zip": (b"PK\x03\x04\x14\0\0\0", "a ZIP archive"),
    "office": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(90), "an old Office document"),
    "rtf": (b"{\\rtf1\\ansi text}", "an RTF document"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer and not the file"),
    "numpy": (b"\x93NUMPY\x01\0v\0{'descr': '<u2'}", "a NumPy file; give token files to training"),
    "nul byte": (b"some text\0and more", "binary: it has a NUL byte at offset 9"),
    "controls": (b"text\x01\x02\x03\x04" * 9, "binary: 50% of its bytes are control characters"),
    "utf-16 with mark": (WORDS.encode("utf-16"), "text in UTF-16; convert it: iconv -f UTF-16 -t UTF-8"),
    "utf-16 big-endian": (WORDS.encode("utf-16-be"), "text in UTF-16BE; convert it: iconv -f UTF-16BE"),
    "utf-16 little-endian": (WORDS.encode("utf-16-le"), "text in UTF-16LE"),
    "utf-32 with mark": (WORDS.encode("utf-32"), "text in UTF-32"),
    "utf-32 big-endian": (WORDS.encode("utf-32-be"), "text in UTF-32BE"),
    "utf-32 little-endian": (WORDS.encode("utf-32-le"), "text in UTF-32LE"),
    "compressed twice": (gzip.compress(gzip.compress(PLAIN)), "still compressed (gzip)"),
    "html, compressed": (gzip.compress(b"<!doctype html><p>text"), "HTML"),
}


@pytest.mark.parametrize("errors", ["strict", "replace"])
@pytest.mark.parametrize("kind", NOT_TEXT)
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, kind: str, errors: str) -> None:
    data, what = NOT_TEXT[kind]
    message = complaint(written(tmp_path, "a.txt", data), errors=errors)
    assert f"{tmp_path / 'a.txt'}: looks like {what}" in message
    assert "to take such files as text anyway, syntax included, pass --format text" in message
    assert documents(tmp_path / "a.txt", errors="replace", format="text"), "the advice, followed to the letter"


def test_an_archive_in_a_compressed_file_is_refused(tmp_path: Path) -> None:
    assert "looks like a TAR archive" in complaint(written(tmp_path, "a.tar.gz", gzip.compress(tar_of(tmp_path))))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz", "a.html", "a.xml"])
def test_names_of_tables_and_markup_are_refused(tmp_path: Path, name: str) -> None:
    data = b"title,text\n1,a\n"
    assert "looks like" in complaint(written(tmp_path, name, gzip.compress(data) if name.endswith("gz") else data))


def test_a_nul_byte_anywhere_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", b"line\n" * 100_000 + b"\0")
    assert "it has a NUL byte at offset 500000" in complaint(path)
    assert documents(path, format="text")


def test_replacing_damaged_bytes_does_not_take_another_encoding(tmp_path: Path) -> None:
    french, russian = "un été à la forêt " * 50, "волк бежал домой " * 50
    latin = written(tmp_path, "a.txt", french.encode("latin-1"))
    assert "byte 0xe9 at offset 3 is not UTF-8" in complaint(latin)
    assert documents(latin, errors="replace")
    message = complaint(written(tmp_path, "b.txt", russian.encode("cp1251")), errors="replace")
    assert "in another encoding or binary: " in message
    assert "convert it from its encoding" in message
    noise = random.Random(0).randbytes(5000).replace(b"\0", b"")
    assert "looks like" in complaint(written(tmp_path, "c.txt", noise), errors="replace")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "b.bin"])
@pytest.mark.parametrize("packed", ["gzip", "bz2", "xz", "zstd"])
def test_the_first_bytes_say_how_a_file_is_compressed(tmp_path: Path, name: str, packed: str) -> None:
    pack = {"gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zstd": zstandard.compress}[packed]
    data = JSON_LINES if name.endswith("jsonl") else b"<|endoftext|>".join(story.encode() for story in STORIES)
    assert documents(written(tmp_path, name, pack(data))) == [story.encode() for story in STORIES]


@pytest.mark.parametrize("how", ["cut short", "damaged", "something else"])
def test_a_damaged_bzip2_file_is_named(tmp_path: Path, how: str) -> None:
    data = bz2.compress(random.Random(0).randbytes(20_000))
    broken = {"cut short": data[:-100], "damaged": data[:9000] + bytes(100) + data[9100:], "something else": PLAIN}
    assert "the compressed data is damaged or cut short" in complaint(written(tmp_path, "a.txt.bz2", broken[how]))


def test_zstd_without_its_package_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "a.txt", zstandard.compress(PLAIN))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "is compressed with zstd, and the package that reads it is missing; pip install zstandard" in complaint(path)


def test_all_files_that_are_no_text_are_named_at_once(tmp_path: Path) -> None:
    written(tmp_path, "good.txt", PLAIN)
    for number in range(12):
        written(tmp_path, f"{number:02}.txt", b"%PDF-1.7")
    message = complaint(tmp_path)
    assert message.count("looks like a PDF") == 10
    assert "and 2 more files" in message
    assert "good.txt" not in message


@given(st.binary(max_size=400) | st.text(max_size=200).map(str.encode), st.booleans(), st.sampled_from(["", ".json"]))
def test_any_bytes_are_something(head: bytes, whole: bool, suffix: str) -> None:
    for errors in ("strict", "replace"):
        with contextlib.suppress(NotTextError):
            assert text_format(head, whole, suffix, "text", errors) in ("text", "jsonl")


def test_the_command_refuses_and_the_flag_that_it_names_works(tmp_path: Path) -> None:
    pages = [written(tmp_path, f"{n}.txt", f"<html><p>{story}".encode()) for n, story in enumerate(STORIES)]
    command = [sys.executable, "-m", "tinytrain_dist", "prepare", *map(str, pages), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--workers", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "looks like HTML" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    subprocess.run([*command, "--workers", "1", "--format", "text", "--vocab-size", "300"], check=True)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["train_documents"] + meta["val_documents"] == len(STORIES)


def test_documents_in_a_json_file_are_counted_one_by_one(tmp_path: Path) -> None:
    path = written(tmp_path, "a.json", JSON_LINES)
    meta = prepare((str(path),), str(tmp_path / "out"), vocab_size=300, workers=1)
    assert meta["train_documents"] + meta["val_documents"] == len(STORIES)
