"""Checks `tinytrain prepare`: what comes out, that it is the same every time, and what a user's mistake looks like."""

import errno
import gzip
import hashlib
import json
import lzma
import os
import random
import resource
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinytrain_dist

pytest.importorskip("tokenizers")
pytest.importorskip("tiktoken")
zstandard = pytest.importorskip("zstandard")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers  # noqa: E402

from tinytrain_dist.cli.prepare import main  # noqa: E402
from tinytrain_dist.data.preparation import prepare as preparation  # noqa: E402
from tinytrain_dist.data.preparation import token_writer  # noqa: E402
from tinytrain_dist.data.preparation.corpus import (  # noqa: E402
    SEPARATOR,
    cut,
    find_sources,
)
from tinytrain_dist.data.preparation.prepare import prepare  # noqa: E402
from tinytrain_dist.data.preparation.tokenizer import (  # noqa: E402
    Encoder,
    Vocabulary,
    byte_of_character,
    load_vocabulary,
    train_bpe,
    why_not_fast,
)
from tinytrain_dist.errors import (  # noqa: E402
    ConfigError,
    DataError,
)

WORDS = "the of and to in that it was his he model token wolf naïve straße 北京 run(x): return x+1\n \n".split(" ")


def story(seed: int, words: int = 60) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words)).strip()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A file of 120 stories, separated as in TinyStories."""
    path = tmp_path / "stories.txt"
    path.write_bytes("\n<|endoftext|>\n".join(story(seed) for seed in range(120)).encode())
    return path


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return train_bpe((story(seed, 500) for seed in range(20)), 600)


def run(sources: Any, out: Path, **given_settings: Any) -> dict[str, Any]:
    tokenizer = given_settings.get("tokenizer")
    return prepare(
        sources if isinstance(sources, tuple) else (str(sources),),
        str(out),
        **({"vocab_size": 320} if tokenizer is None else {}) | {"workers": 1} | given_settings,
    )


def documents_of(folder: Path, side: str) -> list[str]:
    """Decode a token file back into its documents."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    meta = json.loads((folder / "meta.json").read_text())
    ids = np.load(folder / f"{side}.npy")
    assert ids[-1] == meta["eos_id"]
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, np.where(ids == meta["eos_id"])[0] + 1)[:-1]]


def all_documents(folder: Path) -> list[str]:
    return sorted(documents_of(folder, "train") + documents_of(folder, "val"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_document_comes_back_whole_on_one_side_and_the_files_are_what_meta_says(
    corpus: Path, tmp_path: Path
) -> None:
    meta = run(corpus, tmp_path / "out")
    texts = [story(seed) for seed in range(120)]
    assert all_documents(tmp_path / "out") == sorted(texts)
    assert meta == json.loads((tmp_path / "out" / "meta.json").read_text())
    for side in ("train", "val"):
        documents, ids = documents_of(tmp_path / "out", side), np.load(tmp_path / "out" / f"{side}.npy")
        assert ids.dtype == np.uint16
        assert ids.ndim == 1
        assert meta[f"{side}_tokens"] == len(ids)
        assert meta[f"{side}_documents"] == len(documents) > 0
        assert meta[f"{side}_bytes"] == sum(len(document.encode()) for document in documents)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in content(tmp_path / "out").items()}
    assert meta["digests"] == {name: digests[name] for name in ("train.npy", "val.npy", "tokenizer.json")}
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


@pytest.mark.multiprocess
def test_any_number_of_workers_gives_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_writer, "_BATCH_BYTES", 500)  # many more batches than workers
    results = []
    for workers in (1, 2, 3):
        run(corpus, tmp_path / str(workers), workers=workers)
        results.append(content(tmp_path / str(workers)))
    assert results[0] == results[1] == results[2]


