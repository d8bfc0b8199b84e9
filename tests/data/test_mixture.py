"""Owns the checks of several token files: which file and window a slot draws, and that runs on them keep the promises.

Must not know how a file is read; equalities between runs are real runs on some ranks.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.ranks import run_ranks
from tests.helpers.training import TINY, Run, train
from tinytrain_dist.config.loading import load_config, parse_command_line, resolve_vocab_size
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.data.sampling import window_starts
from tinytrain_dist.data.token_dataset import TokenDataset, read_windows, short_names
from tinytrain_dist.errors import ConfigError, DataError, TinytrainError

CONTEXT = 7


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three files in which each id says file and place: of 27, 57 and 107 tokens, so 20, 50 and 100 windows."""
    folder = tmp_path_factory.mktemp("files")
    kinds = [(27, "uint16", 1000), (57, "uint32", 2000), (107, "int64", 3000)]
    for number, (count, dtype, base) in enumerate(kinds):
        np.save(folder / f"{number}.npy", np.arange(base, base + count, dtype=dtype))
    return [str(folder / f"{number}.npy") for number in range(3)]


# --- the draw ------------------------------------------------------------------------------------------------------


def test_one_file_draws_the_windows_it_always_drew(files: list[str]) -> None:
    for path in files:
        source = TokenDataset([path], CONTEXT)
        chosen, starts = source.draw(1, 2, [0, 1, 2, 3, 10])
        assert not chosen.any()
        assert starts.tolist() == window_starts(1, 2, [0, 1, 2, 3, 10], source.windows[0]).tolist()
    frozen = [[13, 7, 3, 9, 6], [3, 27, 3, 39, 36], [53, 27, 3, 89, 86]]
    drawn = [TokenDataset([path], CONTEXT).draw(1, 2, [0, 1, 2, 3, 10])[1].tolist() for path in files]
    assert drawn == frozen, "a run on one file, when resumed, would continue with other windows"


def test_the_draw_of_a_mixture_is_pinned(files: list[str]) -> None:
    chosen, starts = TokenDataset(files, CONTEXT, weights=[0.2, 0.5, 0.3]).draw(1, 2, range(8))
    assert [chosen.tolist(), starts.tolist()] == [PINNED_FILES, PINNED_STARTS], (
        "a run on several files, when resumed, would continue with other windows: say so in CHANGELOG.md"
    )


PINNED_FILES = [0, 2, 2, 1, 1, 1, 0, 1]
PINNED_STARTS = [13, 27, 3, 39, 33, 29, 12, 33]


@given(
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**40),
    slots=st.lists(st.integers(0, 2**20), unique=True, min_size=1, max_size=12),
    weights=st.none() | st.lists(st.floats(0.01, 10), min_size=3, max_size=3),
)
def test_a_slots_file_and_window_do_not_depend_on_the_others(
    files: list[str], seed: int, step: int, slots: list[int], weights: list[float] | None
) -> None:
    source = TokenDataset(files, CONTEXT, weights=weights)
    alone = [tuple(int(part[0]) for part in source.draw(seed, step, [slot])) for slot in slots]
    assert list(zip(*(part.tolist() for part in source.draw(seed, step, slots)), strict=True)) == alone
    assert all(0 <= start < source.windows[file] for file, start in alone)


