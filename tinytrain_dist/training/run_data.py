"""Open the token files of a run, for training and for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
from torch import Tensor

from tinytrain_dist.checkpoint.huggingface_import import weights_folder
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.config.weight_phases import weight_phases
from tinytrain_dist.data.bytes_per_token import bytes_per_token
from tinytrain_dist.data.stored_tokenizer import check_source_of_weights, check_tokenizer
from tinytrain_dist.data.token_dataset import TokenDataset, short_names
from tinytrain_dist.data.window_sampling import EVAL_STREAM
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.shard_paths import NoTokenFilesError, data_folders


@dataclass(frozen=True)
class RunData:
    """The datasets of a run: one to train on (possibly from several sources), and one for each evaluation source."""

    train: TokenDataset
    evaluation: dict[str, TokenDataset]  # by short name
    bytes_per_token: npt.NDArray[Any] | None  # bytes of text for each token ID: [vocab_size]; None if unknown

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the training data in a checkpoint.

        A single source is not put in a list, because older checkpoints have none.
        """
        fingerprints = self.train.fingerprints
        return {"train": fingerprints if len(fingerprints) > 1 else fingerprints[0]}

    def evaluation_prompts(self, rows: int, tokens: int) -> Tensor:
        """Return the first IDs of the first evaluation windows: [rows, tokens], int64."""
        dataset = next(iter(self.evaluation.values()))
        return dataset.read(*dataset.draw(0, 0, range(rows), EVAL_STREAM)).tokens[:, :tokens].long()


def tokenizer_warnings(config: TrainingConfig) -> list[str]:
    """Compare the tokenizers beside the token files with the files, and with that of `init_from`.

    Errors: DataError if another tokenizer.json made the files.
    """
    folders = _folders(config)
    warnings = [line for folder in folders for line in check_tokenizer(folder)]
    if config.init_from:
        warnings += check_source_of_weights(weights_folder(Path(config.init_from)), folders[0])
    return warnings


def _folders(config: TrainingConfig) -> list[Path]:
    """Return the folders of all token files, each once. Errors: DataError."""
    try:
        return data_folders((*config.train_files, *config.val_files))
    except NoTokenFilesError as error:
        raise DataError(str(error)) from None


def open_run_data(config: TrainingConfig) -> RunData:
    """Open the token files of a configuration. Errors: DataError naming the file that cannot be used."""
    assert config.vocab_size is not None, "resolve_vocab_size has filled it"
    vocab_size = config.vocab_size
    train = open_training_data(config, vocab_size)
    evaluation = open_evaluation_data(config, vocab_size)
    tables = (bytes_per_token(folder, vocab_size) for folder in _folders(config))
    table = next((table for table in tables if table is not None), None)
    return RunData(train, evaluation, table)


def open_training_data(config: TrainingConfig, vocab_size: int | None = None) -> TokenDataset:
    """Open train_data as a configuration samples it. Errors: DataError naming the file that cannot be used.

    vocab_size: check that every token ID is less (None: not checked).
    """
    return TokenDataset(
        config.train_files,
        config.context_len,
        vocab_size=vocab_size,
        phases=weight_phases(config.train_weights),
        shuffle_batch=config.batch_sizes.before if config.sampling == "shuffle" else None,
        **_reading_options(config),
    )


def open_evaluation_data(config: TrainingConfig, vocab_size: int | None = None) -> dict[str, TokenDataset]:
    """Open the entries of val_data by short name, as evaluations read them. vocab_size, errors: as of training data."""
    return {
        name: TokenDataset([path], config.context_len, vocab_size=vocab_size, **_reading_options(config))
        for name, path in zip(short_names(config.val_files), config.val_files, strict=True)
    }


def _reading_options(config: TrainingConfig) -> dict[str, Any]:
    """Return the options of TokenDataset that are the same for training and evaluation."""
    return {
        "token_dtype": config.token_dtype,
        "loss_mask": config.loss_mask,
        "document_mask": config.document_mask,
        "packed": config.packing == "best_fit",
    }
