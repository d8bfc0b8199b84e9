"""`tinytrain evaluate`: numbers on a text and on token files, one process and two, and mistakes."""

from __future__ import annotations

import hashlib
import json
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
from tests.helpers.tools import TEXT, Cli, flip_bit, newest
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
    assert "note:" not in err
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


def test_json_lines_are_read_as_they_are_with_a_note(tinytrain: Cli, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.JSONL").write_text('{"text": "a"}\n')
    code, _, err = tinytrain("evaluate", folder / "one", "--data", tmp_path / "text.JSONL")
    assert code == 0, err
    assert f"note: {tmp_path / 'text.JSONL'} is read as it is, so its braces" in err


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


def test_an_export_gives_the_numbers_of_its_checkpoint(tinytrain: Cli, folder: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    assert tinytrain("export", folder / "one", exported, "--no-check")[0] == 0
    (tmp_path / "text.txt").write_text(TEXT * 3)
    for data in (tmp_path / "text.txt", folder / "val.npy"):
        expected = tinytrain("evaluate", folder / "one", "--data", data)[1]
        code, out, err = tinytrain("evaluate", exported, "--data", data)
        assert (code, out.splitlines()[1:]) == (0, expected.splitlines()[1:]), err
    prompt = ("--prompt", "def", "--temperature", 0, "--device", "cpu")
    assert tinytrain("sample", exported, *prompt)[1] == tinytrain("sample", folder / "one", *prompt)[1]
    code, _, err = tinytrain("evaluate", exported, "--data", folder / "val.npy", "--ema")
    assert (code, "is a Hugging Face folder, which has one set of weights; leave --ema out" in err) == (2, True)

    masked = save_tokens(tmp_path / "m.npy", np.load(folder / "val.npy"))
    np.save(tmp_path / "m.mask.npy", np.ones(len(np.load(masked)), np.uint8))
    code, _, err = tinytrain("evaluate", exported, "--data", masked)
    assert (code, "does not say with which settings it was trained, so the mask files are not read" in err) == (0, True)

    flip_bit(next(exported.glob("model*.safetensors")))
    code, _, err = tinytrain("evaluate", exported, "--data", folder / "val.npy")
    assert (code, "Traceback" in err) == (2, False)
    (exported / "manifest.json").unlink()  # as a folder of another program
    assert tinytrain("evaluate", exported, "--data", folder / "val.npy")[0] == 0
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps({**config, "model_type": "gemma"}))
    code, _, err = tinytrain("evaluate", exported, "--data", folder / "val.npy")
    assert (code, "model_type: 'gemma' is not supported" in err) == (2, True)
    (exported / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    code, _, err = tinytrain("evaluate", exported, "--data", folder / "val.npy")
    assert (code, f"error: {exported}: does not fit this model" in err) == (2, True)

    (exported / "config.json").write_text("{")
    code, _, err = tinytrain("evaluate", exported, "--data", folder / "val.npy")
    assert (code, f"checkpoint: {exported / 'config.json'} cannot be read (" in err) == (2, True), err
    code, _, err = tinytrain("sample", exported)
    assert (code, f"{exported / 'config.json'}: cannot be read (" in err) == (2, True), err


def test_a_checkpoint_without_its_state_is_no_hugging_face_folder(tinytrain: Cli, run: Path) -> None:
    (newest(run) / "trainer_state.json").unlink()
    code, _, err = tinytrain("evaluate", newest(run), "--data", run)
    assert (code, "trainer_state.json" in err) == (2, True)


def test_token_files_of_another_tokenizer_are_refused(tinytrain: Cli, folder: Path, tmp_path: Path) -> None:
    save_tokens(tmp_path / "val.npy", [1, 2, 3] * 20)
    tokenizer = (folder / "tokenizer.json").read_text()
    other = json.loads(tokenizer)
    first, second = list(other["model"]["vocab"])[10:12]
    ids = other["model"]["vocab"]
    ids[first], ids[second] = ids[second], ids[first]

    def evaluate(beside: str | None, digest_of: str) -> tuple[int, str]:
        (tmp_path / "tokenizer.json").unlink(missing_ok=True)
        if beside is not None:
            (tmp_path / "tokenizer.json").write_text(beside)
        digests = {"tokenizer.json": hashlib.sha256(digest_of.encode()).hexdigest()}
        (tmp_path / "meta.json").write_text(
            json.dumps({"vocab_size": 280, "digests": digests, "tokenizer": {"ids_before_document": []}})
        )
        code, _, err = tinytrain("evaluate", folder / "one", "--data", tmp_path / "val.npy")
        return code, err

    changed, spaced = json.dumps(other), json.dumps(json.loads(tokenizer), indent=3)
    for beside in (changed, None):
        code, err = evaluate(beside, changed)
        assert (code, f"the token files in {tmp_path} were made with another tokenizer than " in err) == (2, True)
        assert "`tinytrain prepare TEXT --tokenizer " in err
    assert evaluate(spaced, spaced) == (0, ""), "the same ids, written in another way"
    assert evaluate(None, tokenizer) == (0, "")


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
