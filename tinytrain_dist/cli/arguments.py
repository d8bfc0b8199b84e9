"""Parse the arguments of a verb with tyro, in one way for all verbs: the same help, and mistakes as one sentence."""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import re
from collections.abc import Callable
from typing import Any, TypeVar

import tyro

from tinytrain_dist.config.loading import parsing_error_text
from tinytrain_dist.config.schema import FIELDS
from tinytrain_dist.errors import ConfigError

Parsed = TypeVar("Parsed")
SETTINGS_HELP = (
    "All other options are settings of the run, such as --total-steps 100; `tinytrain config --help` lists them."
)


class UsageError(ConfigError):
    """The command line of a verb is wrong."""

    def __init__(self, problems: str | list[str], verb: str) -> None:
        """problems: sentences that name the option."""
        super().__init__(problems, f"the arguments of `tinytrain {verb}`")


def call_verb(function: Callable[..., Parsed], verb: str, args: list[str]) -> Parsed:
    """Call a verb's function with its arguments from the command line. Errors: UsageError. --help ends the process."""

    @functools.wraps(function)
    def bind(*values: Any, **named: Any) -> Callable[[], Parsed]:
        return functools.partial(function, *values, **named)

    bound: Callable[[], Parsed] = _parse(bind, verb, args, with_settings=False)[0]
    return bound()  # outside tyro, so that output and errors of the verb are not taken for parsing errors


def parse_options(
    options: Callable[..., Parsed], verb: str, args: list[str], pass_on_help: bool = False
) -> tuple[Parsed, list[str]]:
    """Return the options of a verb, and the arguments that are settings of the run: all others, in their order.

    options: a dataclass. Everything after the word `--` is a setting. --help ends the process; with pass_on_help it
    becomes a setting, so that the help of the settings follows. Errors: UsageError.
    """
    end = args.index("--") if "--" in args else len(args)
    if pass_on_help and {"-h", "--help"} & set(args[:end]):
        with contextlib.suppress(SystemExit):
            _parse(options, verb, ["--help"], with_settings=True)
        return _parse(options, verb, [], with_settings=True)[0], ["--help"]
    parsed, settings = _parse(options, verb, args[:end], with_settings=True)
    if problems := list(filter(None, (_mistyped_option(word, options) for word in settings))):
        raise UsageError(problems, verb)
    return parsed, [*settings, *args[end + 1 :]]


def _parse(target: Callable[..., Any], verb: str, args: list[str], with_settings: bool) -> tuple[Any, list[str]]:
    cli: Any = tyro.cli  # its overloads do not know a variable in place of return_unknown_args
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            found = cli(
                target,
                prog=f"tinytrain {verb}",
                args=args,
                return_unknown_args=with_settings,
                config=(tyro.conf.FlagCreatePairsOff,),  # no --no-watch beside --watch
            )
    except SystemExit as exited:
        if not exited.code:  # --help
            raise
        raise UsageError(_describe(printed.getvalue(), target), verb) from None
    return found if with_settings else (found, [])


def _describe(printed: str, target: Callable[..., Any]) -> str:
    """Return an error that tyro printed as a sentence with a remedy."""
    text = parsing_error_text(printed)
    if missing := re.match(r"Missing from .*?: (\S+) (.*?)\(required\)", text):
        what = missing[2].split(". ")[0].strip(" .")
        if missing[1].startswith("--"):
            what = what.partition(" ")[2]  # without the name of the value
        return (
            f"{missing[1]} is missing{': ' if what else ''}{what[:1].lower()}{what[1:]}; --help explains the arguments"
        )
    if no_value := re.match(r"Missing value for argument '([^-]\S*)'", text):
        return f"{no_value[1].upper()} is missing; it must come before all options (--help explains the arguments)"
    if no_value := re.match(r"Missing value for argument '(\S+)'\. Expected (\d+)", text):
        return (
            f"{no_value[1]}: needs {'a value' if no_value[2] == '1' else no_value[2] + ' values'}; --help explains it"
        )
    if unknown := re.match(r"Unrecognized options: ([^\s,]+)", text):
        flags = _flags(target)
        close = difflib.get_close_matches(unknown[1], flags, n=1)
        hint = f"did you mean {close[0]}?" if close else "--help lists the options"
        return (
            f"{unknown[1]}: unknown option; {hint}"
            if unknown[1].startswith("-")
            else f"{unknown[1]}: one argument too many; leave it out"
        )
    if invalid := re.match(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)", text):
        return f"{invalid[2]}: is {invalid[1]!r}; give one of {invalid[3].rstrip(',').replace(chr(39), '')}"
    if wrong := re.match(r"Error parsing (\S+?):", text):
        values = re.search(r"\[(.*?)\]", text) or re.search(r": ('[^']*')$", text)
        kind = "a number" if re.search(r"\b(int|float)\b", text, re.IGNORECASE) else "another value"
        if f"{wrong[1]} N N" in printed:
            kind = "numbers, with spaces between them"
        return f"{wrong[1]}: {'got ' + values[1] if values else 'cannot be read'}; give {kind} (--help explains it)"
    return f"{text}; --help lists the options"


def _mistyped_option(word: str, options: Callable[..., Any]) -> str:
    """Return a sentence if an argument is no setting, but nearly an option of the verb; "" otherwise."""
    flag = word.partition("=")[0].replace("_", "-")
    settings = {f"--{prefix}{name.replace('_', '-')}" for name in FIELDS for prefix in ("", "no-")}
    if not flag.startswith("--") or flag in settings:
        return ""
    close = difflib.get_close_matches(flag, {*settings, *_flags(options)}, n=1)
    # the check of the settings, which follows, suggests the nearest setting
    return f"{flag}: unknown option; did you mean {close[0]}?" if close and close[0] not in settings else ""


def _flags(target: Callable[..., Any]) -> list[str]:
    """Return the options of a function or dataclass, as users write them."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(target, args=["--help"])
    return sorted(set(re.findall(r"--[a-z][\w-]*", printed.getvalue())))
