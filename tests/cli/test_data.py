"""`tinytrain data`: numbers of folders, runs and files of other programs, windows with marks, the page, mistakes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.test_report import Page
from tests.helpers.terminals import in_terminal
from tests.helpers.token_files import save_megatron, save_tokens
from tests.helpers.tools import TEXT, Cli
from tests.helpers.training import train
from tinytrain_dist.cli.data_views import findings, windows
from tinytrain_dist.data.statistics.token_texts import TokenTexts
from tinytrain_dist.data.statistics.windows import MarkedWindow
from tinytrain_dist.data.token_dataset import TokenDataset

END = 0
SECONDS = 120.0


def values(tinytrain: Cli, *args: object) -> dict[str, Any]:
    """Return what the verb prints as JSON."""
    code, out, err = tinytrain("data", *args, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def write_folder(folder: Path) -> Path:
    """Write what `prepare` writes, without a tokenizer: 20 documents of train, 4 of val, 2 of which are in train."""
    draw = np.random.default_rng(0)
    documents = [np.append(draw.integers(2, 90, draw.integers(20, 60)), END) for _ in range(18)]
    documents += [documents[3], documents[3]]
    val = [documents[5], documents[7], *(np.append(draw.integers(2, 90, 50), END) for _ in range(2))]
    folder.mkdir()
    for name, split in (("train", documents), ("val", val)):
        save_tokens(folder / f"{name}.npy", np.concatenate(split))
        np.save(folder / f"{name}.documents.npy", np.cumsum([0, *map(len, split)])[:-1])
    (folder / "meta.json").write_text(json.dumps({"vocab_size": 100, "eos_id": END}))
    return folder


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A folder that a test may change."""
    return write_folder(tmp_path / "data")


# --- numbers -------------------------------------------------------------------------------------------------------


def test_a_prepared_folder(tinytrain: Cli, prepared: Path) -> None:
    found = values(tinytrain, prepared, "--context-len", 30)
    train_ids, val_ids = (np.load(prepared / f"{name}.npy") for name in ("train", "val"))
    starts = np.load(prepared / "train.documents.npy")
    lengths = np.diff(starts, append=len(train_ids))
    assert (found["train"]["tokens"], found["train"]["documents"]) == (len(train_ids), 20)
    assert found["train"]["document_tokens"]["percentiles"]["50"] == np.percentile(lengths, 50, method="inverted_cdf")
    assert found["train"]["duplicates"] == {"documents": 2, "tokens": 2 * lengths[3]}
    assert found["most_copies"][0]["copies"] == 3
    assert found["most_copies"][0]["place"] == f"train.npy:{starts[3]}"
    assert found["most_copies"][0]["text"].split()[:3] == [str(token) for token in train_ids[starts[3] :][:3]]
    assert found["vocabulary"]["unused"] == 100 - len(np.unique(train_ids))
    most = found["vocabulary"]["most_frequent"][0]
    assert most["count"] == np.bincount(train_ids).max()
    assert found["train"]["bytes_per_token"] is None
    (of_val,) = found["evaluation"].values()
    assert of_val["overlap"]["documents_in_train"] == 2
    in_train = {tuple(train_ids[at : at + 13]) for at in range(len(train_ids) - 12)}
    rows = [val_ids[at : at + 31] for at in range(0, len(val_ids) - 1, 30)]
    hits = [[tuple(row[at : at + 13]) in in_train for at in range(len(row) - 12)] for row in rows]
    crossing = {start - back for start in np.load(prepared / "val.documents.npy") for back in range(1, 13)}
    complete = [[number * 30 + at not in crossing for at in range(len(row))] for number, row in enumerate(hits)]
    hits = [[a and b for a, b in zip(*pair, strict=True)] for pair in zip(hits, complete, strict=True)]
    assert of_val["overlap"]["windows"] == len(rows)
    assert of_val["overlap"]["ngrams"] == sum(map(sum, complete))
    assert of_val["overlap"]["ngrams_found"] == sum(map(sum, hits)) > 10
    assert of_val["overlap"]["windows_with_ngrams"] == sum(map(any, hits)) < len(rows)


