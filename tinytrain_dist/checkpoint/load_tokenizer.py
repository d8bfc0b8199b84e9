"""Load the tokenizer of a checkpoint, and find the IDs that begin and end a document of its training data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinytrain_dist.errors import CheckpointError, TinytrainError
from tinytrain_dist.utils.json_files import is_whole_number, read_json_dict
from tinytrain_dist.utils.permissions import check_readable, permission_problem


def load_tokenizer(checkpoint: Path) -> Any:
    """Load the tokenizer in the checkpoint's folder, set up to encode as in preparation; None if it has none.

    Errors: TinytrainError if `tokenizers` is not installed; CheckpointError if the file is not a tokenizer.
    """
    path = checkpoint / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise TinytrainError(
            "tokenizers: not installed, but text needs it; pip install 'tinytrain_dist[prep]', or use --prompt-ids"
        ) from None
    try:
        check_readable(path)  # first, because the library's error has no number
        tokenizer = Tokenizer.from_file(str(path))
    except BaseException as error:  # tokenizers raises bare Exception for whatever it cannot read, and may panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        problem = f"{path}: is not a tokenizer ({error}); use --prompt-ids"
        raise CheckpointError(permission_problem(error) or problem) from None
    # Special tokens that a text spells were text in preparation, unless tokenizer_config.json says otherwise.
    tokenizer.encode_special_tokens = _read_json(checkpoint / "tokenizer_config.json").get("split_special_tokens", True)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def ids_before_document(checkpoint: Path, tokenizer: Any) -> list[int]:
    """Return the IDs that begin every document of the training data; none where config.json has no bos_token_id."""
    bos_id = _read_json(checkpoint / "config.json").get("bos_token_id")
    if bos_id is None:
        return []
    if not is_whole_number(bos_id):
        path = checkpoint / "config.json"
        raise CheckpointError(f"{path}: bos_token_id is {bos_id!r}, but must be a token id; use another checkpoint")
    if tokenizer is None:
        return [bos_id]
    found = tokenizer.encode("a b")
    ids: list[int] = found.ids[: [*found.special_tokens_mask, 0].index(0)]
    return ids if bos_id in ids else []


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; {} if there is no such file. Errors: CheckpointError if it cannot be read."""
    try:
        return read_json_dict(path) if path.exists() else {}
    except (OSError, ValueError) as error:
        problem = f"{path}: cannot be read ({error}); use another checkpoint"
        raise CheckpointError(permission_problem(error) or problem) from None


def end_id(checkpoint: Path) -> int | None:
    """Return the end-of-text ID that config.json names, if any. Errors: CheckpointError if it cannot be read."""
    named = _read_json(checkpoint / "config.json").get("eos_token_id")
    stop_id = next(iter(named), None) if isinstance(named, list) else named  # there may be several
    if stop_id is not None and not is_whole_number(stop_id):
        path = checkpoint / "config.json"
        raise CheckpointError(f"{path}: eos_token_id is {named!r}, but must be a token id; use another checkpoint")
    return stop_id
