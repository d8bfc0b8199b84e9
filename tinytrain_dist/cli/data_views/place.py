"""Find what `tinytrain data` is to show: a data folder, token files, a run, a checkpoint or a configuration."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinytrain_dist.checkpoint.discovery import read_trainer_state
from tinytrain_dist.cli.arguments import UsageError
from tinytrain_dist.config.loading import load_config
from tinytrain_dist.config.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, STATE_FILE, is_checkpoint
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.data.side_files import side_path
from tinytrain_dist.data.statistics.blocks import Documents
from tinytrain_dist.data.statistics.token_texts import TokenTexts, end_of_text_id, read_token_texts, vocabulary_size
from tinytrain_dist.data.stored_tokenizer import TOKENIZER_FILE
from tinytrain_dist.data.token_dataset import TokenDataset
from tinytrain_dist.data.token_source import TokenSource
from tinytrain_dist.errors import CheckpointError, ConfigError, DataError
from tinytrain_dist.training.run_data import open_evaluation_data, open_training_data
from tinytrain_dist.utils.shard_paths import NoTokenFilesError, data_folders, shard_paths

EOS_OPTION = "--eos-id"


@dataclass(frozen=True)
class Place:
    """The token files that a user named, and the settings with which they are read."""

    name: str
    train: tuple[str, ...]  # entries, as of train_data
    evaluation: tuple[str, ...]  # entries, as of val_data
    config: TrainingConfig  # that of a run, or the defaults with token_dtype and context_len of the command line
    is_run: bool  # whether the configuration is that of a run, and not the defaults

    @property
    def has_masks(self) -> bool:
        """Whether mask files say which targets count: of a run by its loss_mask, else because there are such files."""
        if self.is_run:
            return self.config.loss_mask
        paths = (path for entry in self.train for path in shard_paths(entry))
        return any(os.path.exists(side_path(path, ".mask.npy")) for path in paths)

    def training_data(self) -> TokenDataset:
        """Open the training data as a run samples it. Errors: DataError.

        Without a run, masks are read if there are any.
        """
        return open_training_data(dataclasses.replace(self.config, loss_mask=True) if self.has_masks else self.config)

    def evaluation_data(self) -> dict[str, TokenDataset]:
        """Open the evaluation data as a run reads it, by short name. Errors: DataError."""
        return open_evaluation_data(self.config)


@dataclass(frozen=True)
class Vocabulary:
    """What is known of the token IDs."""

    texts: TokenTexts
    size: int | None
    size_from: str  # the file that gives the size; "": not known
    eos_id: int | None
    eos_from: str
    note: str  # why tokens have no text; "": they have

    def documents_of(self, sources: list[TokenSource]) -> list[Documents]:
        """Return where the documents of sources begin. Errors: DataError."""
        return [Documents(source, self.eos_id) for source in sources]


def find_place(
    place: Path, val_data: tuple[str, ...], token_dtype: str | None, context_len: int | None, seed: int | None
) -> Place:
    """Return what is at a path. The other arguments replace what a configuration says.

    Errors: ConfigError, CheckpointError or DataError, among them UsageError for an option that a run does not allow.
    """
    overrides = {"token_dtype": token_dtype, "context_len": context_len, "seed": seed}
    given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    config = _config_at(place)
    if config is None:
        train, evaluation = _split_folder(str(place))
        evaluation = val_data or evaluation
        values = given | {"train_data": train, **({"val_data": list(evaluation)} if evaluation else {})}
        return Place(str(place), (train,), evaluation, TrainingConfig.from_dict(values, "the options of data"), False)
    if not config.train_files:
        raise ConfigError("train_data: not set, so there is nothing to look at; set it", str(place))
    config = dataclasses.replace(config, **given)
    if val_data:
        config = dataclasses.replace(config, val_data=val_data)
    return Place(str(place), config.train_files, config.val_files, config, True)


def _config_at(place: Path) -> TrainingConfig | None:
    """Return the configuration of a run, of a checkpoint or in a file; None if the path is something else."""
    if place.suffix == ".toml" and not place.is_dir():
        return load_config(place)
    if is_checkpoint(place):
        saved = read_trainer_state(place).get("config")
        if not saved:
            raise CheckpointError(f"{place}: holds no configuration; give its run, or the folder of the token files")
        return TrainingConfig.from_dict(saved, str(place))
    if (place / CONFIG_FILE).is_file():
        return load_config(place / CONFIG_FILE)
    if (place / STATE_FILE).is_file() or (place / CHECKPOINTS_FOLDER).is_dir():
        raise CheckpointError(f"{place}: is a run without {CONFIG_FILE}; restore it, or give the folder of its data")
    return None


def _split_folder(entry: str) -> tuple[str, tuple[str, ...]]:
    """Return the entries to train on and to evaluate on of a path; a folder may hold both, as `prepare` writes them."""
    if not os.path.isdir(entry):
        return entry, ()
    globs = {}
    for side in ("train", "val"):
        both = os.path.join(glob.escape(entry), f"{side}*.[nb][pi][yn]")
        try:
            paths = shard_paths(both)
        except NoTokenFilesError:
            continue
        endings = {os.path.splitext(path)[1] for path in paths}
        # the glob that a user would write, so that training finds what is remembered of its files
        pattern = os.path.join(glob.escape(entry), f"{side}*{endings.pop()}") if len(endings) == 1 else both
        globs[side] = paths[0] if len(paths) == 1 else pattern
    if len(globs) == 2:
        return globs["train"], (globs["val"],)
    return entry, ()


def read_vocabulary(place: Place, vocab_size: int | None, eos_id: int | None, eos_from: str = EOS_OPTION) -> Vocabulary:
    """Return what is known of the token IDs, from the first folder of the data that has a tokenizer.

    vocab_size, eos_id: given by the user (None: not). Errors: DataError if a file beside the tokens cannot be used;
    UsageError if the tokenizer has more IDs than vocab_size.
    """
    try:
        folders = data_folders((*place.train, *place.evaluation))
    except NoTokenFilesError as error:
        raise DataError(str(error)) from None
    folder = next((folder for folder in folders if (folder / TOKENIZER_FILE).is_file()), folders[0])
    texts, note = read_token_texts(folder)
    if vocab_size is not None and vocab_size < texts.size:
        problem = f"--vocab-size: {vocab_size} is less than the {texts.size} ids of {folder / TOKENIZER_FILE}"
        raise UsageError(f"{problem}; leave it out, or give at least {texts.size}", "data")
    size, size_from = vocab_size, "--vocab-size"
    if size is None and place.is_run and place.config.vocab_size is not None:
        size, size_from = place.config.vocab_size, "vocab_size"
    if size is None:
        size, size_from = vocabulary_size(folder, texts)
    if eos_id is None:
        eos_id, eos_from = end_of_text_id(folder, texts)
    return Vocabulary(texts, size, size_from, eos_id, eos_from, note)


def check_eos_id(vocabulary: Vocabulary, documents: Iterable[Documents]) -> None:
    """Check that --eos-id, if it was given, decides where some of these documents begin. Errors: UsageError."""
    if vocabulary.eos_from == EOS_OPTION and all(each.recorded for each in documents):
        raise UsageError(
            f"{EOS_OPTION}: has no effect, because files beside the tokens, or Megatron's index, record where "
            "documents begin; leave it out",
            "data",
        )


def check_slots(slots: tuple[int, ...], decode: int | None, place: Place, step: int) -> None:
    """Check that a run draws these sample slots in a step, counted from 1. Errors: UsageError.

    decode: how many slots from the first one on (None: not given). Any slot exists where there is no run.
    """
    if not place.is_run:
        return
    sizes = place.config.batch_sizes
    count = sizes.at(step - 1)
    batch = f"batch_size {count}" + (f" in step {step}, by batch_size_warmup" if sizes.varies else "")
    if wrong := [slot for slot in slots if not 0 <= slot < count]:
        raise UsageError(f"--slot: {wrong[0]} is not in 0 .. {count - 1} ({batch})", "data")
    if decode is not None and decode > count:
        problem = f"--decode: {decode} is more than the {count} windows of a step ({batch})"
        raise UsageError(f"{problem}; give at most {count}, and other steps with --step", "data")