def test_a_run_is_compared_on_the_windows_that_it_evaluates(tinytrain: Cli, folder: Path, tmp_path: Path) -> None:
    found = values(tinytrain, folder / "one", "--ngram", 5)
    (overlap,) = (each["overlap"] for each in found["evaluation"].values())
    config = (folder / "one" / "config.toml").read_text()
    batch_size, eval_steps = (
        int(re.search(rf"^{name} = (\d+)", config, re.MULTILINE)[1]) for name in ("batch_size", "eval_steps")
    )
    assert overlap["windows"] == batch_size * eval_steps
    longer = tmp_path / "longer.toml"
    longer.write_text(re.sub(r"(?m)^eval_steps = .*", f"eval_steps = {eval_steps + 2}", config))
    (of_longer,) = values(tinytrain, longer)["evaluation"].values()
    assert of_longer["overlap"]["windows"] == batch_size * (eval_steps + 2)
    assert overlap["windows_in_file"] is None
    assert overlap["windows_with_ngrams"] == overlap["windows"]  # both files have the same text
    every = values(tinytrain, folder / "one", "--ngram", 5, "--all-windows")["evaluation"]["val.npy"]["overlap"]
    assert every["windows"] == every["windows_in_file"]
    ids = np.load(folder / "train.npy")
    assert found["train"]["bytes"] == 40 * len(TEXT.encode())
    assert found["train"]["documents"] == 40  # assumed, from the token that ends them
    assert found["train"]["duplicates"]["documents"] == 39
    assert "assumed to begin after each token 0" in found["notes"][0]
    assert found["vocabulary"]["special"] == [{"id": 0, "text": "<|endoftext|>", "count": 40}]
    assert found["train"]["bytes_per_token"] == 40 * len(TEXT.encode()) / len(ids)


