"""from_nanogpt.py: token files train here, weights give transformers the same logits, a malicious pickle is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.examples.programs import EXAMPLES, load_example
from tests.helpers.training import VOCABULARY, train

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 61, "dropout": 0.0}
PIECES = {"attn.c_attn": (48, 16), "attn.c_proj": (16, 16), "mlp.c_fc": (64, 16), "mlp.c_proj": (16, 64)}


def weights(bias: bool) -> dict[str, Tensor]:
    """Return random weights under the names and shapes of nanoGPT's checkpoints; no value is 0 or 1."""
    torch.manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (61, 16), "transformer.wpe.weight": (12, 16)}
    for layer in range(SIZES["n_layer"]):
        for name, shape in {"ln_1": (16,), "ln_2": (16,), **PIECES}.items():
            shapes[f"transformer.h.{layer}.{name}.weight"] = shape
    shapes["transformer.ln_f.weight"] = (16,)
    if bias:
        inner = [name for name in shapes if ".h." in name or ".ln_f" in name]
        shapes |= {name.removesuffix("weight") + "bias": shapes[name][:1] for name in inner}
    state = {name: torch.randn(shape) / 2 for name, shape in shapes.items()}
    return {**state, "lm_head.weight": state["transformer.wte.weight"]}


def logits_of(state: dict[str, Tensor], ids: Tensor, activation: str) -> Tensor:
    """Compute a GPT with pre-norm blocks from its weights, without any class of transformers: [length, vocabulary]."""

    def norm(x: Tensor, name: str) -> Tensor:
        return nn.functional.layer_norm(x, (16,), state[f"{name}.weight"], state.get(f"{name}.bias"), 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return nn.functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    length = len(ids)
    x = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][:length]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for layer in range(SIZES["n_layer"]):
        block = f"transformer.h.{layer}"
        q, k, v = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").view(length, 3, 2, 8).permute(1, 2, 0, 3)
        shares = (q @ k.mT / 8**0.5).masked_fill(future, -torch.inf).softmax(-1)
        x = x + linear((shares @ v).transpose(0, 1).reshape(length, 16), f"{block}.attn.c_proj")
        inner = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        inner = nn.functional.gelu(inner, approximate="tanh" if activation == "gelu_new" else "none")
        x = x + linear(inner, f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ state["lm_head.weight"].T


def save_checkpoint_file(path: Path, bias: bool, **changes: Any) -> dict[str, Tensor]:
    """Write a ckpt.pt with everything that nanoGPT puts into it, from a compiled model, and return the weights."""
    state = weights(bias)
    optimizer = torch.optim.AdamW([nn.Parameter(state["transformer.wte.weight"].clone())], lr=1e-3)
    content = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        "optimizer": optimizer.state_dict(),
        "model_args": {**SIZES, "bias": bias},
        "iter_num": 250,
        "best_val_loss": torch.tensor(3.5),
        "config": {"dataset": "openwebtext", "compile": True, "learning_rate": 6e-4},
    }
    torch.save({**content, **changes}, path)
    return state


@pytest.mark.parametrize(("bias", "activation"), [(True, "gelu"), (False, "gelu_new")])
def test_transformers_computes_the_same_logits(tmp_path: Path, bias: bool, activation: str) -> None:
    transformers = pytest.importorskip("transformers")
    state = save_checkpoint_file(tmp_path / "ckpt.pt", bias)
    out = tmp_path / "converted"
    load_example("from_nanogpt").main(["weights", str(tmp_path / "ckpt.pt"), str(out), "--activation", activation])
    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight is model.transformer.wte.weight
    ids = torch.arange(12) * 7 % 61
    with torch.no_grad():
        theirs = model.eval()(ids[None]).logits[0]
    expected = logits_of(state, ids, activation)
    assert float(expected.std()) > 0.5, "logits that are all alike would show nothing"
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)
    other = logits_of(state, ids, "gelu" if activation == "gelu_new" else "gelu_new")
    assert not torch.allclose(theirs, other, rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "converted"]


class Malicious:
    """A value whose unpickling runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def test_a_malicious_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    trace, path = tmp_path / "was_run", tmp_path / "ckpt.pt"
    save_checkpoint_file(path, True, config=Malicious(f"touch {trace}"))
    command = [sys.executable, str(EXAMPLES / "from_nanogpt.py"), "weights", str(path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "was not read, and nothing in it was run" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]
    torch.load(path, weights_only=False)
    assert trace.exists(), "the file does run a command where it is read without protection"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_args": {"n_layer": 2}}, "is not nanoGPT's: it needs"),
        ({"model": {"_orig_mod.lm_head.weight": torch.zeros(61, 16)}}, r"missing \['transformer\.h\.0\.attn"),
    ],
)
def test_other_checkpoints_are_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    save_checkpoint_file(tmp_path / "ckpt.pt", True, **changes)
    with pytest.raises(SystemExit, match=sentence):
        load_example("from_nanogpt").main(["weights", str(tmp_path / "ckpt.pt"), str(tmp_path / "out")])
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]


def write_tokens(folder: Path, count: int) -> np.ndarray:
    """Write train.bin and val.bin as nanoGPT's scripts do, and return the IDs of the first."""
    folder.mkdir()
    ids = (np.arange(count) ** 2 % VOCABULARY).astype(np.uint16)
    for name in ("train", "val"):
        ids.tofile(folder / f"{name}.bin")
    return ids


@pytest.mark.multiprocess
def test_token_files_train_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load_example("from_nanogpt")
    monkeypatch.setattr(example, "BLOCK_TOKENS", 1000)  # the last block is not full
    ids = write_tokens(tmp_path / "nanogpt", 4500)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    arguments = ["--vocab-size", str(VOCABULARY), "--tokenizer", str(tokenizer)]
    example.main(["data", str(tmp_path / "nanogpt"), str(tmp_path / "data"), *arguments])
    assert np.array_equal(np.load(tmp_path / "data" / "train.npy"), ids)
    assert json.loads((tmp_path / "data" / "meta.json").read_text()) == {"vocab_size": VOCABULARY}
    assert (tmp_path / "data" / "tokenizer.json").read_text() == "{}"
    (tmp_path / "data" / "tokenizer.json").unlink()  # it is not a tokenizer
    run = train(tmp_path / "data", "run", 1)
    losses = run.values("train", "loss")
    assert losses[-1] < losses[0]
    with pytest.raises(SystemExit, match="exists already and is not replaced"):
        example.main(["data", str(tmp_path / "nanogpt"), str(tmp_path / "data")])


def test_the_vocabulary_of_gpt2_is_known(tmp_path: Path) -> None:
    write_tokens(tmp_path / "nanogpt", 100)
    load_example("from_nanogpt").main(["data", str(tmp_path / "nanogpt"), str(tmp_path / "data")])
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    assert (meta["vocab_size"], meta["eos_id"], meta["tokenizer"]["kind"]) == (50257, 50256, "GPT-2 BPE")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [(b"", "has 0 bytes"), (b"abc", "has 3 bytes"), (b"\x01\x00\xff\xff", r"has the ID 65535, but --vocab-size 50257")],
)
def test_files_that_hold_no_tokens_are_refused(tmp_path: Path, data: bytes, sentence: str) -> None:
    write_tokens(tmp_path / "nanogpt", 100)
    (tmp_path / "nanogpt" / "val.bin").write_bytes(data)
    with pytest.raises(SystemExit, match=sentence):
        load_example("from_nanogpt").main(["data", str(tmp_path / "nanogpt"), str(tmp_path / "data")])
    assert [path.name for path in tmp_path.iterdir()] == ["nanogpt"], "nothing is left behind"
