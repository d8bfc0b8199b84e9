"""Read a configuration from a TOML file and the command line, and fill in the vocabulary size of the data.

Must not know what a setting means. Must not know torch, ranks or devices, so that a login node can check a run
quickly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

from tinytrain_dist.config.run_folder import CONFIG_FILE, parse_toml
from tinytrain_dist.config.schema import FIELDS, HELP_COMMAND, HINTS, TrainingConfig
from tinytrain_dist.config.sections import SECTIONS
from tinytrain_dist.config.validation import LARGEST_NUMBER, unused_evaluation_settings
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.utils.json_files import read_json_dict
from tinytrain_dist.utils.permissions import permission_problem
from tinytrain_dist.utils.regular_files import read_bytes
from tinytrain_dist.utils.shard_paths import NoTokenFilesError, data_folders, shard_paths

# The settings of [compute] used to be under [parallel] and are still accepted there.
FORMER_SECTIONS = {"compute": "parallel"}
BOOLEAN_TYPES = (bool, bool | None)
VALUE_NAMES: dict[Any, str] = {  # for people
    float: "a number",
    float | None: "a number or None",
    int: "a whole number",
    int | None: "a whole number or None",
    tuple[float, float]: "two numbers",
}


def read_toml(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a TOML file by name, and a sentence for each problem with its sections.

    Such a problem is an unknown section, a setting in the wrong section, or a setting that is set twice. Errors:
    ConfigError if the file cannot be read or is not TOML.
    """
    try:
        tree = parse_toml(read_bytes(path))
    except OSError as error:
        problem = f"cannot be read: {error.strerror}; give the path of a .toml file"
        raise ConfigError(permission_problem(error) or problem, str(path)) from None
    except ValueError as error:
        raise ConfigError(str(error), str(path)) from None
    values: dict[str, Any] = {}
    problems: list[str] = []

    def add(key: str, value: Any) -> None:
        if key in values:
            problems.append(f"{key}: set twice, to {values[key]!r} and {value!r}; keep one")
        values[key] = value

    for key, content in tree.items():
        if not isinstance(content, dict):  # a setting outside all sections
            add(key, content)
        elif key not in SECTIONS:
            nearest = difflib.get_close_matches(key, SECTIONS, n=1)
            problems.append(f"[{key}]: unknown section; use one of {', '.join(nearest or SECTIONS)}")
        else:
            for name, value in content.items():
                # TrainingConfig reports unknown settings, so they are accepted here in any section
                section = FIELDS[name].metadata["section"] if name in FIELDS else key
                if key in (section, FORMER_SECTIONS.get(section)):
                    add(name, value)
                else:
                    problems.append(f"{name}: is under [{key}]; move it to [{section}]")
    return values, problems


def load_config(path: str | Path | None, overrides: dict[str, Any] | None = None) -> TrainingConfig:
    """Read a TOML file (None: use the defaults), apply `overrides`, and check all settings.

    Errors: ConfigError with every problem of the file and of the overrides.
    """
    values, problems = read_toml(path) if path else ({}, [])
    values = _replace_length(values, overrides or {}) | (overrides or {})
    source = str(path) if path else "the settings"
    try:
        config = TrainingConfig.from_dict(values, source)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems], source) from None
    problems += unused_evaluation_settings(config, values)
    if config.epochs is not None and "total_steps" in values:
        problems.append(f"epochs: {config.epochs} and total_steps {config.total_steps} are both set; leave one out")
    if problems:
        raise ConfigError(problems, source)
    return config