def test_the_text_has_the_same_numbers(tinytrain: Cli, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = values(tinytrain, prepared)
    code, out, err = tinytrain("data", prepared)
    assert (code, "Traceback" in err) == (0, False)
    assert f"{found['train']['tokens']:,}" in out
    assert "train: 2 of 20 documents repeat another one exactly (10.00 %;" in out
    assert "3 times," in out
    assert f"ids never used  {found['vocabulary']['unused']} of 100" in out
    assert "2 of 4 documents are exact copies of a training document (50.00 %)" in out
    assert "longest common passage: " in out
    assert "no tokenizer.json in" in out
    assert "\x1b" not in out
    monkeypatch.setattr(findings, "MOST_SEARCHED_TOKENS", 40 * 2)
    assert re.search(
        r"of 2 windows of 39 tokens, in equal distances among \d+, contain",
        tinytrain("data", prepared, "--context-len", 39)[1],
    )


def test_files_of_other_programs(tinytrain: Cli, tmp_path: Path) -> None:
    ids = np.tile([3, 4, 50_256], 100)
    (tmp_path / "train.bin").write_bytes(ids.astype("<u2").tobytes())
    (tmp_path / "val.bin").write_bytes(ids[:50].astype("<u2").tobytes())
    assert "set token_dtype" in tinytrain("data", tmp_path)[2]
    found = values(tinytrain, tmp_path, "--token-dtype", "uint16")
    assert (found["train"]["documents"], found["vocabulary"]["size"]) == (None, None)
    assert any("--eos-id N names the token" in note for note in found["notes"])
    found = values(tinytrain, tmp_path, "--token-dtype", "uint16", "--eos-id", 50_256, "--vocab-size", 50_257)
    assert found["train"]["documents"] == 100
    assert found["vocabulary"]["unused"] == 50_254
    save_megatron(tmp_path / "m", [np.array(each, np.uint16) for each in ([1, 2], [], [1, 2])])
    found = values(tinytrain, tmp_path / "m", "--val-data", tmp_path / "m.bin")
    assert (found["train"]["documents"], found["train"]["sources"][0]["empty_documents"]) == (2, 1)
    assert list(found["evaluation"]) == ["m.bin"]


def test_ids_outside_the_vocabulary_are_named_and_do_not_stop_it(tinytrain: Cli, prepared: Path) -> None:
    code, out, _ = tinytrain("data", prepared, "--vocab-size", 50)
    assert code == 0
    assert "WARNING: train has " in out
    assert "token(s) outside 0 .. 49, the first is id" in out
    path = save_tokens(prepared.parent / "u.npy", [1, 1 << 24], "uint32")  # its vocabulary is not known
    outside = "all has 1 token(s) outside 0 .. 16777215, the first is id 16777216 (token 1)"
    assert values(tinytrain, path)["notes"][-1] == f"{outside}, and this verb counts no larger ids."


def write_tokenizer(folder: Path, ids: int, digest: str = "") -> Path:
    """Write a byte-level tokenizer with so many IDs into a folder, and its digest if it is given."""
    tokenizer = {
        "model": {"type": "BPE", "vocab": {chr(0x100 + token): token for token in range(ids)}},
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    meta = {"vocab_size": ids, "eos_id": END, "digests": {"tokenizer.json": digest or f"of {ids}"}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def test_a_vocabulary_smaller_than_the_tokenizer_is_a_mistake_in_the_option(tinytrain: Cli, prepared: Path) -> None:
    write_tokenizer(prepared, 100)
    code, out, err = tinytrain("data", prepared, "--vocab-size", 99)
    assert (code, out) == (2, "")
    assert f"--vocab-size: 99 is less than the 100 ids of {prepared}/tokenizer.json; leave it out" in err
    assert values(tinytrain, prepared, "--vocab-size", 101)["vocabulary"]["size"] == 101


def test_data_of_different_tokenizers_is_refused_as_training_refuses_it(
    tinytrain: Cli, prepared: Path, tmp_path: Path
) -> None:
    write_tokenizer(prepared, 100, "a")
    other = write_tokenizer(write_folder(tmp_path / "other"), 100, "b")
    code, out, err = tinytrain("data", prepared, "--val-data", other / "val.npy")
    assert (code, out) == (2, "")
    assert f"train_data, val_data: {prepared} and {other} were made with different tokenizers" in err
    write_tokenizer(other, 100, "a")
    assert values(tinytrain, prepared, "--val-data", other / "val.npy")["evaluation"]


def test_an_eos_id_that_decides_nothing_is_refused(tinytrain: Cli, prepared: Path, tmp_path: Path) -> None:
    for options in ([], ["--decode", 1], ["--decode", 1, "--html", tmp_path / "p.html"]):
        code, out, err = tinytrain("data", prepared, "--eos-id", 3, *options)
        assert (code, out) == (2, "")
        assert "--eos-id: has no effect, because files beside the tokens, or Megatron's index, record where" in err
    plain = save_tokens(tmp_path / "plain.npy", [1, 2, 3] * 20)
    assert values(tinytrain, prepared, "--val-data", plain, "--eos-id", 3)["evaluation"]["plain.npy"]["documents"] == 20
    shown = ("--val-data", plain, "--eos-id", 3, "--decode", 1, "--html", tmp_path / "p.html")
    assert tinytrain("data", prepared, *shown)[0] == 0, "it is used for the evaluation file"


def test_odd_files(tinytrain: Cli, tmp_path: Path) -> None:
    for name, ids in {"none": [], "one": [3]}.items():
        path = save_tokens(tmp_path / f"{name}.npy", ids)
        for options in ([], ["--eos-id", 0, "--vocab-size", 5], ["--val-data", path, "--eos-id", 3]):
            for html in ([], ["--html", tmp_path / "page.html"]):
                code, _, err = tinytrain("data", path, *options, *html)
                assert (code, "Traceback" in err) == (0, False), err
        found = values(tinytrain, path, "--val-data", path, "--context-len", 1 << 52)["evaluation"][path.name]
        assert found["overlap"]["windows"] == len(ids)  # a window as wide as the option needs more memory than exists
        code, _, err = tinytrain("data", path, "--decode", 1)
        assert code == 2
        assert "context_len 256 needs at least 257" in err


# --- windows -------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "loss_mask": True, "document_mask": True, "packing": "best_fit", "sampling": "shuffle", "total_steps": 3,
    "context_len": 24, "batch_size": 4, "vocab_size": 100,
}  # fmt: skip


@pytest.fixture(scope="module")
def masked_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with masks, packing and shuffled windows; its folder also holds the data. Not to be changed."""
    folder = write_folder(tmp_path_factory.mktemp("masked") / "data")
    for name in ("train", "val"):
        ids = np.load(folder / f"{name}.npy")
        np.save(folder / f"{name}.mask.npy", (ids % 3 > 0).astype(np.uint8))
    train(folder, "run", 1, **SETTINGS)
    return folder / "run"


def test_a_step_of_a_run_shows_what_it_trained_on(tinytrain: Cli, masked_run: Path) -> None:
    dataset = TokenDataset(
        [str(masked_run.parent / "train.npy")], 24, shuffle_batch=4, loss_mask=True, document_mask=True, packed=True
    )
    seed = int(re.search(r"^seed = (\d+)", (masked_run / "config.toml").read_text(), re.MULTILINE)[1])
    for step in (1, 3):
        expected = dataset.training_windows(seed, step - 1, range(4))
        shown = values(tinytrain, masked_run, "--step", step)["windows"]
        assert [window["slot"] for window in shown] == [0, 1, 2, 3]
        for window, tokens, counted in zip(shown, expected.tokens, expected.counted, strict=True):
            used = len(window["tokens"])
            assert window["tokens"] == tokens[:used].tolist()
            assert used + window["padding"] == 25
            assert window["not_counted"] == [0, *(at + 1 for at in range(used - 1) if not counted[at])]
        (one,) = values(tinytrain, masked_run, "--step", step, "--slot", 2)["windows"]
        assert one == shown[2]
    checkpoint = next((masked_run / "checkpoints").glob("checkpoint-*3"))
    assert values(tinytrain, checkpoint, "--step", 3)["windows"] == shown
    assert (
        values(tinytrain, masked_run / "config.toml", "--decode", 2)["windows"]
        == values(tinytrain, masked_run, "--step", 1, "--slot", 0, 1)["windows"]
    )


def test_windows_of_a_folder_have_its_masks_and_the_output_says_so(
    tinytrain: Cli, masked_run: Path, tmp_path: Path
) -> None:
    data = masked_run.parent
    dataset = TokenDataset([str(data / "train.npy")], 24, loss_mask=True)
    expected = dataset.training_windows(0, 0, range(3))
    options = ("--decode", 3, "--context-len", 24)
    found = values(tinytrain, data / "train.npy", *options)
    for window, counted in zip(found["windows"], expected.counted, strict=True):
        assert window["not_counted"] == [0, *(at + 1 for at in range(24) if not counted[at])]
    note = "The mask files beside the token files say which tokens count, as in a run with loss_mask = true"
    assert [each.startswith(note) for each in found["window_notes"]] == [True]
    page = tmp_path / "page.html"
    out = tinytrain("data", data / "train.npy", *options, "--html", page)[1]
    assert note in out
    assert "--- document begins ---" in out  # where train.documents.npy says
    assert note in page.read_text()
    assert values(tinytrain, masked_run, "--decode", 1)["window_notes"] == []
    for name in ("train.npy", "meta.json"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    found = values(tinytrain, tmp_path / "train.npy", *options)
    assert all(window["not_counted"] == [0] for window in found["windows"])
    assert "assumed to begin after each token 0 (meta.json)" in found["window_notes"][0]


def test_a_smaller_batch_shows_the_windows_that_it_has(tinytrain: Cli, prepared: Path) -> None:
    config = prepared / "c.toml"
    config.write_text(
        f'[run]\ntotal_steps = 9\n[data]\ntrain_data = "{prepared}/train.npy"\nval_data = "{prepared}/val.npy"\n'
        'context_len = 24\nbatch_size = 8\nbatch_size_warmup = ["0: 2", "3: 8"]\n[model]\nvocab_size = 100\n'
    )
    for step, slots in {1: 2, 3: 2, 4: 8}.items():
        assert len(values(tinytrain, config, "--step", step)["windows"]) == slots
    assert len(values(tinytrain, config, "--decode", 8, "--step", 4)["windows"]) == 8
    for options in (["--decode", 3], ["--step", 3, "--slot", 2]):
        code, _, err = tinytrain("data", config, *options)
        assert (code, "(batch_size 2 in step " in err) == (2, True)


def test_marks_are_plain_in_a_file_and_colours_on_a_terminal(masked_run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tinytrain_dist", "data", masked_run, "--step", "1", "--slot", "0"]
    plain = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "\x1b" not in plain
    assert "[-" in plain
    assert "--- document begins ---\n" in plain
    shown = {}
    for name, env in {"colour": {"TERM": "xterm"}, "no-colour": {"TERM": "xterm", "NO_COLOR": "1"}}.items():
        with in_terminal(command, tmp_path, tmp_path / name, env, output_to_terminal=True) as terminal:
            assert terminal.wait(SECONDS) == 0
            assert terminal.reader is not None
            terminal.reader.join(SECONDS)  # it ends with the output
        shown[name] = (tmp_path / name).read_text().replace("\r\n", "\n")
    assert "\x1b[2;31m" in shown["colour"]
    assert "[-" not in shown["colour"]
    assert shown["no-colour"] == plain


def window(tokens: list[int], **marks: Any) -> MarkedWindow:
    """Return a window in which everything counts, and one document begins."""
    size = len(tokens)
    begins = np.arange(size) == 0
    given = {"begins": begins, "continues": np.zeros(size, np.bool_), "counted": np.ones(size, np.bool_), "padding": 0}
    return MarkedWindow(0, "f.npy:0", tokens, **{**given, **marks})


def test_bytes_of_the_data_cannot_change_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    pieces = dict(enumerate([b"a\n", b"\x1b[31m\x07", b"\xff", "\u202e\u0085".encode(), b"b\r\x08\tc", b"\x9b31m"]))
    windows.print_windows([window(list(range(6)))], TokenTexts({}, 6, pieces), colour=False)
    out = capsys.readouterr().out
    assert out.endswith("--- document begins ---\na\n\\x1b[31m\\x07\\xff\\u202e\\x85b\\r\\x08\tc\\x9b31m\n")
    windows.print_windows([window(list(range(6)))], TokenTexts({}, 6, pieces), colour=True)
    out = capsys.readouterr().out
    assert set(re.findall(r"[^ -~\n\t]", out)) == {"\x1b"}
    assert re.findall("\x1b\\[[0-9;]*m", out) == 2 * ["\x1b[1;36m", "\x1b[0m"]  # around two headings
    assert out.count("\x1b") == 4


def test_each_mark_is_where_it_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    texts = TokenTexts({0: "<end>"}, 5, {number: b"word%d " % number for number in range(1, 5)})
    marked = window(
        [1, 2, 0, 3, 4, 3],
        begins=np.array([0, 0, 0, 1, 0, 0], np.bool_),
        continues=np.array([1, 0, 0, 0, 0, 1], np.bool_),
        counted=np.array([0, 1, 1, 0, 0, 1], np.bool_),
        padding=2,
    )
    windows.print_windows([marked], texts, colour=False)
    assert capsys.readouterr().out.split("\n", 2)[2] == (
        "== slot 0: f.npy:0, 6 tokens, 2 of padding; 3 of 7 targets count ==\n"
        "--- a document continues ---\n[-word1 -]word2 <end>\n"
        "--- document begins ---\n[-word3 word4 -]\n"
        "--- a document continues ---\nword3 \n"
        "--- 2 tokens of padding ---\n"
    )


# --- the page ------------------------------------------------------------------------------------------------------


def test_the_page_has_the_numbers_and_needs_nothing_else(tinytrain: Cli, masked_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "pages" / "data.html"
    code, out, err = tinytrain("data", masked_run, "--html", path)
    assert code == 0, err
    assert f"{path}: " in out
    assert tinytrain("data", masked_run, "--html", path, "--step", 2)[0] == 0  # it replaces its own page
    text = path.read_text()
    found = values(tinytrain, masked_run)
    page = Page(text)
    shown = " ".join(page.texts)
    overlap = found["evaluation"]["val.npy"]["overlap"]
    for number in (
        f"{found['train']['tokens']:,}", f"{found['vocabulary']['unused']} of 100 ids",
        f"{overlap['ngrams_found']:,} of {overlap['ngrams']:,} 13-grams", "slot 3: train.npy:", "document begins",
    ):  # fmt: skip
        assert number in shown, number
    assert {"chart-lengths-0", "chart-lengths-1", "chart-frequencies", "chart-overlap-0"} <= set(page.values("id"))
    assert len([tag for tag, _ in page.tags if tag == "rect"]) > 5
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "link", "iframe")]
    assert not page.values("src")
    assert not page.values("style")
    assert all(link.startswith("#") for link in page.values("href"))
    (style,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in text
    assert "prefers-color-scheme: dark" in style
    assert {"viewport", "color-scheme"} <= set(page.values("name"))


def test_numbers_and_places_of_copies_stay_whole_and_tell_files_apart(
    tinytrain: Cli, prepared: Path, tmp_path: Path
) -> None:
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name / "train.npy")
        np.save(paths[-1], np.tile(np.arange(40) + 40 * len(paths), 2).astype(np.uint16))
        np.save(tmp_path / name / "train.documents.npy", [0, 40])
    config = tmp_path / "c.toml"
    config.write_text(f"train_data = {json.dumps([str(path) for path in paths])}\nvocab_size = 200\ncontext_len = 8\n")
    path = tmp_path / "p.html"
    assert tinytrain("data", config, "--html", path)[0] == 0
    rows = re.findall(r'<span class="whole">(.*?)</span>', path.read_text())
    assert sorted(rows[2::3]) == ["a/train.npy:0", "b/train.npy:0"]
    assert rows[:2] == ["2", "40"]
    assert ".whole { white-space: nowrap; }" in path.read_text()


def test_text_of_the_data_stays_text_on_the_page(tinytrain: Cli, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    from tests.helpers.prepared_text import byte_level_bpe

    words = ["<script>", "&amp;", "\u0121", "é"]  # the third one stands for the byte 0x7f
    tokenizer = byte_level_bpe(words, [])
    tokenizer.add_special_tokens(["<b>\x1b[31m\u202e"])  # ID 4
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    save_tokens(tmp_path / "t.npy", [0, 1, 2, 4, 3] * 100)
    path = tmp_path / "p.html"
    code, _, err = tinytrain(
        "data", tmp_path / "t.npy", "--html", path, "--decode", 1, "--context-len", 8, "--eos-id", 3
    )
    assert code == 0, err
    page = Page(path.read_text())
    assert "script" not in {tag for tag, _ in page.tags}
    assert any("<script>&amp;\\x7f" in text for text in page.texts)
    assert "<b>\\x1b[31m\\u202e" in page.texts  # in the table of special tokens
    assert not re.findall(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", path.read_text())


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step", 9], "--step: 9 is not in 1 .. 3 (total_steps)"),
        (["--step", 1, "--slot", 4], "--slot: 4 is not in 0 .. 3 (batch_size 4)"),
        (["--slot", 1], "--slot: needs --step"),
        (["--decode", 1, "--slot", 1], "--slot: has no effect with --decode"),
        (["--decode", 0], "--decode: 0 must be at least 1"),
        (["--decode", 5], "--decode: 5 is more than the 4 windows of a step (batch_size 4); give at most 4"),
        (["--step", 1, "--slot", -1], "--slot: -1 must be at least 0"),
        (["--step", 1, "--slot", 1 << 70], f"--slot: {1 << 70} must be at most 2**53"),
        (["--step", 1 << 70], f"--step: {1 << 70} must be at most 2**53"),
        (["--seed", 1], "--seed: has no effect on numbers; add --decode"),
        (["--step", 1, "--all-windows"], "--all-windows: has no effect on windows"),
        (["--ngram", 26], "--ngram: 26 is more than the 25 tokens of a window"),
        (["--html", "x.txt"], "--html: x.txt is not the name of a page; it must end in .html"),
        (["--val-data", "none.npy"], "none.npy: no such token file"),
    ],
)
def test_mistakes_in_options_are_sentences(
    tinytrain: Cli, masked_run: Path, options: list[object], message: str
) -> None:
    code, out, err = tinytrain("data", masked_run, *options)
    assert (code, out) == (2, "")
    assert message in err


def test_places_that_cannot_be_read(tinytrain: Cli, tmp_path: Path, prepared: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{}")
    (tmp_path / "c.toml").write_text("[data]\nbatch_size = 4\n")
    for place, message in {
        "nothing": "no such token file; make one with `tinytrain prepare` or correct the path",
        "empty": "the folder has no .npy or .bin file",
        "broken": "is a run without config.toml; restore it",
        "c.toml": "train_data: not set, so there is nothing to look at",
        "data/meta.json": "is text and holds no token IDs; make token files of it with `tinytrain prepare ",
    }.items():
        code, _, err = tinytrain("data", tmp_path / place)
        assert code == 2, err
        assert message in err
    code, _, err = tinytrain("data", prepared, "--all-windows")
    assert code == 2
    assert "--all-windows: has no effect without a run" in err
    (tmp_path / "other.html").write_text("<p>mine</p>")
    code, _, err = tinytrain("data", prepared, "--html", tmp_path / "other.html")
    assert code == 2
    assert "exists and is not such a page" in err
    assert (tmp_path / "other.html").read_text() == "<p>mine</p>"
