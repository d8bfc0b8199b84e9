"""`tinytrain sample`: the same seed gives the same text, with and without a tokenizer."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.tools import EOS, TEXT, Cli, flip_bit, newest, weights_file
from tests.helpers.training import TINY
from tinytrain_dist.checkpoint import discovery, load_model
from tinytrain_dist.checkpoint.sharded_io import write_checkpoint
from tinytrain_dist.checkpoint.state_collection import collect_shards


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


def test_a_prompt_that_is_too_long_is_cut_and_this_is_reported(tinytrain: Cli, folder: Path) -> None:
    code, _, err = tinytrain("sample", folder / "one", "--prompt", TEXT, "--max-new-tokens", 1)
    assert code == 0
    assert f"sees only the last {TINY['context_len']} (context_len)" in err


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
    assert "skipped a damaged checkpoint" in err
    code, _, err = tinytrain("sample", newest(run))
    assert code == 2
    assert "has blake3" in err
    flip_bit(weights_file(run / "checkpoints/checkpoint-00000003"))
    assert "none of 2 checkpoint(s) is valid" in tinytrain("sample", run)[2]
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint yet" in tinytrain("sample", run)[2]


def test_text_without_tokenizers_names_what_to_install(
    tinytrain: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    code, _, err = tinytrain("sample", folder / "one")
    assert code == 2
    assert "pip install 'tinytrain_dist[prep]'" in err
