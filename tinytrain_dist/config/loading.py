"""Read a configuration: TOML files, the command line, and the vocabulary size beside the data.

Must not know torch, ranks or devices, nor what a setting means: a login node reads and checks a run in a moment.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, TypedDict

from tinytrain_dist.config.schema import FIELDS, HINTS, SECTIONS, TrainingConfig
from tinytrain_dist.errors import ConfigError


def read_toml(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """Flat settings of a TOML file and the problems of its layout (unknown headings, keys under the wrong one)."""
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}; give the path of a .toml file", str(path)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"is not TOML: {error}", str(path)) from None
    values: dict[str, Any] = {}
    problems: list[str] = []

    def take(key: str, value: Any) -> None:
        if key in values:
            problems.append(f"{key}: set twice, to {values[key]!r} and {value!r}; keep one")
        values[key] = value

    for key, value in tree.items():
        if not isinstance(value, dict):
            take(key, value)
        elif key not in SECTIONS:
            close = difflib.get_close_matches(key, SECTIONS, n=1)
            problems.append(f"[{key}]: unknown heading; use one of {', '.join(close or SECTIONS)}")
        else:
            for name, inner in value.items():
                home = FIELDS[name].metadata["section"] if name in FIELDS else key
                if home != key:
                    problems.append(f"{name}: stands under [{key}]; move it to [{home}]")
                else:
                    take(name, inner)
    return values, problems


def load_config(path: str | Path | None, overrides: dict[str, Any] | None = None) -> TrainingConfig:
    """Read a TOML file (None: defaults), put `overrides` over it, and check everything at once.

    Errors: ConfigError with every problem of the file and of the overrides.
    """
    values, problems = read_toml(path) if path else ({}, [])
    source = str(path) if path else "the settings"
    try:
        config = TrainingConfig.from_dict({**values, **(overrides or {})}, source)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems], source) from None
    if problems:
        raise ConfigError(problems, source)
    return config


def parse_command_line(
    args: list[str],
    prog: str = "launch/train.py",
    description: str = "Train a language model. First argument: a configuration (.toml); settings override it.",
) -> TrainingConfig:
    """`[CONFIG.toml] --any-setting value ...` as a checked configuration; dashes and underscores are the same.

    Errors: ConfigError listing unknown settings (with the nearest right name) together with all other problems;
    values that cannot be parsed, and --help, end the process as command lines do.
    """
    import tyro  # here, because it costs more than reading a configuration does

    path = args[0] if args and not args[0].startswith("-") else None
    known, without = _normalize(args[1:] if path else args)
    hints: dict[str, Any] = {}
    for name, f in FIELDS.items():
        help = f"{f.metadata['help']} (default: {f.default})"
        hints[name] = Annotated[bool if _is_flag(name) else HINTS[name], tyro.conf.arg(help=help)]
    settings: Any = TypedDict("settings", hints, total=False)  # type: ignore[misc]  # made from the fields
    overrides = dict(tyro.cli(settings, args=known, prog=f"{prog} [CONFIG.toml]", description=description))
    return load_config(path, {**overrides, **dict.fromkeys(without)})


def _is_flag(name: str) -> bool:
    return HINTS.get(name) in (bool, bool | None)


def _normalize(args: list[str]) -> tuple[list[str], list[str]]:
    """Arguments as tyro wants them (`--compile true` becomes `--compile`), and names without a value that it takes."""
    known: list[str] = []
    without: list[str] = []
    position = 0
    while position < len(args):
        flag, equals, value = args[position].partition("=")
        name = flag.lstrip("-").replace("-", "_")
        position += 1
        end = position
        while end < len(args) and not args[end].startswith("--"):
            end += 1
        values = [*([value] if equals else []), *args[position:end]]  # "--seed=1 stray" must not lose a word
        position = end
        if not flag.startswith("-") or name in ("h", "help"):
            known += [flag, *values]
        elif (name not in FIELDS and not _is_flag(name.removeprefix("no_"))) or (_is_flag(name) and values == ["None"]):
            without.append(name)
        elif _is_flag(name) and values in (["true"], ["True"], ["false"], ["False"]):
            known.append(("--" if values[0].lower() == "true" else "--no-") + name)
        else:
            known += [f"--{name}", *values]
    return known, without


def resolve_vocab_size(config: TrainingConfig) -> TrainingConfig:
    """Fill vocab_size from meta.json beside the token files where it was left out.

    Errors: ConfigError where neither says it, where vocab_size is smaller than the data's, or where two files were
    made with different tokenizers.
    """
    if not config.train_files:
        raise ConfigError("train_data: not set; give a token file made by `tinytrain prepare` (…/train.npy)")
    sizes: dict[int, Path] = {}
    tokenizers: dict[str, Path] = {}
    for file in (*config.train_files, *config.val_files):
        meta = Path(file).parent / "meta.json"
        try:
            found = json.loads(meta.read_text(encoding="utf-8")) if meta.is_file() else {}
            size, tokenizer = found.get("vocab_size"), found.get("digests", {}).get("tokenizer.json")
            if size is not None and not (type(size) is int and size >= 1):
                raise ValueError(f"vocab_size {size!r}")
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"train_data: {meta} cannot be used ({error}); run `tinytrain prepare` again") from None
        sizes |= {size: meta} if size and file in config.train_files else {}
        tokenizers |= {tokenizer: meta.parent} if tokenizer else {}
    if len(tokenizers) > 1:
        one, two, *_ = sorted(map(str, tokenizers.values()))
        raise ConfigError(
            f"train_data, val_data: {one} and {two} were made with different tokenizers, so an id means one thing here "
            f"and another there; make one of them again with `tinytrain prepare --tokenizer {one}`"
        )
    if config.vocab_size is None:
        if not sizes:
            meta = Path(config.train_files[0]).parent / "meta.json"
            raise ConfigError(f"vocab_size: not set, and there is no {meta} that says it; set vocab_size")
        return dataclasses.replace(config, vocab_size=max(sizes))
    if sizes and config.vocab_size < max(sizes):
        meta = sizes[max(sizes)]
        raise ConfigError(f"vocab_size: {config.vocab_size} is less than the {max(sizes)} of {meta}; leave it out")
    return config
