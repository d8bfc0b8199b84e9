"""Go on from a nanoGPT run: convert its token files for this trainer, and its checkpoint for Hugging Face.

    python from_nanogpt.py data nanoGPT/data/openwebtext data/openwebtext
    python from_nanogpt.py weights nanoGPT/out/ckpt.pt gpt2_from_nanogpt

The token files go on with `tinytrain train`. The weights do not: nanoGPT's model is like GPT-2 (learned positions,
LayerNorm, GELU, biases), and the model of this trainer is like Llama, so it cannot use them. They become a GPT-2 folder
that transformers loads with the same logits, for example to evaluate, to publish or to compare.

ckpt.pt is a pickle, and a pickle can run any program when it is read. Here only tensors and plain containers are read
from it; everything else is refused. meta.pkl, which nanoGPT writes beside token files of characters, is not read: give
its number of characters as --vocab-size.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

GPT2_VOCAB_SIZE, GPT2_END = 50257, 50256
SIZES = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size"}
BLOCK_TOKENS = 1 << 24  # copied at a time
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # stored [in, out]


def convert_data(source: Path, out: Path, vocab_size: int, tokenizer: Path | None) -> None:
    """Write train.npy, val.npy and meta.json from train.bin and val.bin, which are uint16 IDs without a header."""
    with new_folder(out) as folder:
        for name in ("train", "val"):
            copy_tokens(source / f"{name}.bin", folder / f"{name}.npy", vocab_size)
        meta: dict[str, Any] = {"vocab_size": vocab_size}
        if vocab_size == GPT2_VOCAB_SIZE:
            meta |= {"eos_id": GPT2_END, "tokenizer": {"kind": "GPT-2 BPE", "ids_before_document": []}}
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    print(f"{out}: train.npy, val.npy, meta.json")
    print(f"next: tinytrain train CONFIG.toml --train-data {out}/train.npy --val-data {out}/val.npy")


def copy_tokens(source: Path, out: Path, vocab_size: int) -> None:
    """Copy one file block by block, and check each ID."""
    if not source.is_file():
        raise SystemExit(f"{source} does not exist; give the folder with train.bin and val.bin")
    size = source.stat().st_size
    if size == 0 or size % 2:
        raise SystemExit(f"{source} has {size} bytes, but a file of uint16 IDs has an even number; make it again")
    ids = np.memmap(source, dtype="<u2", mode="r")
    copy = np.lib.format.open_memmap(out, mode="w+", dtype=np.uint16, shape=ids.shape)
    for start in range(0, len(ids), BLOCK_TOKENS):
        block = ids[start : start + BLOCK_TOKENS]
        if block.max() >= vocab_size:
            raise SystemExit(
                f"{source} has the ID {block.max()}, but --vocab-size {vocab_size} allows 0 .. {vocab_size - 1}; "
                "set --vocab-size, or check that the file is nanoGPT's"
            )
        copy[start : start + BLOCK_TOKENS] = block
    copy.flush()


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer.json and, if there is one, its tokenizer_config.json beside the token files."""
    file = source / "tokenizer.json" if source.is_dir() else source
    if not file.is_file():
        raise SystemExit(f"--tokenizer: {file} does not exist; give a tokenizer.json, or a folder with one")
    shutil.copyfile(file, folder / "tokenizer.json")
    if file.with_name("tokenizer_config.json").is_file():
        shutil.copyfile(file.with_name("tokenizer_config.json"), folder / "tokenizer_config.json")