def test_a_second_run_gives_the_same_bytes_whatever_the_order_of_hashing(corpus: Path, tmp_path: Path) -> None:
    code = "import sys; from tinytrain_dist.cli.prepare import main; sys.exit(main(sys.argv[1:]))"
    root = Path(tinytrain_dist.__file__).parents[1]
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(root), "RAYON_NUM_THREADS": seed}
        arguments = [str(corpus), "--out", seed, "--vocab-size", "320", "--workers", "1"]
        subprocess.run([sys.executable, "-c", code, *arguments], env=environment, cwd=tmp_path, check=True)
    assert content(tmp_path / "1") == content(tmp_path / "2")


@settings(deadline=None, max_examples=300)
@given(text=st.text() | st.text(alphabet=" \t\n\r\u3000\u0085'sdtlvem1aé北\u0301<|>") | st.integers(0, 99).map(story))
def test_tiktoken_and_tokenizers_give_the_same_ids(vocabulary: Vocabulary, text: str) -> None:
    encoder = Encoder(vocabulary, use_fast=True)
    assert encoder.fast is not None
    ids = encoder.encode(text)
    assert ids.tolist() == encoder.encode_slow(text).tolist()
    assert encoder.slow.decode(ids.tolist(), skip_special_tokens=False) == text


def test_text_that_makes_tiktoken_give_up_is_encoded_by_tokenizers(vocabulary: Vocabulary) -> None:
    class PanicException(BaseException):
        """What a panic in Rust arrives as."""

    class Panics:
        def encode_to_numpy(self, text: str, disallowed_special: Any) -> Any:
            raise PanicException(text)

    encoder = Encoder(vocabulary, use_fast=True)
    expected = encoder.encode("the wolf").tolist()
    encoder.fast = Panics()  # type: ignore[assignment]
    assert encoder.encode("the wolf").tolist() == expected


def byte_level(words: list[str], merges: list[tuple[str, str]]) -> Tokenizer:
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_more_than_65536_ids_are_written_as_uint32(corpus: Path, tmp_path: Path) -> None:
    letters = sorted(byte_of_character())
    pairs = [(a, b) for a in letters for b in letters]
    tokenizer = byte_level([*letters, *(a + b for a, b in pairs)], pairs)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "big.json"))
    meta = run(corpus, tmp_path / "out", tokenizer=str(tmp_path / "big.json"))
    assert meta["vocab_size"] == 256 + 65536 + 1
    assert meta["dtype"] == "uint32"
    assert np.load(tmp_path / "out" / "train.npy").dtype == np.uint32
    assert np.load(tmp_path / "out" / "train.npy").max() == meta["eos_id"] == 65792
    assert all_documents(tmp_path / "out") == sorted(story(seed) for seed in range(120))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "big.json").read_bytes()


def test_a_tokenizer_that_tiktoken_cannot_take_is_used_anyway_with_a_message(
    corpus: Path, tmp_path: Path, vocabulary: Vocabulary, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer.from_str(vocabulary.text)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(tmp_path / "lower.json"))
    run(corpus, tmp_path / "out", tokenizer=str(tmp_path / "lower.json"))
    assert "encoding with tokenizers: tiktoken, which" in (said := capsys.readouterr().err)
    assert "it normalizes text" in said
    assert all_documents(tmp_path / "out") == sorted(story(seed).lower() for seed in range(120))


def test_different_ids_on_the_sample_are_a_reason_against_tiktoken(vocabulary: Vocabulary) -> None:
    letters = sorted(byte_of_character())
    # "abc" is merged through "bc" only: tokenizers has no rule for "ab" + "c", tiktoken needs none.
    gap = byte_level([*letters, "ab", "bc", "abc"], [("a", "b"), ("b", "c"), ("a", "bc")])
    gap.add_special_tokens(["<|endoftext|>"])
    described = Vocabulary(gap.to_str(), 260, "<|endoftext|>", 259, "byte-level BPE", "\\S+|\\s+")
    assert why_not_fast(vocabulary, ["abc", story(1)]) is None
    assert why_not_fast(described, []) is None
    assert "differ" in str(why_not_fast(described, ["xabc"]))
    gap.add_tokens(["wolf"])
    changed = Vocabulary(gap.to_str(), 261, "<|endoftext|>", 259, "byte-level BPE", "\\S+|\\s+")
    assert "not special" in str(why_not_fast(changed, []))


