"""Owns the tools that look at runs: ls, verify, hash, compare, sample, export, plot and schedule, on one tiny real run.

Must not know how training works: the run is made once, tests copy it and break the copy.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.training import TINY, in_older_format, train
from tinytrain_dist import CheckpointError, TrainingConfig, TransformerLM
from tinytrain_dist.checkpoint import digests, discovery, load_model
from tinytrain_dist.checkpoint.sharded_io import write_checkpoint
from tinytrain_dist.checkpoint.state import collect_shards
from tinytrain_dist.cli import ls, main, plot, sample
from tinytrain_dist.cli.schedule import chart
from tinytrain_dist.config import run_folder
from tinytrain_dist.model.hf_config import to_hf_config
from tinytrain_dist.training import generation

TEXT = "def add(a, b):\n    return a + b  # naïve — 加法 \U0001f600\n"
EOS = 0
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs over the same byte-level text: `one`, `split` (many small files) and `other` (another lr)."""
    pytest.importorskip("tokenizers")
    from tinytrain_dist.data.preparation.tokenizer import Encoder, train_bpe

    folder = tmp_path_factory.mktemp("runs")
    vocabulary = train_bpe([TEXT], 280)
    ids = np.append(Encoder(vocabulary, use_fast=False).encode(TEXT), vocabulary.eos_id).astype(np.uint16)
    assert vocabulary.eos_id == EOS
    for name in ("train", "val"):
        np.save(folder / f"{name}.npy", np.tile(ids, 40))
    (folder / "meta.json").write_text(json.dumps({"vocab_size": vocabulary.size, "eos_id": vocabulary.eos_id}))
    (folder / "tokenizer.json").write_text(vocabulary.text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for name, overrides in (("one", {}), ("split", {"max_shard_bytes": 8000}), ("other", {"lr_max": 0.02})):
        train(folder, name, 1, **overrides)
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """A copy of `one` that a test may break."""
    return Path(shutil.copytree(folder / "one", tmp_path / "run"))


@pytest.fixture
def tinytrain(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command line; its exit code, stdout and stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def newest(run: Path) -> Path:
    return run / "checkpoints" / "checkpoint-00000006"


def flip_bit(path: Path, back: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[-back] ^= 1
    path.write_bytes(data)


def weights_file(checkpoint: Path) -> Path:
    return next(checkpoint.glob("model-*.safetensors"))


# ---------------------------------------------------------------- cli


def test_every_verb_has_an_entry() -> None:
    for module, _, entry in (home.partition(":") for home, _ in main.VERBS.values()):
        assert callable(getattr(import_module(module), entry))


def test_an_unknown_verb_gets_the_nearest(tinytrain: Cli) -> None:
    code, _, err = tinytrain("verfy")
    assert code == 2
    assert "did you mean verify?" in err


@pytest.mark.parametrize("verb", ["ls", "verify", "hash", "sample", "plot"])
def test_a_place_without_a_run_is_an_error(tinytrain: Cli, tmp_path: Path, verb: str) -> None:
    missing = tmp_path / "nothing-here"
    code, out, err = tinytrain(verb, missing)
    assert (code, out) == (2, "")
    assert f"error: {missing}: is not a folder; give a run" in err
    code, _, err = tinytrain(verb, tmp_path)
    assert code == 2
    assert "holds neither a run nor a checkpoint" in err


def test_a_reader_that_leaves_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(_: list[str]) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(ls, "main", broken)
    with open(tmp_path / "out", "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main.main(["ls"]) == 141


def test_what_the_system_refuses_is_said_without_a_traceback(tinytrain: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: list[str]) -> int:
        raise PermissionError(13, "Permission denied", "runs")

    monkeypatch.setattr(ls, "main", refused)
    assert tinytrain("ls") == (1, "", "error: [Errno 13] Permission denied: 'runs'\n")


# ---------------------------------------------------------------- ls


def lines_with(text: str, word: str) -> list[str]:
    return [line for line in text.splitlines() if word in line]


def test_ls_shows_each_checkpoint(tinytrain: Cli, folder: Path) -> None:
    code, out, _ = tinytrain("ls", folder / "one")
    assert code == 0
    evals = {
        r["step"]: r["loss"] for r in run_folder.read_records(folder / "one/logs/metrics.jsonl") if r["kind"] == "eval"
    }
    for step in (3, 6):
        (line,) = lines_with(out, f"checkpoint-{step:08d}")
        assert f"{evals[step]:.4f}" in line
        assert "yes, by size" in line
    assert tinytrain("ls", folder / "one" / "checkpoints")[1].count("checkpoint-0") == 2
    assert tinytrain("ls", newest(folder / "one"))[1].count("checkpoint-0") == 1


def test_ls_never_shows_an_older_evaluation_as_this_one(tinytrain: Cli, run: Path) -> None:
    path = run / "logs" / "metrics.jsonl"
    kept = [line for line in path.read_text().splitlines() if not ('"eval"' in line and '"step": 6' in line)]
    path.write_text("\n".join(kept))
    (line,) = lines_with(tinytrain("ls", run)[1], "checkpoint-00000006")
    assert " at 3 " in line


def test_ls_names_what_is_damaged_or_unfinished(tinytrain: Cli, run: Path) -> None:
    weights = weights_file(newest(run))
    weights.write_bytes(weights.read_bytes()[:-1])
    shutil.copytree(newest(run), run / "checkpoints/checkpoint-00000009.tmp")
    shutil.copytree(newest(run), run / "checkpoints/checkpoint-00000002.damaged")
    _, out, _ = tinytrain("ls", run)
    assert "DAMAGED: model-" in lines_with(out, "checkpoint-00000006")[0]
    assert "unfinished" in lines_with(out, "checkpoint-00000009.tmp")[0]
    assert "set aside" in lines_with(out, "checkpoint-00000002.damaged")[0]
    assert "yes" in lines_with(out, "checkpoint-00000003")[0]


def test_only_full_ls_sees_a_flipped_bit(tinytrain: Cli, run: Path) -> None:
    flip_bit(weights_file(newest(run)))
    assert "DAMAGED" not in tinytrain("ls", run)[1]
    out = tinytrain("ls", run, "--full")[1]
    assert "DAMAGED" in lines_with(out, "checkpoint-00000006")[0]
    assert "yes, every byte" in lines_with(out, "checkpoint-00000003")[0]


def test_ls_of_a_folder_lists_its_runs(tinytrain: Cli, folder: Path, tmp_path: Path) -> None:
    for name in ("finished", "killed", "failed", "stopped"):
        shutil.copytree(folder / "one", tmp_path / name)
    (tmp_path / "killed" / "state.json").unlink()
    (tmp_path / "stopped" / "state.json").write_text('{"state": "preempted", "step": 6}')
    (tmp_path / "failed" / "state.json").unlink()
    (tmp_path / "failed" / "error.json").write_text("{}")
    _, out, _ = tinytrain("ls", tmp_path)
    loss = [r["loss"] for r in run_folder.read_records(folder / "one/logs/metrics.jsonl") if r["kind"] == "train"][-1]
    states = {"finished": "done", "killed": "running or killed", "failed": "failed", "stopped": "preempted"}
    for name, state in states.items():
        (line,) = re.findall(rf"^ *{name} +{state} .*", out, re.M)
        assert f"{loss:.4f}" in line


def test_a_run_may_be_named_like_a_checkpoint(tinytrain: Cli, folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "one", tmp_path / "try-20260101")
    assert tinytrain("ls", run)[1].count("checkpoint-0") == 2
    assert "try-20260101" in tinytrain("ls", tmp_path)[1]


def test_checkpoints_and_records_are_found_where_the_settings_put_them(tinytrain: Cli, folder: Path) -> None:
    run = folder / "elsewhere"
    shutil.copytree(folder / "one", run)
    (run / "checkpoints").rename(run / "kept")
    (run / "logs" / "metrics.jsonl").rename(run / "numbers.jsonl")
    config = (run / "config.toml").read_text()
    config = config.replace("[checkpoint]", f"[checkpoint]\nckpt_dir = {json.dumps(str(run / 'kept'))}")
    config = config.replace('"metrics"', f'"numbers"\nlog_dir = {json.dumps(str(run))}')
    (run / "config.toml").write_text(config)
    assert tinytrain("ls", run)[1].count("checkpoint-0") == 2
    assert len(run_folder.read_records(run_folder.open_run(run).records)) > 6
    shutil.rmtree(run)


# ---------------------------------------------------------------- verify


def test_verify_reads_every_byte(tinytrain: Cli, run: Path) -> None:
    code, out, _ = tinytrain("verify", run)
    assert (code, out.count("ok "), out.count("GB/s")) == (0, 2, 2)
    flip_bit(weights_file(newest(run)))
    code, out, _ = tinytrain("verify", run)
    assert (code, out.count("ok ")) == (1, 1)
    assert f"DAMAGED  {newest(run)}" in out
    assert tinytrain("verify", newest(run))[0] == 1
    assert tinytrain("verify", run / "checkpoints" / "checkpoint-00000003")[0] == 0


def test_verify_does_not_count_what_a_resume_ignores(tinytrain: Cli, run: Path) -> None:
    (run / "checkpoints" / "checkpoint-00000009.tmp").mkdir()
    code, out, _ = tinytrain("verify", run)
    assert code == 0
    assert "skipped" in lines_with(out, "checkpoint-00000009.tmp")[0]
    assert tinytrain("verify", run / "checkpoints" / "checkpoint-00000009.tmp")[0] == 1


def test_verify_without_checkpoints_is_an_error(tinytrain: Cli, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    code, _, err = tinytrain("verify", run)
    assert code == 2
    assert "no checkpoint to verify" in err


# ---------------------------------------------------------------- hash


def test_the_hash_does_not_depend_on_files(tinytrain: Cli, folder: Path) -> None:
    files = [len(list(newest(folder / name).glob("*.safetensors"))) for name in ("one", "split")]
    assert files[0] < files[1], "the second run must be cut into more files, or this proves nothing"
    one, split, other = (tinytrain("hash", folder / name) for name in ("one", "split", "other"))
    assert one[:2] == split[:2]
    assert [line.split()[0] for line in one[1].splitlines()] == ["weights", "optimizer"]
    for mine, theirs in zip(one[1].splitlines(), other[1].splitlines(), strict=True):
        assert mine != theirs
    assert tinytrain("hash", newest(folder / "one"))[1] == one[1]
    assert tinytrain("hash", "--recompute", folder / "one") == one


def test_recomputing_the_hash_does_not_trust_the_manifest(tinytrain: Cli, run: Path) -> None:
    before = tinytrain("hash", run)
    flip_bit(weights_file(newest(run)))
    assert tinytrain("hash", run) == before
    code, out, err = tinytrain("hash", "--recompute", run)
    assert code == 1
    assert out.splitlines()[0] != before[1].splitlines()[0]
    assert out.splitlines()[1] == before[1].splitlines()[1]
    assert "DAMAGED" in err


@pytest.mark.parametrize("number", [1, 2])
def test_an_older_manifest_is_no_difference(
    tinytrain: Cli, folder: Path, run: Path, tmp_path: Path, number: int
) -> None:
    in_older_format(newest(run), number)
    for options in ([], ["--recompute"]):
        assert tinytrain("hash", *options, run)[:2] == tinytrain("hash", folder / "one")[:2]
    for pair in ((run, folder / "one"), (folder / "split", run), (newest(run), newest(run))):
        code, out, _ = tinytrain("compare", *pair)
        assert (code, out.count("to the bit, ")) == (0, 2), out
    assert tinytrain("compare", run, folder / "other")[0] == 1
    assert tinytrain("export", run, run / "out", "--no-check")[0] == 0
    assert tinytrain("verify", run)[0] == 0
    flip_bit(weights_file(newest(run)))
    for command in (["hash", run], ["compare", run, newest(folder / "one")]):
        code, _, err = tinytrain(*command)
        assert code == 2
        assert "is not what manifest.json says" in err
    assert "is not what was saved" in tinytrain("export", run, run / "again", "--no-check")[2]
    assert "has sha256" in tinytrain("verify", run)[1]


def test_the_hash_includes_numbers_of_the_optimizer(tmp_path: Path) -> None:
    def digest(count: int) -> str:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.state[model.weight]["count"] = count
        pieces, values = collect_shards(model, optimizer)
        write_checkpoint(tmp_path / str(count), pieces, {"step": count, "optimizer": values})
        return digests.state_digest(digests.tensor_entries(tmp_path / str(count))["optimizer"])

    assert digest(3) != digest(4)


# ---------------------------------------------------------------- compare


def test_compare_finds_nothing_between_equal_runs(tinytrain: Cli, folder: Path) -> None:
    code, out, _ = tinytrain("compare", folder / "one", folder / "split")
    assert code == 0
    assert out.count("the same to the bit") == 5  # loss, norm, eval loss, weights, optimizer
    assert "max_shard_bytes" in out  # settings are told, and decide nothing
    assert "target_dir" not in out


@pytest.mark.parametrize(("kind", "key", "title"), [("train", "loss", "loss"), ("train", "grad_norm", "gradient norm")])
def test_compare_finds_the_first_bit_that_differs(
    tinytrain: Cli, folder: Path, run: Path, kind: str, key: str, title: str
) -> None:
    path = run / "logs" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["kind"] == kind and record["step"] in (4, 5):
            record[key] = math.nextafter(record[key], math.inf)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    code, out, _ = tinytrain("compare", folder / "one", run)
    assert code == 1
    (line,) = lines_with(out, "first differs")
    assert line.startswith(title)
    assert "at step 4:" in line
    assert line.endswith("at the last common step 6 by 0")
    assert out.splitlines()[-1] == "different"


def test_compare_tells_settings_and_machines_apart(tinytrain: Cli, folder: Path, run: Path) -> None:
    environment = json.loads((run / "environment.json").read_text())
    environment["torch"] = "0.1"
    environment["ranks"] *= 2
    (run / "environment.json").write_text(json.dumps(environment))
    code, out, _ = tinytrain("compare", folder / "other", run)
    assert code == 1
    assert "first differs at step 2" in lines_with(out, "loss")[0]  # the first loss comes before the first update
    assert "lr_max: 0.02 and 0.01" in out
    assert "and 0.1" in lines_with(out, "torch: ")[0]
    assert " and 2: " in lines_with(out, "ranks: ")[0]
    assert "pid" not in out


def test_runs_of_other_lengths_are_compared_where_both_are(tinytrain: Cli, folder: Path, run: Path) -> None:
    path = run / "logs" / "metrics.jsonl"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if json.loads(line)["step"] <= 4))
    shutil.rmtree(newest(run))
    code, out, _ = tinytrain("compare", folder / "one", run)
    assert code == 0
    assert "steps, 1 to 4" in out
    assert "ends at step 6, the second at step 4" in out
    assert "checkpoints at step 3" in out
    path.write_text("")
    code, _, err = tinytrain("compare", folder / "one", run)
    assert code == 2
    assert "no step was logged in both (steps 1 to 6 and nothing logged)" in err


def test_compare_of_checkpoints_names_tensors(tinytrain: Cli, folder: Path) -> None:
    code, out, _ = tinytrain("compare", newest(folder / "one"), newest(folder / "split"))
    assert code == 0
    code, out, _ = tinytrain("compare", newest(folder / "one"), folder / "one/checkpoints/checkpoint-00000003")
    assert code == 1
    (line,) = lines_with(out, "model.embed_tokens.weight: ")
    assert float(re.search(r"largest difference (\S+),", line)[1]) > 0  # type: ignore[index]
    assert "model.embed_tokens.weight.step: largest difference 3," in out
    assert "and " in out.splitlines()[-1]


# ---------------------------------------------------------------- sample


@pytest.fixture(scope="module")
def model(folder: Path) -> TransformerLM:
    return load_model.load_model(newest(folder / "one"), torch.device("cpu"))


def test_the_model_has_the_weights_of_the_checkpoint(folder: Path, model: TransformerLM) -> None:
    from tinytrain_dist.checkpoint.safetensors_io import TensorReader

    reader = TensorReader(newest(folder / "one"), "model")
    assert not torch.equal(model.lm_head.weight, TransformerLM(model.config).lm_head.weight)
    for name, value in model.state_dict().items():
        assert torch.equal(value, reader.read(name)), name


def test_the_same_seed_gives_the_same_text(tinytrain: Cli, folder: Path) -> None:
    def text(*options: object) -> str:
        code, out, err = tinytrain("sample", folder / "one", "--prompt", "def ", "--temperature", 2, *options)
        assert (code, err) == (0, "")
        assert out.startswith("def ")
        return out

    assert text("--seed", 1) == text("--seed", 1) != text("--seed", 2)
    both = tinytrain("sample", folder / "one", "--temperature", 2, "--num-samples", 2, "--prompt", "def ", "--seed", 1)[
        1
    ]
    assert both == f"--- 1 of 2 ---\n{text('--seed', 1)}\n--- 2 of 2 ---\n{text('--seed', 2)}"
    assert text("--device", "cpu", "--seed", 1) == text("--seed", 1)


def test_greedy_text_slides_its_window(model: TransformerLM) -> None:
    known = [5, 6, 7]
    for _ in range(3 * model.config.context_len):
        logits = model(torch.tensor([known[-model.config.context_len :]]))
        known.append(int(logits[0, -1].argmax()))
    assert generation.generate(model, [5, 6, 7], 3 * model.config.context_len, temperature=0) == known[3:]
    assert generation.generate(model, [5, 6, 7], 9, top_k=1) == known[3:12]
    assert generation.generate(model, [5, 6, 7], 9, top_k=None, top_p=1e-9) == known[3:12]
    stop = known[8]
    assert generation.generate(model, [5, 6, 7], 99, temperature=0, stop_id=stop) == known[3 : known.index(stop, 3)]


def test_a_long_prompt_counts_by_its_end(model: TransformerLM) -> None:
    tail = list(range(10, 10 + model.config.context_len))
    assert generation.generate(model, [3] * 40 + tail, 8, seed=4) == generation.generate(model, tail, 8, seed=4)
    assert generation.generate(model, [3, *tail[:-1]], 8, seed=4) != generation.generate(model, tail, 8, seed=4)


def test_draws_follow_the_probabilities() -> None:
    weights = np.array([0.1, 0.5, 0.0, 0.4])
    logits = torch.tensor(weights).log()

    def shares(**options: Any) -> list[float]:
        rng, settings = np.random.default_rng(0), {"temperature": 1.0, "top_k": None, "top_p": None, **options}
        drawn = [generation.draw_token(logits, rng, **settings) for _ in range(4000)]
        return [round(drawn.count(i) / len(drawn), 1) for i in range(4)]

    assert shares() == [0.1, 0.5, 0.0, 0.4]
    assert shares(top_k=2) == shares(top_p=0.9) == shares(top_p=0.51) == [0.0, 0.6, 0.0, 0.4]
    assert shares(top_p=0.5) == shares(temperature=0.01) == shares(temperature=0) == [0.0, 1.0, 0.0, 0.0]
    assert shares(temperature=1e6, top_k=2) == [0.0, 0.5, 0.0, 0.5]


def test_text_comes_in_whole_characters(folder: Path) -> None:
    tokenizer = sample.load_tokenizer(newest(folder / "one"))
    ids = tokenizer.encode(TEXT).ids
    stream = generation.TextStream(tokenizer, ids[:3])
    pieces = [stream.add(new) for new in ids[3:]]
    assert "" in pieces, "no character took several ids, so this proves nothing"
    assert "\ufffd" not in "".join(pieces)
    assert tokenizer.decode(ids[:3]) + "".join(pieces) + stream.rest() == TEXT
    half = generation.TextStream(tokenizer, [])
    shown = "".join(half.add(new) for new in tokenizer.encode("a\U0001f600").ids[:-1])
    assert (shown, half.rest()) == ("a", "\ufffd")


def test_an_empty_prompt_starts_a_document(tinytrain: Cli, folder: Path) -> None:
    code, text, _ = tinytrain("sample", folder / "one", "--max-new-tokens", 5)
    assert code == 0
    assert "<|endoftext|>" not in text
    assert text == tinytrain("sample", folder / "one", "--max-new-tokens", 5, "--prompt-ids", EOS)[1]


def test_a_prompt_from_a_terminal_that_is_not_utf8(tinytrain: Cli, folder: Path) -> None:
    escaped = "naïve".encode().decode("ascii", "surrogateescape")
    code, text, _ = tinytrain("sample", folder / "one", "--prompt", escaped)
    assert code == 0
    assert text == tinytrain("sample", folder / "one", "--prompt", "naïve")[1]


def test_without_a_tokenizer_ids_go_in_and_out(tinytrain: Cli, run: Path) -> None:
    strip_tokenizer(run)
    code, out, _ = tinytrain("sample", run, "--prompt-ids", "5, 6", "--max-new-tokens", 3, "--temperature", 2)
    assert code == 0
    assert re.fullmatch(r"5,6(,\d+){1,3}\n", out)
    code, _, err = tinytrain("sample", run, "--prompt", "def")
    assert code == 2
    assert "has no tokenizer.json; give --prompt-ids" in err


def strip_tokenizer(run: Path) -> None:
    """Write the newest checkpoint again as one of a run whose data has no tokenizer."""
    path, model = newest(run), load_model.load_model(newest(run), torch.device("cpu"))
    state, config = discovery.read_trainer_state(path), (path / "config.json").read_bytes()
    shutil.rmtree(path)
    write_checkpoint(path, collect_shards(model, None)[0], state, {"config.json": config})


def test_a_prompt_that_is_too_long_is_cut_with_a_word(tinytrain: Cli, folder: Path) -> None:
    code, _, err = tinytrain("sample", folder / "one", "--prompt", TEXT, "--max-new-tokens", 1)
    assert code == 0
    assert f"sees the last {TINY['context_len']} (context_len)" in err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--temperature", "-1"], "temperature: -1.0 must be 0"),
        (["--top-p", "0", "--top-k", "0"], "2 problems"),
        (["--num-samples", "0"], "num_samples: 0 must be at least 1"),
        (["--max-new-tokens", "0"], "max_new_tokens: 0 must be at least 1"),
        (["--seed", "-1"], "seed: -1 must be 0 or greater"),
        (["--prompt-ids", "1,x"], "'1,x' is not a list of ids"),
        (["--prompt-ids", "1,280"], "280 is not an id of this model; they go from 0 to"),
        (["--prompt-ids", "-1"], "-1 is not an id of this model"),
        (["--prompt-ids", "1", "--prompt", "a"], "are both set"),
    ],
)
def test_sample_refuses(tinytrain: Cli, folder: Path, options: list[str], complaint: str) -> None:
    code, out, err = tinytrain("sample", folder / "one", *options)
    assert (code, out) == (2, "")
    assert complaint in err


def test_sample_takes_the_newest_valid_checkpoint(tinytrain: Cli, run: Path) -> None:
    older = tinytrain("sample", run / "checkpoints/checkpoint-00000003", "--temperature", 0)
    assert older != tinytrain("sample", run, "--temperature", 0), "both checkpoints write the same: this proves nothing"
    shutil.copytree(newest(run), run / "checkpoints/checkpoint-00000009.tmp")
    flip_bit(weights_file(newest(run)))
    code, text, err = tinytrain("sample", run, "--temperature", 0)
    assert (code, text) == older[:2]
    assert "passed over, damaged" in err
    code, _, err = tinytrain("sample", newest(run))
    assert code == 2
    assert "has blake3" in err
    flip_bit(weights_file(run / "checkpoints/checkpoint-00000003"))
    assert "none of 2 checkpoint(s) is valid" in tinytrain("sample", run)[2]
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint yet" in tinytrain("sample", run)[2]


def test_a_checkpoint_without_a_configuration_is_an_error(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    write_checkpoint(tmp_path / "any", collect_shards(model, None)[0], {"step": 1})
    with pytest.raises(CheckpointError, match="says no configuration"):
        load_model.load_model(tmp_path / "any", torch.device("cpu"))


def test_text_without_tokenizers_says_what_to_install(
    tinytrain: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    code, _, err = tinytrain("sample", folder / "one")
    assert code == 2
    assert "pip install 'tinytrain_dist[prep]'" in err


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_transformers_loads_what_is_exported(tinytrain: Cli, folder: Path, tmp_path: Path, dtype: str) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "exported"
    code, text, _ = tinytrain("export", folder / "one", out, "--dtype", dtype)
    assert code == 0
    assert float(re.search(r"largest difference ([^\s;]+)", text)[1]) < 1e-4  # type: ignore[index]
    assert ("rounding to" in text) == (dtype != "float32")
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == (dtype, dtype)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {parameter.dtype for parameter in theirs.parameters()} == {getattr(torch, dtype)}
    assert transformers.AutoTokenizer.from_pretrained(out).encode(TEXT) == sample.load_tokenizer(out).encode(TEXT).ids
    names = {path.name for path in out.iterdir()}
    assert not any("optimizer" in name or "trainer" in name for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    assert tinytrain("verify", out)[0] == 0


def test_export_never_replaces(tinytrain: Cli, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    code, _, err = tinytrain("export", folder / "one", tmp_path / "mine")
    assert code == 2
    assert "exists already and is not replaced" in err
    assert (tmp_path / "mine").read_text() == "precious"
    code, _, err = tinytrain("export", folder / "one", tmp_path / "mine" / "below")
    assert code == 2
    assert "cannot be written" in err


def test_export_holds_every_tensor_against_the_manifest(tinytrain: Cli, run: Path, tmp_path: Path) -> None:
    flip_bit(weights_file(newest(run)))
    code, _, err = tinytrain("export", run, tmp_path / "out")
    assert code == 2
    assert "is not what was saved" in err
    assert not list(tmp_path.glob("out*")), "nothing is left behind"


def config_with(**overrides: Any) -> TrainingConfig:
    return TrainingConfig(**{**TINY, "vocab_size": 53, **overrides})


def written(folder: Path, model: TransformerLM, step: int, **config: Any) -> Path:
    description = {**to_hf_config(model.config), **config}
    path = folder / f"checkpoint-{step:08d}"
    files = {"config.json": json.dumps(description).encode()}
    write_checkpoint(path, collect_shards(model, None)[0], {"step": step, "config": model.config.to_dict()}, files)
    return path


def test_an_untrained_model_is_not_exported_by_accident(tinytrain: Cli, tmp_path: Path) -> None:
    path = written(tmp_path, TransformerLM(config_with()), 0)
    code, _, err = tinytrain("export", path, tmp_path / "out")
    assert code == 2
    assert "--allow-untrained" in err
    assert tinytrain("export", path, tmp_path / "out", "--allow-untrained")[0] == 0


@pytest.mark.parametrize("overrides", [{"tie_embeddings": True}, {"qk_norm": True}])
def test_other_architectures_are_exported(tinytrain: Cli, tmp_path: Path, overrides: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    path = written(tmp_path, TransformerLM(config_with(**overrides)), 1)
    code, text, _ = tinytrain("export", path, tmp_path / "out")
    assert code == 0
    assert "gives our logits" in text


def test_nothing_is_exported_that_transformers_computes_otherwise(tinytrain: Cli, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = written(tmp_path, TransformerLM(config_with()), 1, rms_norm_eps=1.0)
    code, _, err = tinytrain("export", path, tmp_path / "out")
    assert code == 2
    assert "computes other logits than we do" in err
    assert not list(tmp_path.glob("out*"))
    code, text, _ = tinytrain("export", path, tmp_path / "out", "--no-check")
    assert code == 0
    assert "not checked" in text
    path = written(tmp_path, TransformerLM(config_with()), 2, num_attention_heads=3, head_dim=16)
    code, _, err = tinytrain("export", path, tmp_path / "out2")
    assert code == 2
    assert "cannot load its export" in err


def test_values_that_the_type_cannot_hold_are_refused(tinytrain: Cli, tmp_path: Path) -> None:
    model = TransformerLM(config_with())
    model.lm_head.weight.data[0, 0] = 1e6
    path = written(tmp_path, model, 1)
    code, _, err = tinytrain("export", path, tmp_path / "out", "--dtype", "float16")
    assert code == 2
    assert "lm_head.weight reaches 1e+06" in err
    assert not (tmp_path / "out").exists()


def test_export_without_transformers_says_what_was_left_out(
    tinytrain: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, text, _ = tinytrain("export", folder / "one", tmp_path / "out")
    assert code == 0
    assert "not checked against transformers" in text


# ---------------------------------------------------------------- plot


def picture(path: Path) -> bytes:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return data


@pytest.mark.parametrize("x", ["steps", "tokens"])
def test_plot_draws_a_run(tinytrain: Cli, run: Path, x: str) -> None:
    pytest.importorskip("matplotlib")
    assert tinytrain("plot", run, "--x", x) == (0, f"{run / 'loss.png'}\n", "")
    picture(run / "loss.png")
    per_step = TINY["batch_size"] * TINY["context_len"] if x == "tokens" else 1
    curve = plot.Curve(run, "run", x)
    assert curve.x.tolist() == [step * per_step for step in range(1, 7)]
    assert curve.eval_x.tolist() == [3 * per_step, 6 * per_step]
    records = run_folder.read_records(run / "logs" / "metrics.jsonl")
    assert curve.loss.tolist() == [r["loss"] for r in records if r["kind"] == "train"]
    assert curve.eval_loss.tolist() == [r["loss"] for r in records if r["kind"] == "eval"]


def test_several_runs_need_a_name_for_the_picture(tinytrain: Cli, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = folder / "one", folder / "other"
    code, _, err = tinytrain("plot", *runs)
    assert code == 2
    assert "out: not set for 2" in err
    assert tinytrain("plot", *runs, "--out", tmp_path / "new" / "both.svg")[0] == 0
    text = (tmp_path / "new" / "both.svg").read_text()
    assert "one: train" in text
    assert "other: train" in text
    assert tinytrain("plot", runs[0], "--out", tmp_path / "one.jpg")[0] == 2
    assert tinytrain("plot")[0] == 2


def test_runs_in_folders_of_one_name_are_told_apart() -> None:
    assert plot._names([Path("a/run"), Path("b/run")]) == ["a/run", "b/run"]
    assert plot._names([Path("a/one"), Path("b/two")]) == ["one", "two"]
    assert plot._names([Path("a/run"), Path("a/run")])[0].endswith("run")


def test_losses_that_are_not_finite_are_left_out(tinytrain: Cli, run: Path) -> None:
    pytest.importorskip("matplotlib")
    path = run / "logs" / "metrics.jsonl"
    path.write_text(re.sub(r'("step": [24],.*?"loss": )[\d.]+', r"\1NaN", path.read_text()) + '{"kind": "tr')
    assert np.isnan(plot.Curve(run, "run", "steps").loss).sum() >= 2
    assert tinytrain("plot", run)[0] == 0


def test_smoothing_neither_lags_nor_invents() -> None:
    line = np.linspace(9.0, 3.0, 200)
    assert np.allclose(plot.smoothed(line)[:190], line[:190])
    assert plot.smoothed(line)[0] == line[0]
    noise = np.random.default_rng(0).normal(size=2000)
    assert plot.smoothed(noise)[100:].std() < noise.std() / 5
    holes = np.where(np.arange(200) % 7 == 3, np.nan, 1.0)
    assert np.allclose(plot.smoothed(holes)[3:], 1.0)
    assert np.isnan(plot.smoothed(np.full(5, np.nan))).all()


def test_a_run_that_logged_nothing_is_an_error(tinytrain: Cli, run: Path) -> None:
    pytest.importorskip("matplotlib")
    (run / "logs" / "metrics.jsonl").write_text("")
    assert "has no logged step yet" in tinytrain("plot", run)[2]
    (run / "logs" / "metrics.jsonl").unlink()
    assert "no record of a run" in tinytrain("plot", run)[2]


@pytest.mark.parametrize("args", [["plot", "{run}"], ["schedule", "--out", "{run}/lr.png"]])
def test_a_picture_without_matplotlib_says_what_to_install(
    tinytrain: Cli, run: Path, monkeypatch: pytest.MonkeyPatch, args: list[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = tinytrain(*(arg.format(run=run) for arg in args))
    assert code == 2
    assert "pip install 'tinytrain_dist[plot]'" in err


# ---------------------------------------------------------------- schedule


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("blocks", [" ▁▂▃▄▅▆▇█", " #"])
@pytest.mark.parametrize("steps", [1, 2, 3, 69, 300, 1_000_000])
def test_the_chart_fits_a_terminal(schedule: Any, blocks: str, steps: int) -> None:
    config = TrainingConfig(total_steps=steps, schedule=schedule, warmup_iters=steps // 5)
    lines = chart(config, blocks).splitlines()
    assert len(lines) <= 16
    assert max(map(len, lines)) <= 80
    assert ("".join(lines).isascii()) == (blocks == " #")


def test_the_chart_says_the_rates_of_the_schedule() -> None:
    config = TrainingConfig(total_steps=1000, warmup_iters=100, lr_max=1.0, lr_min=0.2)
    lines = chart(config).splitlines()
    assert [line.split()[1:3] for line in lines[-4:]] == [
        ["1", "1.000e-02"], ["100", "1.000e+00"], ["500", f"{0.6 + 0.4 * math.cos(math.pi * 4 / 9):.3e}"],
        ["1,000", "2.000e-01"],
    ]  # fmt: skip
    bars = [line[11:] for line in lines[2:10]]
    heights = [sum(1 for bar in bars if len(bar) > column and bar[column] != " ") for column in range(69)]
    top = heights.index(max(heights))
    assert top == 6  # 100 of 1,000 steps, in 69 columns
    assert heights[: top + 1] == sorted(heights[: top + 1])
    assert heights[top:] == sorted(heights[top:], reverse=True)
    assert heights[-1] == 2  # a fifth of eight rows, begun


def test_schedule_takes_settings_from_file_and_command_line(tinytrain: Cli, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[run]\ntotal_steps = 200\n[optimizer]\nlr_max = 0.5\n")
    code, out, _ = tinytrain("schedule", tmp_path / "run.toml", "--lr-max", 0.25, "--text")
    assert code == 0
    assert "200 steps, 2 of warm-up" in out
    assert "2.500e-01  warm-up ends" in out
    code, _, err = tinytrain("schedule", tmp_path / "run.toml", "--lr-maxx", 1, "--warmup-iters", -1)
    assert code == 2
    assert "did you mean lr_max?" in err
    code, _, err = tinytrain("schedule", "--out", "--text")
    assert code == 2
    assert "names no file" in err


def test_schedule_draws_a_picture(tinytrain: Cli, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("cosine", "wsd"):
        assert (
            tinytrain("schedule", f"--out={tmp_path / name}.png", "--schedule", name)[1] == f"{tmp_path / name}.png\n"
        )
    assert picture(tmp_path / "cosine.png") != picture(tmp_path / "wsd.png")