def convert_weights(checkpoint: Path, out: Path, activation: str) -> None:
    """Write model.safetensors and config.json, which AutoModelForCausalLM loads."""
    content = read_checkpoint(checkpoint)
    sizes = content["model_args"]
    weights = {name.removeprefix("_orig_mod."): tensor.float() for name, tensor in content["model"].items()}
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(".attn.bias")}  # the causal mask
    check_names(checkpoint, weights, sizes)
    head = weights.pop("lm_head.weight")
    is_tied = torch.equal(head, weights["transformer.wte.weight"])
    tensors = {} if is_tied else {"lm_head.weight": head}
    for name, tensor in weights.items():
        tensors[name] = (tensor.T if name.endswith(TRANSPOSED) else tensor).contiguous()
    if not sizes["bias"]:  # GPT-2 of transformers always adds biases
        tensors |= zero_biases(tensors)
    config = hf_config(sizes, activation, is_tied)
    with new_folder(out) as folder:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    print(f"{out}: GPT-2 with {sizes['n_layer']} layers, from step {content.get('iter_num', '(unknown)')}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of ckpt.pt without running code from it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise SystemExit(f"{path} does not exist; give the ckpt.pt in nanoGPT's out_dir") from None
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise SystemExit(
            f"{path} was not read, and nothing in it was run: it is damaged, or has more than tensors and plain "
            f"containers, which could run a program ({type(error).__name__}: {reason}); give a ckpt.pt of nanoGPT"
        ) from None
    content = content if isinstance(content, dict) else {}
    found = [content.get(key) for key in ("model", "model_args")]
    if not all(isinstance(part, dict) for part in found) or SIZES - found[1].keys():
        raise SystemExit(f"{path} is not nanoGPT's: it needs 'model', and 'model_args' with {', '.join(sorted(SIZES))}")
    return content


def check_names(path: Path, weights: dict[str, Tensor], sizes: dict[str, Any]) -> None:
    """Check that the checkpoint has exactly the tensors of such a model."""
    modules = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2"]
    modules = [f"transformer.h.{layer}.{module}" for layer in range(sizes["n_layer"]) for module in modules]
    kinds = ("weight", "bias") if sizes["bias"] else ("weight",)
    expected = {f"{module}.{kind}" for module in [*modules, "transformer.ln_f"] for kind in kinds}
    expected |= {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    if expected != weights.keys():
        raise SystemExit(
            f"{path} is not nanoGPT's model: missing {sorted(expected - weights.keys())}, unknown "
            f"{sorted(weights.keys() - expected)}; convert a checkpoint of the unchanged model"
        )


def zero_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a bias of zeros for each linear layer (stored [in, out]) and each norm."""
    return {
        name.removesuffix("weight") + "bias": torch.zeros(tensor.shape[-1])
        for name, tensor in tensors.items()
        if name.endswith(TRANSPOSED) or ".ln_" in name
    }


def hf_config(sizes: dict[str, Any], activation: str, is_tied: bool) -> dict[str, Any]:
    """Return the config.json of a GPT-2 model with these sizes."""
    end = GPT2_END if sizes["vocab_size"] >= GPT2_VOCAB_SIZE else None  # nanoGPT pads GPT-2's vocabulary to 50304
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), sizes.get("dropout", 0.0))
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": sizes["n_layer"],
        "n_head": sizes["n_head"],
        "n_embd": sizes["n_embd"],
        "n_positions": sizes["block_size"],
        "vocab_size": sizes["vocab_size"],
        "activation_function": activation,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": is_tied,
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": "float32",
        **dropout,
    }


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder to write to, which gets the name `out` when it is complete, and is removed after an error."""
    if out.exists():
        raise SystemExit(f"{out} exists already and is not replaced; give another name")
    working = out.with_name(out.name + ".tmp")
    working.mkdir(parents=True)
    try:
        yield working
        working.rename(out)
    finally:
        shutil.rmtree(working, ignore_errors=True)


def main(arguments: list[str] | None = None) -> None:
    """Convert token files or weights."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    data = verbs.add_parser("data", help="token files")
    data.add_argument("source", type=Path, help="folder with train.bin and val.bin")
    data.add_argument("out", type=Path, help="new folder")
    data.add_argument("--vocab-size", type=int, default=GPT2_VOCAB_SIZE, help="default: GPT-2's, 50257")
    data.add_argument("--tokenizer", type=Path, help="tokenizer.json (or its folder) that the IDs were made with")
    weights = verbs.add_parser("weights", help="weights, as a Hugging Face folder")
    weights.add_argument("source", type=Path, help="ckpt.pt")
    weights.add_argument("out", type=Path, help="new folder")
    weights.add_argument(
        "--activation", choices=["gelu", "gelu_new"], default="gelu", help="gelu_new: of a nanoGPT with the tanh form"
    )
    options = parser.parse_args(arguments)
    if options.verb == "data":
        convert_data(options.source, options.out, options.vocab_size, options.tokenizer)
    else:
        convert_weights(options.source, options.out, options.activation)


if __name__ == "__main__":
    main()
