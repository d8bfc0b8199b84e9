"""`--dedup exact` keeps the first of equal documents, for every source, number of processes and interruption."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.preparation.test_chat import CHATML, MESSAGES, folder_with, write_lines
from tests.helpers.killed_prepare import kill_after
from tests.helpers.prepared_text import all_documents, content, documents_of, run_prepare, story
from tests.helpers.tables import save_with_datasets, write_arrow, write_json_lines, write_parquet
from tinytrain_dist.data.preparation import duplicates, encoding
from tinytrain_dist.data.preparation import prepare as prepare_module
from tinytrain_dist.data.preparation.chat import ChatEncoder
from tinytrain_dist.data.preparation.duplicates import DuplicateFinder
from tinytrain_dist.data.preparation.prepare import prepare
from tinytrain_dist.data.preparation.sample import document_hashes
from tinytrain_dist.data.preparation.tokenizer import train_bpe
from tinytrain_dist.errors import DataError

SEPARATOR = "\n<|endoftext|>\n"
# Documents 0 .. 49, of which 0 .. 24 occur again in another order, and 3 twice more.
NUMBERS = [*range(50), *reversed(range(25)), 3, 3]
REMOVED_BYTES = sum(len(story(n).encode()) for n in [*range(25), 3, 3])


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(st.sampled_from([b"a", b"b", b"c", b"dd", b"eee"]), min_size=1), buffer=st.integers(1, 200))
def test_the_first_of_equal_documents_stays(
    tmp_path_factory: pytest.TempPathFactory, texts: list[bytes], buffer: int
) -> None:
    folder = tmp_path_factory.mktemp("hashes") / "hashes"
    finder = DuplicateFinder(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_BUFFER_BYTES", buffer)  # most of the hashes are on disk
        for text in texts:
            finder.add(document_hashes(text), document_hashes(text)[0], len(text))
    found, smallest, largest = finder.finish()
    repeats = [number for number, text in enumerate(texts) if text in texts[:number]]
    assert [number for number in range(len(texts)) if number in found] == repeats
    assert (found.documents, found.bytes) == (len(repeats), sum(len(texts[number]) for number in repeats))
    keys = [document_hashes(text)[0] for text in texts]
    assert (smallest, largest) == (min(keys), max(keys))
    assert not folder.exists()


def write_text(path: Path, numbers: list[int]) -> Path:
    text = SEPARATOR.join(story(n) for n in numbers).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def rows_of(numbers: list[int]) -> list[dict[str, Any]]:
    return [{"text": story(n), "kept": True} for n in numbers]


def test_every_source_gives_the_files_of_a_corpus_without_duplicates(tmp_path: Path) -> None:
    common: dict[str, Any] = {"max_document_bytes": 5000}
    run_prepare(write_text(tmp_path / "unique.txt", list(range(50))), tmp_path / "unique", **common)
    expected = {name: data for name, data in content(tmp_path / "unique").items() if name != "meta.json"}
    dropped = [{"text": story(4), "kept": False}]  # a filter removes it, so it does not count as the first
    sources = {
        "text": write_text(tmp_path / "a.txt", NUMBERS),
        "gz": write_text(tmp_path / "a.txt.gz", NUMBERS),
        "lines": write_json_lines(tmp_path / "a.jsonl", dropped + rows_of(NUMBERS)),
        "parquet": write_parquet(tmp_path / "a.parquet", dropped + rows_of(NUMBERS)),
        "arrow": write_arrow(tmp_path / "a.arrow", dropped + rows_of(NUMBERS)),
        "datasets": save_with_datasets(tmp_path / "saved", dropped + rows_of(NUMBERS)),
    }
    for name, source in sources.items():
        chosen = {} if name in ("text", "gz") else {"filter": ("kept == true",)}
        meta = run_prepare(source, tmp_path / name, dedup="exact", **chosen, **common)
        found = {name: data for name, data in content(tmp_path / name).items() if name != "meta.json"}
        assert found == expected, name
        assert meta["dedup"] == {"method": "exact", "removed_documents": 27, "removed_bytes": REMOVED_BYTES}
    assert "dedup" not in json.loads((tmp_path / "unique" / "meta.json").read_text())


def test_duplicates_in_other_files_are_found_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = (
        write_text(tmp_path / "a.txt", NUMBERS[:50]),
        write_parquet(tmp_path / "b.parquet", rows_of(NUMBERS[50:])),
    )
    run_prepare(tuple(map(str, sources)), tmp_path / "out", dedup="exact", max_document_bytes=5000)
    assert all_documents(tmp_path / "out") == sorted(story(n) for n in range(50))
    assert not set(documents_of(tmp_path / "out", "train")) & set(documents_of(tmp_path / "out", "val"))
    report = f"27 of 77 documents, with {REMOVED_BYTES:,} bytes, repeat an earlier one and are removed"
    assert report in capsys.readouterr().err


def test_a_file_that_grows_between_the_readings_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_text(tmp_path / "a.txt", NUMBERS)
    make_plan = prepare_module.make_plan

    def plan_and_append(*given: Any) -> Any:
        plan = make_plan(*given)
        write_text(path, [*NUMBERS, *range(20)])
        return plan

    monkeypatch.setattr(prepare_module, "make_plan", plan_and_append)
    with pytest.raises(DataError, match=r"a\.txt: a source changed between its first and second reading"):
        run_prepare(path, tmp_path / "out", dedup="exact", max_document_bytes=5000)


@pytest.mark.multiprocess
def test_a_killed_run_resumes_to_the_bytes_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encoding, "_BATCH_BYTES", 500)
    sources = (
        write_text(tmp_path / "a.txt", NUMBERS),
        write_parquet(tmp_path / "b.parquet", rows_of([*range(45, 90), *range(60)])),
    )
    names = tuple(map(str, sources))
    common: dict[str, Any] = {"dedup": "exact", "shard_tokens": 700, "val_fraction": 0.3, "max_document_bytes": 5000}
    run_prepare(names, tmp_path / "whole", **common)
    assert json.loads((tmp_path / "whole" / "meta.json").read_text())["dedup"]["removed_documents"] == 27 + 5 + 60
    partial = tmp_path / ".out.partial"
    kill_after(3, tmp_path / "out", names, **common)
    kill_after(6, tmp_path / "out", names, workers=2, **common)
    with pytest.raises(DataError, match="unfinished work of a tinytrain prepare with dedup = 'exact' and not 'none'"):
        run_prepare(names, tmp_path / "out", **{**common, "dedup": "none"})
    marks = (partial / "duplicates.bin").read_bytes()
    (partial / "duplicates.bin").write_bytes(marks[:-1])
    with pytest.raises(DataError, match=r"duplicates\.bin: is missing or damaged.*; delete .*\.out\.partial, and run"):
        run_prepare(names, tmp_path / "out", **common)
    (partial / "duplicates.bin").write_bytes(marks)
    capsys.readouterr()
    run_prepare(names, tmp_path / "out", workers=2, **common)
    assert f"resuming the work in {partial} after " in capsys.readouterr().err
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not partial.exists()


def test_conversations_are_compared_as_the_template_writes_them(tmp_path: Path) -> None:
    vocabulary = train_bpe([message["content"] for message in MESSAGES], 300)
    (tmp_path / "model").mkdir()
    model = folder_with(tmp_path / "model", vocabulary.text, CHATML)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": CHATML}
    (model / "tokenizer_config.json").write_text(json.dumps(config))

    def records(extra: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"messages": [{"content": f"Say {n}.", "role": "user", **extra}, MESSAGES[2]]} for n in range(40)]

    # The template does not write the rating, so these are the same conversations. As JSON they are different.
    lines = write_lines(tmp_path / "chat.jsonl", [r for n in range(3) for r in records({"rating": n} if n else {})])
    unique = write_lines(tmp_path / "unique.jsonl", records({}))
    common: dict[str, Any] = {"tokenizer": str(model), "chat": True, "val_fraction": 0.3}
    expected = prepare(str(unique), str(tmp_path / "expected"), workers=1, **common)
    meta = prepare(str(lines), str(tmp_path / "out"), dedup="exact", workers=2, **common)
    assert meta["digests"] == expected["digests"]
    assert meta["dedup"]["removed_documents"] == 80
    first = ChatEncoder(model).render(records({})[0])
    assert first.startswith("<|im_start|>user\nSay 0.<|im_end|>")
