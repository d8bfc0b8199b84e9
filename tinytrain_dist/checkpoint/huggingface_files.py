"""Make the small files of a checkpoint that turn its folder into a Hugging Face model: configuration and tokenizer.

Must not know tensors: `sharded_io.py` writes those, and these files beside them.
"""

from __future__ import annotations

from pathlib import Path

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.model.huggingface_config import to_hf_config
from tinytrain_dist.utils.json_files import read_json_dict, to_json
from tinytrain_dist.utils.shard_paths import data_folders


def huggingface_files(config: TrainingConfig) -> dict[str, bytes]:
    """Return config.json, and the tokenizer's files if there are any beside the training data: name -> content.

    Errors: OSError or ValueError if a file beside the training data cannot be read.
    """
    data_folder = next(iter(data_folders(config.train_files)), Path())
    meta_file = data_folder / "meta.json"
    meta = read_json_dict(meta_file) if meta_file.is_file() else {}
    hf_config = to_hf_config(config, meta.get("eos_id"), meta.get("bos_id"))
    files = {"config.json": (to_json(hf_config, indent=1) + "\n").encode()}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (data_folder / name).is_file():
            files[name] = (data_folder / name).read_bytes()
    return files