def _replace_length(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a file without the length of the run, if the overrides set it in the other way."""
    lengths = {"epochs", "total_steps"}
    return {
        name: value
        for name, value in values.items()
        if name not in lengths or not any(overrides.get(other) is not None for other in lengths - {name})
    }


def parse_command_line(
    args: list[str],
    prog: str = "tinytrain_dist.train",
    description: str = "Train a language model. The first argument is a configuration (.toml); settings override it.",
) -> TrainingConfig:
    """Return the configuration of `[CONFIG.toml] --any-setting value ...`; see `read_command_line`."""
    return load_config(*read_command_line(args, prog, description))


def config_file_of(place: str | Path) -> Path:
    """Return the config.toml of a run if `place` is one, else `place` itself."""
    inside = Path(place) / CONFIG_FILE
    return inside if inside.is_file() else Path(place)


def read_command_line(args: list[str], prog: str, description: str = "") -> tuple[str | None, dict[str, Any]]:
    """Return the path of the TOML file (None: there is none) and the settings on the command line, by name.

    In place of the file, a run that has a config.toml can be named. Dashes and underscores in names are
    interchangeable. Errors: ConfigError with all problems, among them values that cannot be parsed, and unknown
    settings with the nearest known name. --help ends the process.
    """
    path = str(config_file_of(args[0])) if args and not args[0].startswith("-") else None
    tyro_args, names_without_value = _normalize_arguments(args[1:] if path else args)
    if not tyro_args:
        return path, dict.fromkeys(names_without_value)
    import tyro  # imported here, because the import takes longer than reading a configuration

    # Tyro needs a tenth of a second for all settings, in each process of a run. Only the help has to name all of them.
    given = {word.lstrip("-").replace("-", "_").removeprefix("no_") for word in tyro_args}
    is_help = bool({"-h", "--help"} & set(tyro_args))
    hints: dict[str, Any] = {}
    for name, setting in FIELDS.items():
        if not (is_help or name in given):
            continue
        help_text = f"{setting.metadata['help']} (default: {setting.default})"
        hints[name] = Annotated[
            bool if _is_flag(name) else HINTS[name], tyro.conf.arg(help=help_text, help_behavior_hint="")
        ]
    settings: Any = TypedDict("settings", hints, total=False)  # type: ignore[misc]  # made from the fields
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            overrides = dict(tyro.cli(settings, args=tyro_args, prog=f"{prog} [CONFIG.toml]", description=description))
    except SystemExit as exited:
        if not exited.code:  # --help
            raise
        problems = [_describe_parsing_error(printed.getvalue(), tyro_args)]
        try:
            load_config(path, dict.fromkeys(names_without_value))
        except ConfigError as error:
            problems += error.problems
        raise ConfigError(problems, "the command line") from None
    return path, {**overrides, **dict.fromkeys(names_without_value)}


def parsing_error_text(printed: str) -> str:
    """Return the error in what tyro printed, on one line: it prints a title, the error, a line of dashes, more help."""
    lines = [line.strip(" │|") for line in printed.strip().splitlines()]
    end = next((index for index, line in enumerate(lines) if index > 1 and line and not line.strip("─-")), len(lines))
    text = " ".join(line for line in lines[1:end] if line.strip("─-")) or printed.strip()
    return text.rstrip(".")


def _describe_parsing_error(printed: str, args: list[str]) -> str:
    """Return what tyro printed as a sentence."""
    text = parsing_error_text(printed)
    if value_error := re.match(r"Error parsing (--[\w-]+):", text):
        flag = value_error[1].replace("-", "_").replace("__", "--", 1)
        hint = HINTS.get(flag[2:])
        if hint is not None and flag in args:
            start = len(args) - args[::-1].index(flag)
            values = " ".join(itertools.takewhile(lambda word: not word.startswith("--"), args[start:]))
            return f"{flag[2:]}: expected {VALUE_NAMES.get(hint, hint)}, got {values!r}"
    return f"{text}; {HELP_COMMAND} lists all settings"


def _is_flag(name: str) -> bool:
    """Return whether a setting is a boolean (or None), which --NAME and --no-NAME set without a value."""
    return HINTS.get(name) in BOOLEAN_TYPES


def _normalize_arguments(args: list[str]) -> tuple[list[str], list[str]]:
    """Return the arguments in the form that tyro expects, and the names of settings that tyro cannot parse.

    `--compile true` becomes `--compile`, and `--compile=false` becomes `--no-compile`. Tyro rejects two kinds of
    settings, which are returned by name: unknown settings, which `load_config` reports with all other problems, and
    flags with the value None.
    """
    tyro_args: list[str] = []
    names_without_value: list[str] = []
    position = 0
    while position < len(args):
        flag, equals, value = args[position].partition("=")
        name = flag.lstrip("-").replace("-", "_")
        position += 1
        # all arguments up to the next flag are values of this one
        end = position
        while end < len(args) and not args[end].startswith("--"):
            end += 1
        values = [*([value] if equals else []), *args[position:end]]  # tyro must reject the word in "--seed=1 word"
        position = end
        unknown = name not in FIELDS and not _is_flag(name.removeprefix("no_"))
        if not flag.startswith("-") or name in ("h", "help"):
            tyro_args += [flag, *values]
        elif unknown or (_is_flag(name) and values == ["None"]):
            names_without_value.append(name)
        elif _is_flag(name) and values in (["true"], ["True"], ["false"], ["False"]):
            tyro_args.append(("--" if values[0].lower() == "true" else "--no-") + name)
        else:
            tyro_args += [f"--{name}", *values]
    return tyro_args, names_without_value


def resolve_vocab_size(config: TrainingConfig) -> TrainingConfig:
    """Return the configuration with vocab_size filled in from the meta.json beside the token files, if it is not set.

    Errors: ConfigError in these cases:

    * vocab_size is neither set nor in a meta.json.
    * vocab_size is smaller than the vocabulary of the data.
    * A meta.json cannot be used.
    * Two files were made with different tokenizers.
    """
    if not config.train_files:
        raise ConfigError("train_data: not set; give a token file made by `tinytrain prepare` (…/train.npy)")
    train_folders = _data_folders("train_data", config.train_files)
    sizes = check_tokenizers(config)
    meta_by_size = {size: folder / "meta.json" for folder, size in sizes.items() if size and folder in train_folders}
    if config.vocab_size is None:
        if not meta_by_size:
            missing = [file for entry in config.train_files for file in shard_paths(entry) if not Path(file).exists()]
            if missing:
                remedy = "make one with `tinytrain prepare` or correct the path"
                raise ConfigError(f"train_data: {missing[0]}: no such token file; {remedy}")
            meta = train_folders[0] / "meta.json"
            raise ConfigError(f"vocab_size: not set, and there is no {meta} that contains it; set vocab_size")
        return dataclasses.replace(config, vocab_size=max(meta_by_size))
    if meta_by_size and config.vocab_size < max(meta_by_size):
        largest = max(meta_by_size)
        remedy = "leave it out"
        if config.init_from is not None:  # its weights may need this vocab_size
            remedy += ", or, if init_from needs it, prepare the data with the tokenizer that belongs to that model"
        raise ConfigError(
            f"vocab_size: {config.vocab_size} is less than the {largest} in {meta_by_size[largest]}; {remedy}"
        )
    return config


def check_tokenizers(config: TrainingConfig) -> dict[Path, int | None]:
    """Check that all token files were made with one tokenizer; return vocab_size in the meta.json of each folder.

    Errors: ConfigError if they were not, or if a meta.json cannot be used. None: there is no vocab_size.
    """
    sizes: dict[Path, int | None] = {}
    folders_by_tokenizer: dict[str, set[str]] = {}
    train_folders = _data_folders("train_data", config.train_files)
    for folder in (*train_folders, *_data_folders("val_data", config.val_files)):
        sizes[folder], tokenizer = _read_data_meta(folder / "meta.json")
        if tokenizer:
            folders_by_tokenizer.setdefault(tokenizer, set()).add(str(folder))
    if len(folders_by_tokenizer) > 1:
        raise ConfigError(_tokenizer_problem(*map(sorted, folders_by_tokenizer.values())))
    return sizes


def _data_folders(setting: str, entries: Sequence[str]) -> list[Path]:
    """Return the folders of the token files that a setting names. Errors: ConfigError if an entry names no file."""
    try:
        return data_folders(entries)
    except NoTokenFilesError as error:
        raise ConfigError(f"{setting}: {error}") from None


def _tokenizer_problem(right: list[str], *others: list[str]) -> str:
    """Return what to do about folders that were made with other tokenizers than the first ones."""
    folders = [folder for group in others for folder in group]
    commands = [
        f"`tinytrain prepare TEXT --tokenizer {shlex.quote(right[0])} --out {shlex.quote(folder)} --overwrite`"
        for folder in folders
    ]
    return (
        f"train_data, val_data: {right[0]} and {', '.join(folders)} were made with different tokenizers, so the same "
        f"ID means different tokens in them; prepare the same text again: {' and '.join(commands)}"
    )


def _read_data_meta(meta: Path) -> tuple[int | None, str | None]:
    """Return vocab_size and the tokenizer's digest from a meta.json; None for what is missing.

    Errors: ConfigError if the file cannot be read or its vocab_size is not valid.
    """
    try:
        content = read_json_dict(meta) if meta.exists() else {}
        size, tokenizer = content.get("vocab_size"), content.get("digests", {}).get("tokenizer.json")
        if tokenizer is not None and not isinstance(tokenizer, str):
            raise ValueError(f"digest {tokenizer!r}")
        if size is not None and not (type(size) is int and 1 <= size <= LARGEST_NUMBER):
            raise ValueError(f"vocab_size {size!r}")
    except (OSError, ValueError, AttributeError) as error:
        problem = f"train_data: {meta} cannot be used ({error}); run `tinytrain prepare` again"
        raise ConfigError(permission_problem(error) or problem) from None
    return size, tokenizer
