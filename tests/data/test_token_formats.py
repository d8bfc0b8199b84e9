"""Token files of other programs: Megatron, nanoGPT, OLMo, llm.c; what does not fit is refused in a sentence."""

from __future__ import annotations

import gzip
import shlex
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.token_files import save_llm_c, save_megatron, save_tokens
from tinytrain_dist.data.token_file import load_token_dataset
from tinytrain_dist.data.token_formats import find_layout
from tinytrain_dist.data.token_source import TokenSource
from tinytrain_dist.errors import DataError

IDS = np.random.default_rng(0).integers(0, 50_257, 500).astype(np.uint16)
DOCUMENTS = [IDS[:5], IDS[5:5], IDS[5:140], IDS[140:141], IDS[141:]]


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        TokenSource(str(path), **options)  # type: ignore[arg-type]
    return str(caught.value)


# --- formats -------------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_tokens(tmp_path: Path) -> None:
    (tmp_path / "nanogpt.bin").write_bytes(IDS.tobytes())
    np.memmap(tmp_path / "olmo.npy", np.uint16, "w+", shape=IDS.shape)[:] = IDS  # as OLMo writes its files
    files: dict[Path, str | None] = {
        save_tokens(tmp_path / "numpy.npy", IDS): None,
        save_megatron(tmp_path / "megatron", DOCUMENTS): None,
        save_llm_c(tmp_path / "llm_c.bin", IDS): None,
        save_llm_c(tmp_path / "llama.bin", IDS, 20240801, "<u4"): None,
        tmp_path / "nanogpt.bin": "uint16",
        tmp_path / "olmo.npy": "uint16",
    }
    formats = {}
    for path, token_dtype in files.items():
        source = TokenSource(str(path), vocab_size=50_257, token_dtype=token_dtype)
        assert source.read(0, 500).tolist() == IDS.tolist(), path
        for mmap in (True, False):
            tokens = load_token_dataset(path, mmap, vocab_size=50_257, token_dtype=token_dtype)
            assert isinstance(tokens, np.memmap) is mmap
            assert tokens.tolist() == IDS.tolist(), path
        formats[path.name] = find_layout(path, token_dtype).format
    assert formats == {
        "numpy.npy": "npy",
        "megatron.bin": "Megatron",
        "llm_c.bin": "llm.c",
        "llama.bin": "llm.c",
        "nanogpt.bin": "headerless",
        "olmo.npy": "headerless",
    }


# --- files without a header ----------------------------------------------------------------------------------------


def test_text_and_tables_are_not_taken_for_tokens(tmp_path: Path) -> None:
    text = ("a" + "é" * 4000).encode()  # the 4,096 bytes that are looked at end within a character
    files = {"my notes.jsonl": (text, "text"), "a.jsonl.gz": (gzip.compress(text), "a compressed file")}
    for name, (content, kind) in {**files, "a.parquet": (b"PAR1\x15" + bytes(9), "a Parquet table")}.items():
        path = tmp_path / name
        path.write_bytes(content)
        found = refusal(path)
        assert f"{path}: is {kind} and holds no token IDs; make token files of it with `tinytrain prepare " in found
        assert "uint16" not in found
        assert shlex.quote(str(path)) in found
    (tmp_path / "tokens").write_bytes(IDS.tobytes())
    assert "possible: uint16" in refusal(tmp_path / "tokens")


def test_a_file_without_a_header_is_refused_unless_its_type_is_stated(tmp_path: Path) -> None:
    for name in ("t.bin", "t.npy"):
        (tmp_path / name).write_bytes(IDS.tobytes())
        said = refusal(tmp_path / name, vocab_size=50_257)
        assert "set token_dtype to their type (possible: uint16; not uint32, which gives the id " in said
        assert said.endswith("; if Megatron has written it, restore t.idx beside it") == name.endswith("bin")
        assert "\n" not in said


def test_an_odd_size_cannot_be_a_type(tmp_path: Path) -> None:
    (tmp_path / "t.bin").write_bytes(IDS.tobytes()[:-1])
    for said in (refusal(tmp_path / "t.bin"), refusal(tmp_path / "t.bin", token_dtype="uint16")):
        assert said.count("999") == 1, "one reason for all types"
        assert "perhaps cut short" in said
    (tmp_path / "t.bin").write_bytes(IDS.tobytes()[:-2])
    assert "possible: uint16; not uint32 or int32, because the size of 998 bytes is no multiple of 4" in refusal(
        tmp_path / "t.bin"
    )
    said = refusal(tmp_path / "t.bin", token_dtype="uint32")
    assert "has 998 bytes, which is no multiple of the 4 of token_dtype uint32; set token_dtype to uint16" in said


def test_ids_beyond_the_vocabulary_question_the_stated_type(tmp_path: Path) -> None:
    (tmp_path / "t.bin").write_bytes(IDS.tobytes())
    said = refusal(tmp_path / "t.bin", token_dtype="uint32", vocab_size=50_257)
    assert "but vocab_size 50257 allows 0 .. 50256; correct it, or token_dtype uint32" in said


