"""`tinytrain data`: each number, place and picture is the right one of several that could be shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.cli.test_data import values, write_folder
from tests.helpers.token_files import save_tokens
from tests.helpers.tools import Cli
from tinytrain_dist.cli.data_views import charts, findings, text, windows
from tinytrain_dist.data.statistics.lengths import LengthHistogram
from tinytrain_dist.data.token_dataset import TokenDataset


def save_documents(path: Path, documents: list[list[int]]) -> Path:
    """Save a token file, with where its documents begin."""
    save_tokens(path, np.concatenate(documents))
    np.save(path.with_suffix(".documents.npy"), np.cumsum([0, *map(len, documents)])[:-1])
    return path


@pytest.fixture
def long_documents(tmp_path: Path) -> Path:
    """Training data in which a document of 80 tokens occurs twice."""
    long = list(range(100, 180))
    return save_documents(tmp_path / "train.npy", [[1] * 30, long, [2] * 30, long])


def test_long_documents_and_passages_are_shown_by_their_beginning_and_place(
    tinytrain: Cli, long_documents: Path, tmp_path: Path
) -> None:
    evaluation = save_documents(tmp_path / "val.npy", [[5] * 37, list(range(100, 175))])
    found = values(tinytrain, long_documents, "--val-data", evaluation, "--context-len", 120)
    (copies,) = found["most_copies"]
    beginning = " ".join(map(str, range(100, 100 + findings.TEXT_TOKENS)))
    assert (copies["copies"], copies["tokens"], copies["place"], copies["text"]) == (2, 80, "train.npy:30", beginning)
    passage = found["evaluation"]["val.npy"]["overlap"]["longest_passage"]
    assert passage == {"tokens": 75, "place": "val.npy:37", "text": beginning}


def test_each_evaluation_file_has_its_own_windows(
    tinytrain: Cli, long_documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save_documents(tmp_path / "other.npy", [[7] * 100])
    same = save_documents(tmp_path / "same.npy", [list(range(100, 180))])
    options = (long_documents, "--val-data", other, same, "--context-len", 20)
    of_other, of_same = (values(tinytrain, *options)["evaluation"][path.name]["overlap"] for path in (other, same))
    assert (of_other["windows"], of_other["ngrams_found"]) == (5, 0)
    assert (of_same["windows"], of_same["ngrams_found"]) == (4, of_same["ngrams"])
    assert of_same["windows_with_ngrams"] == of_same["windows_at_least_half"] == 4
    monkeypatch.setattr(findings, "MOST_SEARCHED_TOKENS", 21 * 2 * 2)  # for both files together
    assert [each["overlap"]["windows"] for each in values(tinytrain, *options)["evaluation"].values()] == [2, 2]


def test_half_of_the_ngrams_is_at_least_half(tinytrain: Cli, tmp_path: Path) -> None:
    train = save_documents(tmp_path / "t.npy", [[1, 2, 3, 4, 5]])
    evaluation = save_documents(tmp_path / "v.npy", [[1, 2, 3, 9, 9, 9]])
    found = values(tinytrain, train, "--val-data", evaluation, "--ngram", 2, "--context-len", 4)
    overlap = found["evaluation"]["v.npy"]["overlap"]
    assert (overlap["windows"], overlap["ngrams"], overlap["ngrams_found"]) == (2, 5, 2)
    assert overlap["windows_at_least_half"] == 1  # 1 2 | 2 3 | 3 9 | 9 9


def test_an_ngram_may_be_as_long_as_a_window(tinytrain: Cli, long_documents: Path) -> None:
    options = (long_documents, "--val-data", long_documents, "--context-len", 24, "--ngram")
    assert values(tinytrain, *options, 25)["evaluation"]["train.npy"]["overlap"]["ngram"] == 25
    assert "--ngram: 26 is more than the 25 tokens of a window" in tinytrain("data", *options, 26)[2]


def test_the_seed_decides_which_windows_are_shown(tinytrain: Cli, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data")
    dataset = TokenDataset([str(data / "train.npy")], 24)
    for seed in (0, 3):
        shown = values(tinytrain, data, "--decode", 2, "--context-len", 24, "--seed", seed)["windows"]
        assert [window["tokens"] for window in shown] == dataset.training_windows(seed, 0, range(2)).tokens.tolist()


def test_json_is_all_that_is_printed_beside_a_page(tinytrain: Cli, tmp_path: Path) -> None:
    data, page = write_folder(tmp_path / "data"), tmp_path / "page.html"
    options = ("--decode", 1, "--context-len", 24, "--html", page)
    found = values(tinytrain, data, *options)
    assert (found["train"]["documents"], len(found["windows"])) == (20, 1)
    assert page.is_file()


def test_bytes_are_counted_for_each_split(tinytrain: Cli, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data")
    vocabulary = {f"{token:02}": token for token in range(100)}  # two bytes each
    tokenizer = {"model": {"type": "BPE", "vocab": vocabulary}, "decoder": {"type": "ByteLevel"}, "added_tokens": []}
    (data / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = values(tinytrain, data)
    for split in (found["train"], *found["evaluation"].values()):
        assert (split["bytes"], split["bytes_per_token"]) == (2 * split["tokens"], 2.0)
    assert re.search(r"^ *train .* 2\.000 ", tinytrain("data", data)[1], re.MULTILINE)


def test_ids_that_are_not_used_are_named_up_to_a_number(tinytrain: Cli, tmp_path: Path) -> None:
    path = save_tokens(tmp_path / "t.npy", [0, 1, 2])
    for unused, end in {text.UNUSED: "id 10", text.UNUSED + 1: "id 10, ..."}.items():
        out = tinytrain("data", path, "--vocab-size", 3 + unused)[1]
        (line,) = re.findall(r"ids never used  (.*)", out)
        assert line.startswith(f"{unused} of {3 + unused} (")
        assert line.endswith(f"id 9, {end}")


def test_notes_tell_what_training_would_refuse_and_what_is_left_out(tinytrain: Cli, tmp_path: Path) -> None:
    path = save_tokens(tmp_path / "t.npy", [1, 60, 1], "uint32")
    (warning,) = (note for note in values(tinytrain, path, "--vocab-size", 50)["notes"] if "outside" in note)
    assert warning.startswith("WARNING: all has 1 token(s) outside 0 .. 49, the first is id 60 (token 1), so training")


def test_a_stated_type_that_gives_odd_ids_is_questioned(tinytrain: Cli, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(1, 50_000, 1000)
    for written, stated, doubt in (
        ("uint16", "uint32", "all: WARNING: most ids are above 1,048,576,"),
        ("uint32", "uint16", "all: WARNING: every second token is id 0,"),
        ("uint16", "uint16", ""),
        ("uint32", "int32", ""),
    ):
        ids.astype(written).tofile(tmp_path / "t.bin")
        notes = " ".join(values(tinytrain, tmp_path / "t.bin", "--token-dtype", stated)["notes"])
        assert ("check token_dtype" in notes) == bool(doubt), (written, stated)
        assert doubt in notes


def test_masks_of_a_source_are_counted_and_wrong_values_are_named(tinytrain: Cli, tmp_path: Path) -> None:
    path = save_documents(tmp_path / "t.npy", [[3] * 50, [4] * 50])
    mask = np.zeros(100, np.uint8)
    mask[10:47] = 1
    np.save(tmp_path / "t.mask.npy", mask)
    found = values(tinytrain, path, "--val-data", path, "--context-len", 20)
    assert [each["sources"][0]["counted_tokens"] for each in (found["train"], found["evaluation"]["t.npy"])] == [37, 37]
    assert "37.00 %" in tinytrain("data", path)[1]
    mask[98] = 2
    np.save(tmp_path / "t.mask.npy", mask)
    code, _, err = tinytrain("data", path)
    assert (code, f"{tmp_path / 't.mask.npy'}: has the value 2 at position 98, but a mask" in err) == (2, True), err


def test_a_plain_terminal_has_no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for terminal, wanted in {"xterm": True, "dumb": False}.items():
        monkeypatch.setenv("TERM", terminal)
        assert windows.uses_colour() == wanted


# --- the page ------------------------------------------------------------------------------------------------------


def test_bars_are_shares_of_windows_and_lengths_of_documents() -> None:
    ngrams, found = np.array([0, 10, 10, 10, 10, 20]), np.array([0, 0, 1, 2, 10, 1])
    assert charts.share_bins(ngrams, found) == [2, 2, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    lengths = LengthHistogram()
    lengths.add(np.array([4, 5, 7, 8, 40]))
    assert charts.length_bins(lengths) == ([4, 8, 16, 32, 64], [3, 1, 0, 1])


def test_a_single_document_among_many_has_a_visible_bar() -> None:
    drawing = charts.draw_bars("name", "title", ["a", "b", "c"], [10**6, 1, 0], "below")
    heights = [float(height) for height in re.findall(r'<rect [^>]* height="([0-9.]+)"', drawing)]
    assert heights[0] > 50
    assert heights[1:] == [1.0, 0.0]


def test_frequencies_fall_from_left_to_right() -> None:
    drawing = charts.draw_frequencies(np.array([0, 5, 1000, 1, 70]))
    (path,) = re.findall(r'd="M([^"]+)"', drawing)
    points = [tuple(map(float, point.split(","))) for point in path.split("L")]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted(y for _, y in points), "y grows downwards"
    assert len(points) == 4


def test_tokens_that_do_not_count_are_underlined_on_the_page(tinytrain: Cli, tmp_path: Path) -> None:
    path = save_documents(tmp_path / "t.npy", [[3] * 10 + [4] * 15])
    np.save(tmp_path / "t.mask.npy", np.repeat([0, 1], [10, 15]).astype(np.uint8))
    page = tmp_path / "p.html"
    assert tinytrain("data", path, "--html", page, "--decode", 1, "--context-len", 24)[0] == 0
    uncounted = re.findall(r'<span class="uncounted">(.*?)</span>', page.read_text(), re.DOTALL)
    assert [each.split() for each in uncounted] == [["3"] * 10]
