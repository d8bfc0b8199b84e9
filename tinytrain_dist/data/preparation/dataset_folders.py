"""List the files of a folder that the library `datasets` saved with `save_to_disk`, in the order of its rows.

Such a folder has Arrow files and a state.json that names them. Must not know how files are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tinytrain_dist.data.preparation.remote_errors import shown
from tinytrain_dist.data.preparation.remote_files import read_small_file
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.text import is_url


def dataset_files(folder: str) -> list[str] | None:
    """Return the files of a saved data set, given its folder or the URL of its folder; None for another folder.

    Errors: DataError for a set of several splits, for one with an index, and for a damaged one.
    """
    read = read_small_file if is_url(folder) else _read_file
    splits = _content(read, folder, "dataset_dict.json").get("splits")
    if isinstance(splits, list) and splits:
        names = [str(name) for name in splits]
        if len(names) > 1:
            examples = " ".join(_join(shown(folder), name) for name in names[:2])
            raise DataError(
                f"{shown(folder)}: is a DatasetDict with the splits {', '.join(names)}; give the folders of those that "
                f"are to be used, such as {examples}"
            )
        folder = _join(folder, names[0])
    state = _content(read, folder, "state.json")
    files = state.get("_data_files")
    if not isinstance(files, list):
        return None
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"{shown(folder)}: an old version of datasets saved it with an index of its rows, which is not read; load "
            "it with datasets, call flatten_indices() and save it again"
        )
    found = [entry.get("filename") if isinstance(entry, dict) else None for entry in files]
    if not all(isinstance(name, str) and "/" not in name for name in found):
        raise DataError(f"{shown(folder)}: its state.json does not name its files; save the data set again")
    return [_join(folder, str(name)) for name in found]


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def _read_file(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None


def _content(read: Callable[[str], bytes | None], folder: str, name: str) -> dict[str, Any]:
    """Return the JSON object in a file of the folder; {} if there is none."""
    data = read(_join(folder, name))
    try:
        value = json.loads(data) if data is not None else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