def test_a_folder_names_its_own_end_of_document_token(corpus: Path, tmp_path: Path, vocabulary: Vocabulary) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(vocabulary.text.replace("<|endoftext|>", "</s>"))
    with pytest.raises(DataError, match=r"no token '<\|endoftext\|>'.*--eos-token"):
        load_vocabulary(str(folder), None)
    assert load_vocabulary(str(folder), "</s>").eos_id == 0
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert run(corpus, tmp_path / "out", tokenizer=str(folder))["tokenizer"]["eos_token"] == "</s>"


def test_transformers_loads_the_folder(corpus: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    meta = run(corpus, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    ids = np.load(tmp_path / "out" / "train.npy").tolist()
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == meta["eos_id"]
    assert len(tokenizer) == meta["vocab_size"]
    assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_compressed_files_read_as_plain_ones(tmp_path: Path, kind: str, suffix: str) -> None:
    texts = [story(seed) for seed in range(40)]
    plain = "<|endoftext|>".join(texts) if kind == "txt" else "\n".join(json.dumps({"body": text}) for text in texts)
    data = plain.encode()
    halves = data[: len(data) // 2], data[len(data) // 2 :]
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"a.{kind}{suffix}"
    path.write_bytes(b"".join(map(pack, halves)))  # two members, as `cat a.gz b.gz` makes them
    run(path, tmp_path / "out", text_field="body")
    assert all_documents(tmp_path / "out") == sorted(texts)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("how", ["cut short", "damaged"])
def test_a_damaged_compressed_file_is_named(tmp_path: Path, suffix: str, how: str) -> None:
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    data = pack(b"".join(story(seed).encode() for seed in range(500)))
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(data[: len(data) // 2] if how == "cut short" else b"\0\0\0\0" + data)
    with pytest.raises(DataError, match=rf"a\.txt\{suffix}: the compressed data is damaged or cut short"):
        run(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_separators_a_file_is_a_document_or_each_line_is(tmp_path: Path) -> None:
    for index in range(6):
        (tmp_path / f"{index}.md").write_bytes(f"\ufeffone {index}\r\n\r\ntwo {index}\n".encode())
    run(tmp_path, tmp_path / "files")
    assert all_documents(tmp_path / "files") == sorted(f"one {i}\r\n\r\ntwo {i}\n" for i in range(6))
    run(tmp_path / "*.md", tmp_path / "lines", split_by="line")
    assert all_documents(tmp_path / "lines") == sorted([f"one {i}" for i in range(6)] + [f"two {i}" for i in range(6)])


def test_the_separator_never_becomes_text_and_keeps_inner_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"<|endoftext|>a\n\nb\n<|endoftext|>\n\n<|endoftext|> c<|endoftext|>\n")
    (tmp_path / "b.jsonl").write_text('{"text": "d<|endoftext|>e\\n"}\n\n{"text": ""}\n')
    run((str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")), tmp_path / "out")
    assert all_documents(tmp_path / "out") == sorted(["a\n\nb", " c", "d", "e\n"])


@settings(deadline=None, max_examples=300)
@given(
    text=st.lists(st.sampled_from(["a", "b", "\n", "é", "北", "😀", "<|", "endoftext|>", "<|endoftext|>"]))
    .map("".join)
    .map(str.encode),
    limit=st.integers(4, 40),
    block=st.integers(1, 50),
)
def test_cutting_loses_nothing_and_does_not_depend_on_the_blocks(text: bytes, limit: int, block: int) -> None:
    blocks = [text[start : start + block] for start in range(0, len(text), block)]
    pieces = list(cut(blocks, SEPARATOR, limit))
    assert b"".join(piece + SEPARATOR * ended for _, piece, ended in pieces) == text
    assert all(text[offset : offset + len(piece)] == piece for offset, piece, _ in pieces)
    assert all(len(piece) <= limit and SEPARATOR not in piece and piece.decode() is not None for _, piece, _ in pieces)
    assert pieces == list(cut([text], SEPARATOR, limit))


def test_a_long_text_is_cut_at_line_ends(tmp_path: Path) -> None:
    lines = [f"{index} {story(index, 12)}\n" for index in range(2000)]
    (tmp_path / "book.txt").write_bytes("".join(lines).encode())
    meta = run(tmp_path / "book.txt", tmp_path / "out")
    documents = all_documents(tmp_path / "out")
    assert meta["max_document_bytes"] == 4096
    assert len(documents) > 20
    assert all(len(document.encode()) <= 4096 and document.endswith("\n") for document in documents)
    assert sorted(line for document in documents for line in document.splitlines(keepends=True)) == sorted(
        "".join(lines).splitlines(keepends=True)
    )


@given(order=st.permutations(range(40)), most=st.integers(1, 400))
def test_the_sample_does_not_depend_on_the_order_of_documents(order: list[int], most: int) -> None:
    documents = [b"x" * (1 + 7 * index % 60) for index in range(40)]

    def drawn(indices: Any) -> list[bytes]:
        sample = preparation.Sample(most)
        for index in indices:
            sample.add(index, documents[index])
            sample.add(index, documents[index])  # a copy of a document does not count
        assert sample.bytes == sum(map(len, sample.documents())) <= most
        return sample.documents()

    assert drawn(order) == drawn(range(40)) == documents[: len(drawn(range(40)))]


def test_the_tokenizer_is_trained_on_a_bounded_number_of_different_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "_TRAINING_WORD_BYTES", 100)
    same, new = [b"again and again\n"] * 50, [b"word%c%c\n" % (65 + i, 65 + j) for i in range(20) for j in range(20)]
    assert b"".join(preparation._training_texts(same)) == b"".join(same)
    assert len(b"".join(preparation._training_texts(new))) <= 200


def test_train_and_val_share_no_document_and_val_is_never_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": story(seed % 5)}) + "\n" for seed in range(50)))
    meta = run(tmp_path / "a.jsonl", tmp_path / "little", val_fraction=1e-9)
    assert (meta["train_documents"], meta["val_documents"]) == (40, 10)
    meta = run(tmp_path / "a.jsonl", tmp_path / "much", val_fraction=0.999999)
    assert (meta["train_documents"], meta["val_documents"]) == (10, 40)
    assert not set(documents_of(tmp_path / "much", "train")) & set(documents_of(tmp_path / "much", "val"))


def test_val_follows_the_fraction(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(4000)))
    meta = run(tmp_path / "a.jsonl", tmp_path / "out", val_fraction=0.25)
    assert 900 < meta["val_documents"] < 1100
    assert meta["train_documents"] + meta["val_documents"] == 4000


def test_a_small_val_and_a_small_vocabulary_are_said(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = run(corpus, tmp_path / "out", vocab_size=50_000, val_fraction=1e-9)
    said = capsys.readouterr().err
    assert meta["vocab_size"] < 50_000
    assert f"{meta['vocab_size']:,} IDs, fewer than the 50,000 of --vocab-size" in said
    assert f"val.npy has only {meta['val_tokens']:,} tokens" in said
    assert "train.npy has only" not in said
    assert np.load(tmp_path / "out" / "train.npy").max() < meta["vocab_size"]
    assert len(Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab()) == meta["vocab_size"]


def test_a_folder_gives_its_text_files_and_counts_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / ".git").mkdir()
    for name in ("b.txt", "deep/a.PY", ".git/c.txt", ".hidden.txt", "deep/d.txt.gz", "x.png", "y.png", "README"):
        (tmp_path / "in" / name).write_bytes(gzip.compress(b"z") if name.endswith("gz") else name.encode())
    run(tmp_path / "in", tmp_path / "out")
    assert all_documents(tmp_path / "out") == sorted(["b.txt", "deep/a.PY", "z"])
    assert "skipped 3 files that are not .txt, .md, .py, .jsonl (2 .png, 1 README)" in capsys.readouterr().err
    run((str(tmp_path / "in"), str(tmp_path / "in" / "README"), str(tmp_path / "in" / "b.txt")), tmp_path / "more")
    assert all_documents(tmp_path / "more") == sorted(["README", "b.txt", "deep/a.PY", "z"])
    assert "1 of 1 files were already given" in capsys.readouterr().err


def test_the_standard_library_is_there_without_tests_and_without_this_machine() -> None:
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
def test_bad_text_is_named_and_leaves_nothing(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        run(tmp_path / name, tmp_path / "out", max_document_bytes=1000)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_line_too_long_to_hold_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinytrain_dist.data.preparation.corpus._JSON_LINE_BYTES", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + json.dumps({"text": "b" * 1000}) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl: line 2 is longer than 1,000 bytes"):
        run(tmp_path / "a.jsonl", tmp_path / "out")


def test_errors_replace_goes_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 <|endoftext|>\xffb")
    (tmp_path / "b.jsonl").write_text('{"text": "x\\ud800y"}\n')
    run((str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")), tmp_path / "out", errors="replace")
    assert all_documents(tmp_path / "out") == sorted(["caf\ufffd ", "\ufffdb", "x\ufffdy"])


BAD_SOURCES: list[tuple[tuple[str, ...], str]] = [
    ((), "no source was given"),
    (("missing.txt",), r"missing\.txt: there is no such file or folder"),
    (("https://example.org/a.txt",), "URLs are not supported"),
    (("*.nope",), r"\*\.nope: no file matches this glob"),
    (("empty",), r"empty: the folder contains no \.txt, \.md, \.py, \.jsonl file"),
    (("dangling.txt",), r"dangling\.txt: cannot be read \(No such file"),
    (("pipe.txt",), r"pipe\.txt: is not a regular file"),
]


@pytest.mark.parametrize(("sources", "message"), BAD_SOURCES)
def test_sources_that_are_none_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("dangling.txt").symlink_to("nowhere")
    os.mkfifo("pipe.txt")
    with pytest.raises(DataError, match=message):
        run(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_wrong_setting_is_said_at_once(corpus: Path, tmp_path: Path) -> None:
    wrong = {"val_fraction": 1.0, "max_document_bytes": 3, "sample_bytes": 2, "workers": 0, "eos_token": "x"}
    with pytest.raises(ConfigError) as caught:
        run(corpus, tmp_path / "out", vocab_size=256, **wrong)
    names = [problem.split(":")[0] for problem in caught.value.problems]
    assert sorted(names) == sorted([*wrong, "vocab_size"])
    with pytest.raises(ConfigError, match="vocab_size: 500 has no effect with tokenizer t"):
        prepare((str(corpus),), str(tmp_path / "out"), vocab_size=500, tokenizer="t")


@pytest.mark.parametrize("data", [None, b"\xff", b"{}", b'{"model": 3}'])
def test_a_tokenizer_that_is_none_is_named(corpus: Path, tmp_path: Path, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / "t.json").write_bytes(data)
    with pytest.raises(DataError, match=r"--tokenizer .*t\.json cannot be used"):
        run(corpus, tmp_path / "out", tokenizer=str(tmp_path / "t.json"))


def test_existing_output_is_refused_then_replaced_with_overwrite(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder holds nothing to lose
    run(corpus, out)
    before = content(out)
    with pytest.raises(DataError, match=r"already exists; pass --overwrite"):
        run(corpus, out, vocab_size=300)
    assert content(out) == before
    (out / "train.npy.range.json").write_text("{}")
    assert run(corpus, out, vocab_size=300, overwrite=True)["vocab_size"] == 300
    assert sorted(content(out)) == ["meta.json", "tokenizer.json", "tokenizer_config.json", "train.npy", "val.npy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stories.txt"]


def test_overwrite_never_deletes_what_prepare_did_not_write(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"contains 'stories\.txt', which tinytrain prepare did not write"):
        run(corpus, tmp_path, overwrite=True)
    with pytest.raises(DataError, match="is a file"):
        run(corpus, corpus, overwrite=True)
    assert corpus.stat().st_size > 0


def test_a_run_that_dies_between_the_two_renames_loses_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, old = tmp_path / "out", tmp_path / ".out.old"
    run(corpus, out)
    before = content(out)
    rename = Path.rename

    def fails_for_the_new(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            assert content(old) == before
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new)
    with pytest.raises(DataError, match="Input/output error"):
        run(corpus, out, vocab_size=300, overwrite=True)
    assert content(out) == before
    monkeypatch.undo()
    out.rename(old)  # what a power cut at that place leaves
    with pytest.raises(DataError, match="already exists"):
        run(corpus, out)
    assert content(out) == before


def test_nothing_is_visible_before_everything_is_written(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    write = token_writer.write_file

    def spy(path: Path, text: str) -> str:
        seen.append((path.name, (tmp_path / "out").exists()))
        return write(path, text)

    monkeypatch.setattr(preparation, "write_file", spy)
    run(corpus, tmp_path / "out")
    assert seen == [("tokenizer.json", False), ("tokenizer_config.json", False), ("meta.json", False)]


def test_a_full_disk_is_a_message_and_leaves_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(token_writer, "_sync", full)
    with pytest.raises(DataError, match=r"cannot be written: No space left on device; .* \([\d,]+ MB are free now\)"):
        run(corpus, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["stories.txt"]


def test_a_write_that_the_system_refuses_leaves_the_old_data_set(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "out")
    before, limits = content(tmp_path / "out"), resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(DataError, match="cannot be written: File too large"):
            run(corpus, tmp_path / "out", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, former)
    assert content(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stories.txt"]


def test_a_source_that_changes_under_way_is_noticed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threshold = preparation._threshold

    def meanwhile(*arguments: Any) -> int:
        with corpus.open("ab") as file:
            file.write(b" more")
        return threshold(*arguments)

    monkeypatch.setattr(preparation, "_threshold", meanwhile)
    with pytest.raises(DataError, match="a source changed between its first and second reading"):
        run(corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.multiprocess
def test_a_worker_that_is_killed_ends_the_run_with_a_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"one of 2 encoding processes was killed.*--workers"):
        list(token_writer.encode_all([[b"a"]] * 3, ("no vocabulary", True, 0, "<u2"), 2))


def test_the_command_line_says_what_came_out_and_what_is_next(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    former = signal.getsignal(signal.SIGTERM)
    try:
        assert main([corpus.name, "--out", "my data", "--vocab_size", "300", "--workers", "1"]) == 0
    finally:
        signal.signal(signal.SIGTERM, former)
    meta, said = json.loads((tmp_path / "my data" / "meta.json").read_text()), capsys.readouterr().out
    assert f"{meta['train_tokens']:,} tokens, {meta['train_documents']:,} documents" in said
    assert f"{meta['val_tokens']:,} tokens, {meta['val_documents']:,} documents" in said
    assert "--train-data 'my data/train.npy' --val-data 'my data/val.npy'" in said
    assert meta["sources"][0]["path"] == "stories.txt"


def test_ctrl_c_is_no_traceback_and_leaves_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(token_writer.TokenWriter, "append", interrupted)
    former = signal.getsignal(signal.SIGTERM)
    try:
        assert main([str(corpus), "--out", str(tmp_path / "out"), "--vocab-size", "300", "--workers", "1"]) == 130
    finally:
        signal.signal(signal.SIGTERM, former)
    assert "stopped; nothing was written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["stories.txt"]