def chi_square(counts: Any, expected: Any) -> float:
    expected = np.asarray(expected)
    return float(((np.asarray(counts) - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("weights", [None, [0.7, 0.2, 0.1], [7.0, 2.0, 1.0], [1.0, 0.0, 3.0]])
def test_weights_are_kept_and_every_window_of_a_file_is_equally_likely(
    files: list[str], weights: list[float] | None
) -> None:
    source, draws = TokenDataset(files, CONTEXT, weights=weights), 60_000
    chosen, starts = source.draw(3, 0, range(draws))
    shares = np.array(weights or source.windows) / sum(weights or source.windows)
    counts = np.bincount(chosen, minlength=3)
    assert (counts[shares == 0] == 0).all()
    used = shares > 0
    assert (
        chi_square(counts[used], draws * shares[used]) < 13.8
    )  # 2 degrees of freedom: once in 1000 seeds; it is fixed
    for file, windows in enumerate(source.windows):
        if shares[file]:
            here = np.bincount(starts[chosen == file], minlength=windows)
            assert len(here) == windows
            assert chi_square(here, counts[file] / windows) < windows + 4.5 * (2 * windows) ** 0.5


def test_the_file_says_nothing_about_the_window(tmp_path: Path) -> None:
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.arange(11, dtype=np.uint16))
    chosen, starts = TokenDataset([str(tmp_path / "a.npy"), str(tmp_path / "b.npy")], 1).draw(5, 0, range(40_000))
    table = np.histogram2d(chosen, starts, bins=(2, 10))[0]
    assert chi_square(table, np.full((2, 10), 2000)) < 43.8  # 19 degrees of freedom


def test_what_is_drawn_is_what_is_read(files: list[str]) -> None:
    source = TokenDataset(files, CONTEXT)
    chosen, starts = source.draw(0, 0, range(50))
    assert set(chosen.tolist()) == {0, 1, 2}
    rows = source.read(chosen, starts)
    first = (np.array([1000, 2000, 3000])[chosen] + starts)[:, None]
    assert rows.tolist() == (first + np.arange(CONTEXT + 1)).tolist()
    one = TokenDataset(files[:1], CONTEXT)
    drawn = one.draw(0, 0, range(9))
    by_array = read_windows(np.load(files[0]), drawn[1], CONTEXT)
    assert one.read(*drawn).dtype == by_array.dtype
    assert one.read(*drawn).equal(by_array)


def test_places_name_the_file_by_what_tells_it_apart(files: list[str]) -> None:
    source = TokenDataset(files, CONTEXT)
    chosen, starts = source.draw(0, 4, [2, 9])
    assert source.places(0, 4, [2, 9]) == [f"{chosen[0]}.npy:{starts[0]}", f"{chosen[1]}.npy:{starts[1]}"]
    assert short_names([]) == []  # a run without val_data
    assert short_names(["x/train.npy"]) == ["train.npy"]
    assert short_names(["x/a/train.npy", "x/b/train.npy"]) == ["a/train.npy", "b/train.npy"]
    assert short_names(["/d/train.npy", "/d/b/train.npy"]) == ["train.npy", "b/train.npy"]


def test_a_file_that_is_too_short_or_of_another_vocabulary_is_named(files: list[str], tmp_path: Path) -> None:
    short = str(tmp_path / "short.npy")
    np.save(short, np.arange(CONTEXT, dtype=np.uint16))
    with pytest.raises(DataError, match=r"short\.npy: has 7 tokens, but context_len 7 needs at least 8"):
        TokenDataset([files[0], short], CONTEXT)
    with pytest.raises(DataError, match=r"2\.npy: holds token id 3106, but vocab_size 3000"):
        TokenDataset(files, CONTEXT, vocab_size=3000)


def test_a_file_cut_short_while_training_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    np.save(path, np.arange(1000, dtype=np.uint16))
    source = TokenDataset([str(path)], CONTEXT)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"t\.npy: has become shorter since the run began"):
        source.read(np.array([0]), np.array([900]))


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"train_weights": [1.0]}, "train_weights: has no effect without several files"),
        ({"train_data": "a", "train_weights": [1, 2]}, "train_weights: has no effect without several files"),
        ({"train_data": ["a", "b"], "train_weights": [1]}, "train_weights: 1 numbers for 2 files"),
        ({"train_data": ["a", "b"], "train_weights": [1, -1]}, r"train_weights: \[1.0, -1.0\] must be"),
        ({"train_data": ["a", "b"], "train_weights": [0, 0]}, r"train_weights: \[0.0, 0.0\] must be"),
        ({"train_data": ["a", "b"], "train_weights": [1, math.nan]}, r"train_weights: \[1.0, nan\] must be"),
        ({"train_data": ["a", "b"], "train_weights": [1, math.inf]}, r"train_weights: \[1.0, inf\] must be"),
        ({"train_data": ["a", "b", "a"]}, "train_data: contains a twice"),
        ({"val_data": ["a", "a"]}, "val_data: contains a twice"),
        ({"early_stop_patience": 3}, "early_stop_patience: has no effect without val_data"),
        ({"early_stop_patience": 0, "val_data": "a"}, "early_stop_patience: 0 must be at least 1"),
        ({"keep_every": 1500, "ckpt_every": 1000}, "keep_every: 1500 is not a multiple of ckpt_every 1000"),
    ],
)
def test_settings_that_do_not_fit_are_sentences(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        TrainingConfig(**settings)


def test_lists_come_back_from_toml_and_from_the_command_line(tmp_path: Path) -> None:
    config = TrainingConfig(train_data=["a b.npy", "b.npy"], train_weights=[1, 2.5], val_data=("c.npy",), vocab_size=9)  # type: ignore[arg-type]
    assert config.train_data == ("a b.npy", "b.npy")
    assert config.train_weights == (1.0, 2.5)
    assert hash(config)
    path = tmp_path / "run.toml"
    path.write_text(config.to_toml())
    again = load_config(path)
    assert (again.train_data, again.train_weights, again.val_data) == (
        config.train_data,
        config.train_weights,
        config.val_data,
    )
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    given = parse_command_line("--train-data x.npy y.npy --train_weights 3 1 --val-data z.npy --seed 4".split())
    assert (given.train_data, given.train_weights, given.val_data) == (("x.npy", "y.npy"), (3.0, 1.0), "z.npy")
    assert (given.train_files, given.val_files) == (("x.npy", "y.npy"), ("z.npy",))


def test_the_vocabulary_of_several_files(tmp_path: Path) -> None:
    for name, size, digest in (("a", 10, "1"), ("b", 20, "1"), ("c", 10, "2")):
        (tmp_path / name).mkdir()
        meta = {"vocab_size": size, "digests": {"tokenizer.json": digest}}
        (tmp_path / name / "meta.json").write_text(json.dumps(meta))
    a, b, c = (str(tmp_path / name / "train.npy") for name in "abc")
    assert resolve_vocab_size(TrainingConfig(train_data=(a, b))).vocab_size == 20
    assert resolve_vocab_size(TrainingConfig(train_data=(a,), val_data=b)).vocab_size == 10
    with pytest.raises(ConfigError, match=r"vocab_size: 15 is less than the 20 in .*/b/meta\.json"):
        resolve_vocab_size(TrainingConfig(train_data=(a, b), vocab_size=15))
    for other in ({"train_data": (a, c)}, {"train_data": a, "val_data": c}):
        with pytest.raises(ConfigError, match=r"/a and .*/c were made with different tokenizers"):
            resolve_vocab_size(TrainingConfig(**other))


# --- runs ----------------------------------------------------------------------------------------------------------

VOCABULARY = 53
SIZES = np.array([0] + [1 + number % 4 for number in range(1, VOCABULARY)])


def mixture(folder: Path) -> dict[str, Any]:
    """Settings of a run on two files of different type and length, with two files to evaluate on."""
    rng = np.random.default_rng(7)
    for name, count, dtype in (("a", 3000, "uint16"), ("b", 900, "int32")):
        (folder / name).mkdir(exist_ok=True)
        for side in ("train", "val"):
            np.save(folder / name / f"{side}.npy", rng.integers(0, VOCABULARY, count).astype(dtype))
    return {
        **TINY,
        "vocab_size": VOCABULARY,
        "reproducible": True,
        "train_data": [str(folder / name / "train.npy") for name in "ab"],
        "train_weights": [0.6, 0.4],
        "val_data": [str(folder / name / "val.npy") for name in "ab"],
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Run]:
    """A run of one rank on a mixture, with a table of the bytes of each id beside the data."""
    folder = tmp_path_factory.mktemp("mixture")
    settings = mixture(folder)
    np.save(folder / "a" / "token_bytes.npy", SIZES)
    return folder, settings, train(folder, "whole", 1, **settings)


def curves(run: Run) -> dict[str, list[float]]:
    kinds = {"loss": "train", "grad_norm": "train"}
    values = {name: run.values(kind, name) for name, kind in kinds.items()}
    return values | {f"eval {name}": run.values("eval", name) for name in ("loss", "loss/a/val.npy", "bits_per_byte")}


@pytest.mark.multiprocess
def test_two_ranks_and_a_resume_in_the_middle_give_the_same_run(whole: tuple[Path, dict[str, Any], Run]) -> None:
    folder, settings, expected = whole
    part = train(folder, "run", 2, **settings, stop_at_step=4)
    assert part.checkpoint.name == "checkpoint-00000004"
    again = train(folder, "run", 2, **settings)
    assert again.digests() == expected.digests()
    both = curves(again)
    del both["eval loss"], both["eval loss/a/val.npy"], both["eval bits_per_byte"]  # step 4 has one more
    assert both == {name: value for name, value in curves(expected).items() if name in both}
    evals = {r["step"]: r for r in again.records if r["kind"] == "eval"}
    for record in (r for r in expected.records if r["kind"] == "eval"):
        for name in ("loss", "loss/a/val.npy", "loss/b/val.npy", "bits_per_byte"):
            assert evals[record["step"]][name] == record[name]


@pytest.mark.multiprocess
def test_evaluation_of_several_files_and_bits_per_byte(whole: tuple[Path, dict[str, Any], Run]) -> None:
    _, settings, run = whole
    (record, *_) = (r for r in run.records if r["kind"] == "eval")
    assert record["loss"] == pytest.approx((record["loss/a/val.npy"] + record["loss/b/val.npy"]) / 2, rel=1e-12)
    assert record["loss/a/val.npy"] != record["loss/b/val.npy"]
    slots, context = range(TINY["batch_size"]), TINY["context_len"]
    sources = [TokenDataset([path], context) for path in settings["val_data"]]
    targets = [source.read(*source.draw(0, 0, slots, 1))[:, 1:].numpy() for source in sources]
    size = sum(int(SIZES[ids].sum()) for ids in targets)
    nats = record["loss"] * 2 * len(slots) * context
    assert record["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-12)
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = board.EventAccumulator(str(run.folder / "logs"))
    events.Reload()
    assert {"eval/bits_per_byte", "eval/loss/a/val.npy", "eval/loss/b/val.npy"} <= set(events.Tags()["scalars"])
    assert events.Scalars("eval/bits_per_byte")[0].value == pytest.approx(record["bits_per_byte"], rel=1e-6)


def refusals(many: list[dict[str, Any]]) -> list[str]:
    """On a rank: why each of these runs is refused, or nothing."""
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.training.trainer import Trainer

    context, found = init_distributed("cpu"), []
    for settings in many:
        try:
            Trainer.build(TrainingConfig(**settings), context).fit()
            found.append("")
        except TinytrainError as error:
            found.append(str(error))
    return found


@pytest.mark.multiprocess
def test_other_files_order_or_weights_are_another_run_unless_allowed(
    whole: tuple[Path, dict[str, Any], Run], tmp_path: Path
) -> None:
    folder, settings, run = whole
    state = json.loads((run.checkpoint / "trainer_state.json").read_text())
    assert [file["tokens"] for file in state["data"]["train"]] == [3000, 900]
    shutil.copytree(folder, tmp_path / "copy")
    base = {**settings, "target_dir": str(tmp_path / "copy" / "whole"), "total_steps": 7}
    changed = tmp_path / "copy" / "b" / "train.npy"
    ids = np.load(changed)
    ids[-1] ^= 1
    np.save(changed, ids)
    reordered = {**base, "train_data": settings["train_data"][::-1]}
    cases = [
        {**base, "train_weights": [0.5, 0.5]},
        {**base, "train_weights": None},
        reordered,
        {**base, "train_data": [settings["train_data"][0], str(changed)]},
        {**base, "train_data": settings["train_data"][0], "train_weights": None},
        {**reordered, "allow": "train_data"},
    ]
    found = run_ranks(1, refusals, cases)[0]
    for message in found[:2]:
        assert "train_weights: [0.6, 0.4] in the checkpoint" in message
        assert "train_data:" not in message
    for message in found[2:5]:
        assert "train_data: {'train': [{" in message
    assert found[5] == ""


@pytest.mark.multiprocess
def test_a_checkpoint_of_one_file_is_noted_as_ever(tmp_path: Path) -> None:
    settings = mixture(tmp_path)
    one = {"train_data": settings["train_data"][0], "train_weights": None, "val_data": settings["val_data"][0]}
    run = train(tmp_path, "one", 1, **{**settings, **one})
    state = json.loads((run.checkpoint / "trainer_state.json").read_text())
    assert state["data"]["train"] == TokenDataset([one["train_data"]], 4).fingerprints[0]
    (record, *_) = (r for r in run.records if r["kind"] == "eval")
    assert record.keys() == {"kind", "step", "time", "loss", "perplexity", "seconds"}, "no table, no bits per byte"
    listed = train(tmp_path, "one", 1, **{**settings, **one, "train_data": [one["train_data"]], "total_steps": 7})
    assert listed.values("resumed", "step") == [6]