def test_a_stated_type_never_overrides_a_header(tmp_path: Path) -> None:
    for path in (save_tokens(tmp_path / "a.npy", IDS), save_llm_c(tmp_path / "b.bin", IDS)):
        assert "holds uint16 by its" in refusal(path, token_dtype="int32")
        assert len(TokenSource(str(path), token_dtype="uint16")) == 500


def test_a_stated_type_is_for_the_files_of_a_source_that_have_no_header(tmp_path: Path) -> None:
    save_tokens(tmp_path / "a.npy", IDS, "uint32")
    save_llm_c(tmp_path / "b.bin", IDS)
    with pytest.raises(DataError, match=r"a\.npy: holds uint32 by its npy header, but token_dtype is uint16"):
        TokenSource(str(tmp_path), token_dtype="uint16")
    (tmp_path / "c.bin").write_bytes(IDS.tobytes())
    source = TokenSource(str(tmp_path), token_dtype="uint16")
    assert source.read(0, 1500).tolist() == IDS.tolist() * 3


def test_a_header_of_llm_c_must_fit_the_size(tmp_path: Path) -> None:
    path = save_llm_c(tmp_path / "t.bin", IDS)
    path.write_bytes(path.read_bytes()[:-2])
    assert "has 998 bytes of tokens, but its llm.c header says 500 tokens of 2 bytes" in refusal(path)


def test_an_unknown_version_of_a_header_of_llm_c_is_refused(tmp_path: Path) -> None:
    path = save_llm_c(tmp_path / "t.bin", IDS)
    content = path.read_bytes()
    for version in (0, 2, -1):
        path.write_bytes(content[:4] + struct.pack("<i", version) + content[8:])
        assert f"its llm.c header has version {version}, but only 1 of 20240520 is known here" in refusal(path)
        assert "llm.c header has version" in refusal(path, token_dtype="uint16")
    llama = save_llm_c(tmp_path / "llama.bin", IDS, 20240801, "<u4")
    content = llama.read_bytes()
    llama.write_bytes(content[:4] + struct.pack("<i", 7) + content[8:])
    assert len(TokenSource(str(llama))) == 500


# --- Megatron's index ----------------------------------------------------------------------------------------------


def test_documents_come_from_the_index(tmp_path: Path) -> None:
    source = TokenSource(str(save_megatron(tmp_path / "m", DOCUMENTS)))
    assert source.open_documents()
    assert source.document_starts(0, 500).tolist() == [0, 5, 140, 141]  # the empty document begins nowhere
    assert source.document_starts(6, 200).tolist() == [134, 135]
    assert source.document_starts(490, 20).tolist() == [10, 15]  # the first token follows the last


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    path = save_megatron(tmp_path / "m", DOCUMENTS)
    index = path.with_suffix(".idx")
    content = index.read_bytes()[: -6 * 8]
    index.write_bytes(
        content[:18] + struct.pack("<QQ", 5, 4) + content[34:] + np.array([0, 2, 4, 5]).astype("<i8").tobytes()
    )
    source = TokenSource(str(path))
    assert source.open_documents()
    assert source.document_starts(0, 500).tolist() == [0, 5, 141]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda index: index[:-9], r"m\.idx: has \d+ bytes, but \d+ by its header"),
        (lambda index: b"MMIDIDX\0\0\2" + index[10:], "has version 2 of Megatron's format"),
        (
            lambda index: index[:17] + b"\6" + index[18:],
            r"the type code 6 \(float64\), but token IDs have one of these",
        ),
        (
            lambda index: index[:17] + b"\x63" + index[18:],
            r"type code 99 \(unknown\), .* 1 uint8, .* 8 uint16;",
        ),
        (lambda index: index[:17] + b"\4" + index[18:], r"tokens lie in several pieces \(sequence 1 begins at byte 10"),
        (lambda index: index[:34] + b"\4" + index[35:], "tokens lie in several pieces"),
        (lambda index: index[:-8] + b"\4" + index[-7:], "its document index ends with sequence 4 of 5"),
        (lambda index: index[:-16] + b"\1" + index[-15:], "its document index does not ascend from 0"),
        (lambda index: b"x,y\n", r"is no Megatron index \(it begins with b'x,y"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, change, expected: str) -> None:  # type: ignore[no-untyped-def]
    path = save_megatron(tmp_path / "m", DOCUMENTS)
    index = path.with_suffix(".idx")
    index.write_bytes(change(index.read_bytes()))
    with pytest.raises(DataError, match=expected):
        TokenSource(str(path))


def test_tokens_in_several_pieces_and_a_bin_file_of_another_size_are_refused(tmp_path: Path) -> None:
    path = save_megatron(tmp_path / "m", DOCUMENTS, shift=2)
    assert "its tokens lie in several pieces (sequence 0 begins at byte 2" in refusal(path)
    path = save_megatron(tmp_path / "m", DOCUMENTS)
    path.write_bytes(path.read_bytes()[:-2])
    assert "does not fit its .bin file, which has 998 bytes, but 1,000 by the index" in refusal(path)
    assert "give the .bin file beside it" in refusal(path.with_suffix(".idx"))
