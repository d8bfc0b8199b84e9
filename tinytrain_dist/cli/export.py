"""`tinytrain export`: write weights as a Hugging Face folder, and check that it is the same model.

Must not know how checkpoints are made: it reads one and writes a new folder, tensor by tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tinytrain_dist.checkpoint.discovery import find_checkpoint, read_trainer_state
from tinytrain_dist.checkpoint.load_model import load_weights
from tinytrain_dist.checkpoint.load_tokenizer import ids_before_document, load_tokenizer
from tinytrain_dist.checkpoint.manifest import write_file, write_json_file
from tinytrain_dist.checkpoint.new_folder import check_absent, new_folder
from tinytrain_dist.checkpoint.safetensors_io import TensorSpec, write_index, write_tensors
from tinytrain_dist.checkpoint.saved_weights import SavedWeights
from tinytrain_dist.checkpoint.state_collection import MAX_FILE_BYTES
from tinytrain_dist.cli.arguments import call_verb
from tinytrain_dist.cli.tables import PathArgument
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.model.huggingface_config import soft_cap_of
from tinytrain_dist.reliability.stop_requests import exit_on_stop_signals
from tinytrain_dist.utils.json_files import read_json_dict
from tinytrain_dist.utils.lost_output import keep_output_from_failing
from tinytrain_dist.utils.progress import progress_bar

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
TOLERANCE = 1e-3  # relative to the largest logit; another order of sums changes logits of about 1 by 1e-6 (measured)
PROBE = "It's 1234567 — naïve, 北京 \U0001f600\n\n  x"  # a text on which tokenizers are compared
SEPARATOR = "<|endoftext|>"  # ends a document in preparation
CHECK_TOKENS = 32  # length of the prompt on which logits are compared


def export(
    checkpoint: PathArgument,
    out: PathArgument,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ema: bool = False,
    allow_untrained: bool = False,
    check: bool = True,
) -> int:
    """Copy weights, config.json and tokenizer into a new folder that transformers, vLLM and other programs can load.

    Args:
        checkpoint: A checkpoint, or a run (its newest valid checkpoint is used).
        out: The folder to write. It must not exist yet, and appears only when it is complete.
        dtype: Type of the weights to write.
        ema: Export the moving average of the weights (see ema_decay).
        allow_untrained: Also export a model that was not trained for any step.
        check: Compare the logits with those of transformers, if it is installed, before the folder appears (--no-check:
            do not).
    """
    source = find_checkpoint(checkpoint)
    check_absent(out)
    step = read_trainer_state(source).get("step")
    if not step and not allow_untrained:
        raise CheckpointError(
            f"{source}: is at step {step}, so its weights are random; train, or add --allow-untrained"
        )
    target: torch.dtype = getattr(torch, dtype)
    check_result = write_folder(SavedWeights(source, average=ema), out, target, check)
    num_bytes = sum(path.stat().st_size for path in out.iterdir())
    what = "the moving average of the weights" if ema else "the weights"
    print(f"{out}: {what} of {source} (step {step}) as {dtype}, {num_bytes / 1e6:,.1f} MB")
    print(check_result)
    return 0


def write_folder(weights: SavedWeights, out: Path, dtype: torch.dtype, check: bool = True) -> str:
    """Write the folder under another name, check it, and rename it to `out`; return how it was checked.

    Each tensor is compared with the manifest as it is read. Errors: CheckpointError for a tensor that is not what was
    saved, values too large for the type, other logits in transformers, or a full disk. Nothing is left behind then.
    """
    source = weights.checkpoint
    description = _description(source, dtype)

    def fetch(spec: TensorSpec) -> Tensor:
        value = weights.read(spec.name, advance)
        cast = value.to(dtype)
        if not bool(cast.isfinite().all()):
            largest, limit = value.abs().max().item(), torch.finfo(dtype).max
            raise CheckpointError(
                f"dtype: {spec.name} reaches {largest:g}, but {_name(dtype)} ends at {limit:g}; use bfloat16"
            )
        return cast.contiguous()

    with new_folder(out) as (aside, manifest):
        specs = [TensorSpec(name, shape, dtype) for name, shape in weights.shapes.items()]
        with progress_bar("exporting weights", weights.num_bytes, unit="bytes") as advance:
            write_tensors(aside, "model", specs, map(fetch, specs), MAX_FILE_BYTES, manifest)
        write_index(aside, "model", specs, MAX_FILE_BYTES, manifest)
        write_json_file(aside, "config.json", description, manifest)
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                write_file(aside, name, (source / name).read_bytes(), manifest)
        if not check:
            return "not checked (--no-check)"
        checks = [check_with_transformers(weights, aside, dtype)]
        return "\n".join(checks + check_tokenizer(aside))


def _description(source: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json with the type of the weights, also as `torch_dtype` for transformers before 4.56."""
    try:
        config = read_json_dict(source / "config.json")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source}: config.json cannot be read ({error}); give a checkpoint of a training run"
        ) from None
    cap = soft_cap_of(config)
    if cap is not None:
        raise CheckpointError(
            f"{source}: was trained with logit_soft_cap = {cap:g}, which Llama and Qwen3 do not have in transformers, "
            "so the export would give other probabilities; use the checkpoint with `tinytrain`"
        )
    return {**config, "dtype": _name(dtype), "torch_dtype": _name(dtype)}


