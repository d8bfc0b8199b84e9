"""`tinytrain evaluate`: numbers on a text and on token files, one process and two, and mistakes."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers.token_files import save_llm_c, save_megatron, save_tokens
from tests.helpers.tools import TEXT, Cli
from tinytrain_dist.checkpoint.discovery import find_checkpoint
from tinytrain_dist.checkpoint.load_model import load_model


def numbers(out: str) -> dict[str, float]:
    """Return loss, perplexity and bits per byte by name, as printed."""
    return {
        name: float(re.search(rf"^{name} +([\d.]+)", out, re.MULTILINE)[1])
        for name in ("loss", "perplexity", "bits per byte")
    }


def test_a_text_and_its_token_file_give_the_loss_of_a_plain_loop(tinytrain: Cli, folder: Path, tmp_path: Path) -> None:
    run = folder / "one"
    (tmp_path / "text.txt").write_text(TEXT * 3)
    code, out, err = tinytrain("evaluate", run, "--data", tmp_path / "text.txt", "--stride", 5)
    assert code == 0, err
    from tokenizers import Tokenizer

    checkpoint = find_checkpoint(run, "model")
    ids = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(TEXT * 3).ids
    model = load_model(checkpoint, torch.device("cpu"))
    length = model.model_config.context_len
    total = 0.0
    for position in range(1, len(ids)):  # every token by itself, with the context that its window gives it
        end = position if position <= length else length + math.ceil((position - length) / 5) * 5
        begin = max(0, min(end, len(ids) - 1) - length)
        logits = model(torch.tensor(ids[begin:position])[None])[0, -1]
        total += float(F.cross_entropy(logits, torch.tensor(ids[position])))
    found = numbers(out)
    assert found["loss"] == pytest.approx(total / (len(ids) - 1), abs=2e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-4)
    assert found["bits per byte"] == pytest.approx(total / math.log(2) / (len((TEXT * 3).encode()) - 1), abs=2e-5)
    np.save(tmp_path / "tokens.npy", np.array(ids, dtype=np.uint16))
    code, by_tokens, _ = tinytrain("evaluate", run, "--data", tmp_path / "tokens.npy", "--stride", 5)
    assert code == 0
    assert by_tokens.splitlines()[1:] == out.splitlines()[1:], "the same numbers by token file"
    module = [
        sys.executable,
        "-P",
        "-m",
        "tinytrain_dist",
        "evaluate",
        str(run),
        "--data",
        str(tmp_path / "tokens.npy"),
    ]
    (tmp_path / "random.py").write_text("raise SystemExit('taken for a library')")
    done = subprocess.run(
        [*module, "--stride", "5", "--nproc", "2"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stdout == by_tokens, done.stderr


def test_every_format_that_val_data_takes_gives_the_same_numbers(
    tinytrain: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ids = np.random.default_rng(0).integers(0, 50, 300).astype(np.uint16)
    save_tokens(tmp_path / "all.npy", ids)
    (tmp_path / "shards").mkdir()
    save_tokens(tmp_path / "shards" / "t-0.npy", ids[:100])
    save_llm_c(tmp_path / "shards" / "t-1.bin", ids[100:250])
    save_tokens(tmp_path / "shards" / "t-2.npy", ids[250:], "int64")
    save_megatron(tmp_path / "megatron", [ids[:7], ids[7:]])
    ids.tofile(tmp_path / "plain.bin")
    expected = None
    for data, *options in (
        ("all.npy",),
        ("shards",),
        ("shards/t-*",),
        ("megatron",),
        ("megatron.bin",),
        ("plain.bin", "--token-dtype", "uint16"),
    ):
        code, out, err = tinytrain("evaluate", folder / "one", "--data", data, "--stride", 5, *options)
        assert code == 0, err
        expected = expected or out.splitlines()[1:]
        assert out.splitlines()[1:] == expected, data
    code, _, err = tinytrain("evaluate", folder / "one", "--data", "plain.bin")
    assert (code, "set token_dtype to their type (possible: uint16" in err) == (2, True), err


def test_mistakes(tinytrain: Cli, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for args, sentence in (
        (("--data", tmp_path / "nothing.txt"), "cannot be read"),
        (("--data", tmp_path / "short.txt"), "at least 2 are needed"),
        (("--data", tmp_path / "binary.txt"), "cannot be read"),
        (("--data", tmp_path / "nothing.npy"), "nothing.npy: no such token file"),
        (("--data", tmp_path / "nothing*"), "no file fits the glob"),
        (("--data", tmp_path), "the folder has no .npy or .bin file"),
        (("--data", tmp_path / "short.txt", "--nproc", 0), "--nproc: 0 is not a number"),
        (("--data", tmp_path / "short.txt", "--stride", 0), "--stride: 0 is not in 1 .."),
        ((), "--data"),
    ):
        code, out, err = tinytrain("evaluate", folder / "one", *args)
        assert (code, out) == (2, ""), err
        assert sentence in err
        assert "Traceback" not in err
