"""Compare the tokenizer beside token files with what the files were made with; needs no tokenizer library.

Must not know how a tokenizer works, only what its tokenizer.json says.
"""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path
from typing import Any

from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.json_files import read_json_dict
from tinytrain_dist.utils.permissions import permission_problem

TOKENIZER_FILE, META_FILE = "tokenizer.json", "meta.json"


def check_tokenizer(folder: Path) -> list[str]:
    """Compare a data folder's tokenizer.json with its meta.json; return warnings.

    Errors: DataError if another tokenizer.json made the token files.
    """
    path, meta = folder / TOKENIZER_FILE, _read_json(folder / META_FILE)
    tokenizer = _read_json(path)
    if not tokenizer or not meta:
        return []
    digests = meta.get("digests")
    expected = digests.get(TOKENIZER_FILE) if isinstance(digests, dict) else None
    if expected and hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise DataError(
            f"{path}: is not the one that the token files beside it were made with, so it would turn their ids into "
            "other text; put that one back, or run tinytrain prepare again"
        )
    made_with = meta.get("tokenizer")
    # Before meta.json had this key, nothing was put around documents but the token that ends them.
    recorded = isinstance(made_with, dict) and "ids_before_document" in made_with
    added = [] if recorded else tokens_around(tokenizer)
    if not added:
        return []
    return [
        f"WARNING: {path} puts {' and '.join(map(repr, added))} around every text, but the token files beside it were "
        "made without; the model would be used with tokens that it never saw. Run tinytrain prepare again"
    ]


def check_same_tokenizer(checkpoint: Path, folder: Path) -> None:
    """Check that token files were not made with another tokenizer than that of a checkpoint, as far as both name one.

    Errors: DataError if they were, or if another tokenizer.json than that in the folder made its token files.
    """
    check_tokenizer(folder)
    path, meta = checkpoint / TOKENIZER_FILE, _read_json(folder / META_FILE)
    theirs, ours = _read_json(path), _read_json(folder / TOKENIZER_FILE)
    digests = meta.get("digests")
    made_with = digests.get(TOKENIZER_FILE) if isinstance(digests, dict) else None
    if not theirs or hashlib.sha256(path.read_bytes()).hexdigest() == made_with:
        return
    if (ours and _ids(theirs) != _ids(ours)) or (made_with and not ours):
        command = f"tinytrain prepare TEXT --tokenizer {shlex.quote(str(path))} --out FOLDER"
        raise DataError(
            f"--data: the token files in {folder} were made with another tokenizer than {path}, so the same ID means "
            f"different tokens in them; give the text itself, or prepare it again: `{command}`"
        )


def check_source_of_weights(source: Path, folder: Path) -> list[str]:
    """Return a warning if the tokenizer beside weights to start from gives other IDs than that of the data."""
    theirs, ours = (_read_json(place / TOKENIZER_FILE) for place in (source, folder))
    if not theirs or not ours or _ids(theirs) == _ids(ours):
        return []
    return [
        f"WARNING: {source / TOKENIZER_FILE} gives other ids than {folder / TOKENIZER_FILE}, so the weights of "
        f"init_from were trained for other tokens; to keep them, run tinytrain prepare again with --tokenizer {source}"
    ]


def tokens_around(tokenizer: dict[str, Any]) -> list[str]:
    """Return the tokens that the post-processor of a tokenizer.json adds to one text."""
    found: list[str] = []
    waiting = [tokenizer.get("post_processor")]
    while waiting:
        part = waiting.pop(0)
        if not isinstance(part, dict):
            continue
        waiting += part.get("processors") or []
        found += [piece["SpecialToken"]["id"] for piece in part.get("single") or [] if "SpecialToken" in piece]
        if part.get("type") in ("BertProcessing", "RobertaProcessing"):
            found += [part["cls"][0], part["sep"][0]]
    return found


def _ids(tokenizer: dict[str, Any]) -> tuple[Any, Any]:
    """Return what decides which ID a text gets."""
    model = tokenizer.get("model") or {}
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        vocabulary = {**vocabulary, **added}
    return vocabulary, added if not isinstance(vocabulary, dict) else None


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty where there is no such file. Errors: DataError."""
    try:
        return read_json_dict(path) if path.is_file() else {}
    except (OSError, ValueError) as error:
        problem = f"{path}: cannot be read ({error}); put the original back, or remove it"
        raise DataError(permission_problem(error) or problem) from None