def check_with_transformers(weights: SavedWeights, folder: Path, dtype: torch.dtype) -> str:
    """Compare the logits of `folder` in transformers with ours, both in float32; return a sentence with the difference.

    weights: what the folder was made from, as float32.

    Errors: CheckpointError if transformers cannot load it, or if they differ by more than rounding explains.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        return "not checked against transformers, which is not installed: pip install 'tinytrain_dist[hf]'"
    transformers_logging: Any = transformers.logging
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model = load_weights(weights, torch.device("cpu"))
    vocab_size = model.config.vocab_size or 1
    prompt = torch.arange(min(CHECK_TOKENS, model.config.context_len))[None] * 997 % vocab_size
    exact_logits = model(prompt)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    rounded_logits = model(prompt)
    del model  # one model in memory at a time
    name = f"transformers {transformers.__version__}"
    try:
        with torch.no_grad():
            other_model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            other_logits = other_model(prompt).logits
    except Exception as error:  # after any error, the folder cannot be used
        raise CheckpointError(
            f"{weights.checkpoint}: {name} cannot load its export ({error}); add --no-check to export it anyway"
        ) from error
    difference = (other_logits - rounded_logits).abs().max().item()
    largest = max(1.0, rounded_logits.abs().max().item())
    if not difference <= TOLERANCE * largest:  # also for NaN
        raise CheckpointError(
            f"{weights.checkpoint}: {name} computes logits that differ by up to {difference:.3g}, so nothing is "
            "exported; compare its config.json with the settings of the run, or add --no-check"
        )
    result = f"checked: {name} computes the same logits, largest difference {difference:.2g}"
    if dtype != torch.float32:
        change = (exact_logits - rounded_logits).abs().max().item()
        result += f"; rounding to {_name(dtype)} changed them by up to {change:.2g}"
    return result


def check_tokenizer(folder: Path) -> list[str]:
    """Compare what transformers' AutoTokenizer makes of a text with what preparation did; return warnings.

    Errors: CheckpointError if it gives other IDs to the text itself.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        return []  # check_with_transformers has reported it
    if not (folder / "tokenizer.json").is_file():
        return []
    ours = load_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)

    def ids_of(text: str, around: bool) -> list[int]:
        ids: list[int] = theirs(text, add_special_tokens=around)["input_ids"]
        return ids

    if ids_of(PROBE, False) != ours.encode(PROBE, add_special_tokens=False).ids:
        raise CheckpointError(
            f"{folder}: transformers' AutoTokenizer encodes text otherwise than its tokenizer.json, so nothing is "
            "exported; --no-check exports anyway"
        )
    warnings = []
    expected = [*ids_before_document(folder, ours), *ids_of(PROBE, False)]
    found = ids_of(PROBE, True)
    if found[: len(expected)] != expected:
        warnings.append(
            f"WARNING: AutoTokenizer begins a text with {found[:3]}, and the training data began documents with "
            f"{expected[:3]}; encode prompts with add_special_tokens=False"
        )
    elif found != expected:
        end = found[len(expected) :]
        warnings.append(f"WARNING: AutoTokenizer ends a prompt with {end}; leave them out to have it continued")
    spelled = "".join(token.content for token in ours.get_added_tokens_decoder().values() if token.content != SEPARATOR)
    if ids_of(spelled, False) != ours.encode(spelled, add_special_tokens=False).ids:
        warnings.append(
            "WARNING: AutoTokenizer makes tokens of special tokens that a prompt spells, such as "
            f"{spelled[:20]!r}..., and the training data has them as text; pass split_special_tokens=True"
        )
    return warnings


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(args: list[str]) -> int:
    """Run `tinytrain export`."""
    keep_output_from_failing()  # the folder is what counts
    with exit_on_stop_signals():
        return call_verb(export, "export", args)
