"""Measure `tinytrain prepare`: its speed on one core beside other libraries, and the peak memory of every process.

    python benchmarks/prepare.py [--megabytes 300] [--vocab-size 8192]      (about a minute; a few hundred MB on disk)

On one core take turns, each from the text of the same documents to IDs: tiktoken and tokenizers alone, `datasets.map`
with tokenizers, which also writes an Arrow file, and `prepare`, which also reads JSON lines, hashes each document and
writes token files. `datasets.map` needs the package datasets, and is left out where it is missing.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer

from tinytrain_dist.data.preparation.corpus import Corpus
from tinytrain_dist.data.preparation.encoding import BatchEncoder, in_batches
from tinytrain_dist.data.preparation.prepare import prepare
from tinytrain_dist.data.preparation.recognition import recognise
from tinytrain_dist.data.preparation.sources import find_sources
from tinytrain_dist.data.preparation.text_documents import Reading
from tinytrain_dist.data.preparation.token_writer import TokenWriter
from tinytrain_dist.data.preparation.tokenizer import Encoder, Vocabulary, load_vocabulary

_COMPARISON_BYTES = 4_000_000  # of text on one core: little, because some ways are slow


def _processes(parent: int) -> dict[int, int]:
    """Return the peak resident bytes of a process and its children, by pid; empty where there is no /proc."""
    peaks = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:  # the process ended while it was listed
            continue
        if parent in (int(fields["Pid"]), int(fields["PPid"])) and "VmHWM" in fields:
            peaks[int(fields["Pid"])] = int(fields["VmHWM"].split()[0]) * 1024
    return peaks


@contextmanager
def _watched() -> Iterator[dict[int, int]]:
    """Record the peak memory of this process and its children, ten times a second while the block runs."""
    peaks: dict[int, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            peaks.update(_processes(os.getpid()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def _write_corpus(folder: Path, megabytes: int) -> Path:
    """Write one file without separators: the standard library, repeated, with another comment each time."""
    (source,) = find_sources(["stdlib"], print)
    path, size, turn = folder / "corpus.txt", 0, 0
    with path.open("wb") as file:
        while size < megabytes * 1_000_000:
            turn += 1
            for name in source.files:
                size += file.write(Path(name).read_bytes().decode(errors="replace").encode() + b"# turn %d\n" % turn)
    return path


def _documents() -> list[str]:
    """Return the documents of the comparison: files of the standard library."""
    (source,) = find_sources(["stdlib"], print)
    texts: list[str] = []
    size = 0
    for name in source.files:
        if size < _COMPARISON_BYTES:
            texts.append(Path(name).read_bytes().decode(errors="replace"))
            size += len(texts[-1].encode())
    return texts


def _prepare_on_one_core(lines: Path, vocabulary: Vocabulary, place: Path) -> Callable[[], int]:
    """Return what `prepare` does in its second reading; it returns the number of tokens."""
    sources = find_sources([str(lines)], print)
    reading = Reading("text", "file", "strict", 1_000_000)
    facts = recognise(sources, reading, print)
    encode = BatchEncoder(vocabulary, True, 1 << 57, "<u2")

    def run() -> int:
        corpus = Corpus(sources, reading, facts)
        with TokenWriter(place, "train", "<u2") as train, TokenWriter(place, "val", "<u2") as val:
            for batch in in_batches(corpus.documents("encoding")):
                for writer, part in zip((train, val), encode(batch), strict=True):
                    writer.append(part)
            train.finish()
            val.finish()
        return train.tokens + val.tokens - train.documents - val.documents

    return run


def _datasets_on_one_core(lines: Path, vocabulary: Vocabulary, place: Path) -> Callable[[], int]:
    """Return `datasets.map` over the same documents; it returns their number."""
    import datasets

    datasets.disable_progress_bars()
    tokenizer = Tokenizer.from_str(vocabulary.text)
    table = datasets.load_dataset("json", data_files=str(lines), cache_dir=str(place / "cache"), split="train")

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [one.ids for one in tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)]}

    def run() -> int:
        return len(table.map(encode, batched=True, remove_columns=["text"], load_from_cache_file=False))

    return run


def _compare_on_one_core(folder: Path, turns: int) -> None:
    """Print the MB/s of each way to encode the same documents on one core, and its ratio to `prepare`."""
    texts, vocabulary = _documents(), load_vocabulary(str(folder / "stdlib"), None)
    size = sum(len(text.encode()) for text in texts) / 1e6
    lines = folder / "compared.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    encoder = Encoder(vocabulary, use_fast=True)
    assert encoder.fast is not None
    for text in texts:
        assert (encoder.encode(text) == encoder.encode_slow(text)).all()
    tiktoken, tokenizers = encoder.fast, Tokenizer.from_str(vocabulary.text)
    ways: dict[str, Callable[[], object]] = {
        "prepare": _prepare_on_one_core(lines, vocabulary, folder),
        "tiktoken": lambda: [tiktoken.encode_ordinary(text) for text in texts],
        "tokenizers": lambda: [one.ids for one in tokenizers.encode_batch_fast(texts, add_special_tokens=False)],
    }
    if find_spec("datasets"):
        ways["datasets.map"] = _datasets_on_one_core(lines, vocabulary, folder)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    for name, found in seconds.items():
        # by turns, because other programs slow all ways alike: the median of the ratios in one turn each
        ratio = statistics.median(other / own for other, own in zip(found, seconds["prepare"], strict=True))
        print(f"one core    {name:12} {size / min(found):5.1f} MB/s; prepare is {ratio:.2f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300, help="size of the large input in MB (300)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="tokens of the new tokenizer (8192)")
    parser.add_argument("--workers", type=int, default=2, help="processes that encode (2)")
    parser.add_argument("--turns", type=int, default=5, help="turns of the comparison on one core (5)")
    given = parser.parse_args()
    packages = ", ".join(f"{name} {version(name)}" for name in ("tiktoken", "tokenizers", "numpy"))
    print(f"machine     {platform.platform()}, {platform.machine()}, Python {platform.python_version()}, {packages}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        start = time.perf_counter()
        meta = prepare(("stdlib",), str(folder / "stdlib"), vocab_size=given.vocab_size, workers=given.workers)
        size = (meta["train_bytes"] + meta["val_bytes"]) / 1e6
        print(f"stdlib      {size:.1f} MB prepared in {time.perf_counter() - start:.1f} s, {given.workers} workers")
        corpus = _write_corpus(folder, given.megabytes)
        with _watched() as peaks:
            start = time.perf_counter()
            prepare((str(corpus),), str(folder / "large"), vocab_size=given.vocab_size, workers=given.workers)
            seconds = time.perf_counter() - start
        print(
            f"large file  {given.megabytes} MB in {seconds:.1f} s: {given.megabytes / seconds:.1f} MB/s over all stages"
        )
        print(f"peak RSS    {', '.join(f'{peak / 1e6:.0f} MB' for peak in peaks.values()) or 'needs /proc'}")
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        _compare_on_one_core(folder, given.turns)  # last, because datasets takes memory of its own
        if max(peaks.values(), default=0) > 300e6:
            sys.exit("a process used more than 300 MB, which is the limit")


if __name__ == "__main__":
    main()
