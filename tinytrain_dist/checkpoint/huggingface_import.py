"""Initialize a model from the weights in a Hugging Face folder; each rank reads its own rows.

The folder holds config.json and the weights as safetensors: one file, or several with an index. Our parameter names are
Hugging Face's, so nothing is converted. A tensor in the folder that is neither used nor redundant is an error.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor, nn

from tinytrain_dist.checkpoint.manifest import quick_problems
from tinytrain_dist.checkpoint.safetensors_io import TensorReader
from tinytrain_dist.checkpoint.sharded_io import load_tensors
from tinytrain_dist.checkpoint.state_collection import model_tensors
from tinytrain_dist.config.run_folder import RunFolder
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.model.huggingface_config import check_hf_config

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
# Tensors in old files that follow from config.json, so that they are not needed. Transformers ignores them, too.
REDUNDANT_BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
COMPARED_VALUES = 1 << 22  # number of values of two tensors that are compared at once
SHOWN_PROBLEMS = 10


def weights_folder(place: Path) -> Path:
    """Return the folder of the weights that `init_from` names: the newest valid checkpoint of a run, or `place`."""
    run = None if (place / "config.json").exists() else RunFolder.at(place)
    for checkpoint in reversed(run.committed() if run else []):
        if not quick_problems(checkpoint):
            return checkpoint
    return place


def init_from_hf_folder(
    folder: Path, model: nn.Module, config: TrainingConfig, *, part: int = 0, parts: int = 1
) -> None:
    """Set the weights of the model from a Hugging Face folder of safetensors.

    `part`, `parts`: this caller compares only share `part` of `parts` of a tied head with the embedding.
    Errors: ConfigError if the folder's architecture or sizes are not those of the configuration. CheckpointError if
    names, shapes or types do not fit, or if weights in the folder would not be used. Nothing has been changed then.
    """
    check_hf_config(config, folder)
    reader = check_hf_weights(folder, model, config, part=part, parts=parts, setting="init_from = ")
    load_tensors(reader, model_tensors(model))


def check_hf_weights(
    folder: Path, model: nn.Module, config: TrainingConfig, *, part: int = 0, parts: int = 1, setting: str = ""
) -> TensorReader:
    """Check that the weights in a Hugging Face folder are those of the model; return what reads them.

    part, parts: as of `init_from_hf_folder`. setting: what names the folder in an error, such as "init_from = ".
    Errors: CheckpointError if names, shapes or types do not fit, or if weights would not be used.
    """
    reader = TensorReader(folder, "model")
    wanted = model_tensors(model)
    problems = _unread_files(reader) + _misfits(reader, wanted)
    problems += _head_problems(reader, config, part, parts)
    if problems:
        more = [f"and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
        shown = "\n  ".join(sorted(problems)[:SHOWN_PROBLEMS] + more)
        raise CheckpointError(
            f"{setting}{folder}: does not fit this model; correct the folder or the model settings:\n  {shown}"
        )
    return reader


def _unread_files(reader: TensorReader) -> list[str]:
    """Return a sentence for each file of weights that is not read, and for each tensor that the index omits."""
    folder, index = reader.folder, f"{reader.kind}.safetensors.index.json"
    used = set(reader.files.values())
    problems = [
        f"{name}: is in {file}, but {index} does not name it; correct the index" for name, file in reader.unlisted()
    ]
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    for name in names:
        if name in used or name.startswith("optimizer-"):  # the optimizer's state in a checkpoint of a run
            continue
        reason = f"{index} does not name it" if (folder / index).is_file() else f"the weights are in {min(used)}"
        problems.append(
            f"{name}: holds weights that are not used, because {reason}; move it away, or merge it into the weights"
        )
    if (folder / "adapter_config.json").is_file():
        problems.append("adapter_config.json: an adapter is not used; merge it into the weights, or move it away")
    return problems


def _misfits(reader: TensorReader, wanted: dict[str, Tensor]) -> list[str]:
    """Return a sentence for each tensor that is missing, unknown, or of a wrong shape or type. A head may be absent."""
    problems = [f"{name}: is missing" for name in wanted if name not in reader.files and name != HEAD]
    problems += [
        f"{name}: is not a weight of this model"
        for name in reader.files
        if name not in wanted and name != HEAD and not REDUNDANT_BUFFERS.fullmatch(name)
    ]
    for name in wanted.keys() & reader.files.keys():
        (shape, dtype), expected = reader.spec(name), tuple(wanted[name].shape)
        if shape != expected:
            problems.append(f"{name}: is {list(shape)} in the folder, but {list(expected)} in this model")
        if dtype not in FLOAT_TYPES:
            problems.append(f"{name}: is {dtype} in the folder; give weights of type {', '.join(FLOAT_TYPES)}")
    return problems


def _head_problems(reader: TensorReader, config: TrainingConfig, part: int, parts: int) -> list[str]:
    """Check that the output head is tied or not, as config.json says; `check_hf_config` compares that with `config`."""
    if not config.tie_embeddings:
        advice = 'if the model is tied, set "tie_word_embeddings": true in config.json and tie_embeddings = true'
        missing = f"{HEAD}: is missing, although config.json says that it is not tied; {advice}"
        return [] if HEAD in reader.files else [missing]
    if HEAD not in reader.files or EMBEDDING not in reader.files or _is_copy_of_embedding(reader, part, parts):
        return []
    return [
        f"{HEAD}: is not equal to {EMBEDDING}, although config.json says that the two are tied; to use both, set "
        '"tie_word_embeddings": false in config.json and tie_embeddings = false'
    ]


def _is_copy_of_embedding(reader: TensorReader, part: int, parts: int) -> bool:
    """Return whether the head is equal to the embedding in share `part` of `parts` of the rows."""
    shape = reader.spec(EMBEDDING)[0]
    if reader.spec(HEAD)[0] != shape or len(shape) != 2:
        return False
    stop = shape[0] * (part + 1) // parts
    rows = max(1, COMPARED_VALUES // max(1, shape[1]))
    for start in range(shape[0] * part // parts, stop, rows):
        end = min(start + rows, stop)
        if not bool((reader.read(HEAD, start, end) == reader.read(EMBEDDING, start, end)).all()):
            return False
    return True
