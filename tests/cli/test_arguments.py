"""How mistakes on the command line of a verb are described, and how settings are told from options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tinytrain_dist.cli.arguments import UsageError, call_verb, parse_options
from tinytrain_dist.utils.option_types import ConfigFile, Number


@dataclass(frozen=True)
class Options:
    config: ConfigFile
    """A configuration."""
    nproc: Number = None
    """Processes."""
    pair: tuple[int, int] = (1, 2)
    watch: bool = False


def verb(options: Options) -> Options:
    return options


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "CONFIG.toml is missing: a configuration; --help explains the arguments"),
        (["--lr-max", "1", "c.toml"], "CONFIG is missing; it must come before all options"),
        (["c", "--nproc", "x"], "--nproc: got 'x'; give a number"),
        (["c", "--nproc"], "--nproc: needs a value; --help explains it"),
        (["c", "--pair", "1"], "--pair: needs 2 values; --help explains it"),
    ],
)
def test_a_mistake_is_one_sentence(args: list[str], sentence: str) -> None:
    with pytest.raises(UsageError, match="problem in the arguments of `tinytrain train`") as error:
        parse_options(Options, "train", args)
    assert sentence in str(error.value)
    assert len(error.value.problems) == 1


def test_a_verb_without_settings_refuses_what_it_does_not_know() -> None:
    def show(run: ConfigFile, watch: bool = False) -> tuple[Path, bool]:
        return run, watch

    assert call_verb(show, "status", ["r", "--watch"]) == (Path("r"), True)
    for args, sentence in (
        (["r", "--wach"], "--wach: unknown option; did you mean --watch?"),
        (["r", "more"], "more: one argument too many; leave it out"),
    ):
        with pytest.raises(UsageError) as error:
            call_verb(show, "status", args)
        assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("typed", "meant"), [("--nprocs", "--nproc"), ("--nprocs=2", "--nproc"), ("--watsh", "--watch")]
)
def test_a_mistyped_option_beside_settings_gets_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_options(Options, "train", ["c.toml", "--lr-max", "1", typed, "2"])
    assert error.value.problems == [f"{typed.partition('=')[0]}: unknown option; did you mean {meant}?"]


def test_a_mistyped_setting_is_left_to_the_check_of_the_settings() -> None:
    words = ["--total-stepps", "3", "--no_compile", "--max_shard_bytes=1", "--unlike-anything", "4"]
    assert parse_options(Options, "train", ["c.toml", *words])[1] == words


def test_what_a_verb_itself_prints_and_raises_passes_through(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(run: ConfigFile) -> int:
        import sys

        print("from the verb", file=sys.stderr)
        raise SystemExit(7)

    with pytest.raises(SystemExit, match="7"):
        call_verb(fail, "status", ["r"])
    assert capsys.readouterr().err == "from the verb\n"


def test_all_other_arguments_are_settings_in_their_order() -> None:
    args = ["c.toml", "--lr-max", "-1", "--nproc=2", "--betas", "0.9", "0.95", "--watch", "--", "--nproc", "3"]
    options, settings = parse_options(Options, "train", args)
    assert options == Options(Path("c.toml"), nproc=2, watch=True)
    assert settings == ["--lr-max", "-1", "--betas", "0.9", "0.95", "--nproc", "3"]
