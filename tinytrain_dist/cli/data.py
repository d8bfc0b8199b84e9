"""`tinytrain data`: show what is in token files: numbers, duplicates, overlap of evaluation and training, windows.

Must not know how the numbers are computed: see data/statistics.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tinytrain_dist.cli.arguments import UsageError, call_verb
from tinytrain_dist.cli.data_views import text, windows
from tinytrain_dist.cli.data_views.findings import Findings, collect
from tinytrain_dist.cli.data_views.page import MARK, fill_page
from tinytrain_dist.cli.data_views.place import (
    Place,
    Vocabulary,
    check_eos_id,
    check_slots,
    find_place,
    read_vocabulary,
)
from tinytrain_dist.cli.page_file import check_page_path, write_page
from tinytrain_dist.cli.tables import PathArgument
from tinytrain_dist.config.loading import check_tokenizers
from tinytrain_dist.config.validation import LARGEST_NUMBER
from tinytrain_dist.data.statistics.windows import MarkedWindow, training_windows
from tinytrain_dist.reliability.stop_requests import exit_on_stop_signals
from tinytrain_dist.utils.json_files import to_json
from tinytrain_dist.utils.option_types import Number
from tinytrain_dist.utils.text import format_bytes

NGRAM = 13  # tokens; as in the checks for contamination of GPT-3 (Brown et al. 2020, appendix C), there in words


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Show what is in token files.

    Prints tokens, documents and their lengths, bytes per token, exact duplicates, ids that are never used, special
    tokens, and what evaluation files have in common with the training data. --decode and --step show windows as text.
    """

    place: PathArgument
    """A folder made by `tinytrain prepare`, a token file, a folder or glob of them, a run, or a configuration."""
    val_data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE ...", help_behavior_hint="")] = ()
    """Evaluation files to compare with the training data. Default: those of the folder or of the run."""
    token_dtype: Annotated[Literal["uint16", "uint32", "int32"] | None, tyro.conf.arg(help_behavior_hint="")] = None
    """Type of the token IDs in files without a header."""
    vocab_size: Number = None
    """Number of IDs in the vocabulary. Default: what the run, meta.json or tokenizer.json says."""
    eos_id: Number = None
    """Token that ends a document, for files that do not record where documents begin. Default: what meta.json or the
    tokenizer says."""
    context_len: Number = None
    """Tokens of a window. Default: that of the run, or 256."""
    ngram: Number = None
    """Tokens of the n-grams that are searched in the training data. Default: 13, or a whole window if that is less."""
    all_windows: bool = False
    """Compare all windows of the evaluation files. Default: those that the run draws in an evaluation; all, without a
    run."""
    decode: Number = None
    """Show so many windows that training draws in its first step, or in --step, instead of the numbers."""
    step: Number = None
    """Show the windows that training draws in this step, counted from 1, instead of the numbers."""
    slot: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...", help_behavior_hint="")] = ()
    """Show only these sample slots of the step, counted from 0. Default: all of them."""
    seed: Number = None
    """Seed of the windows that are shown. Default: that of the run, or 0."""
    html: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Also write the numbers, with pictures, and the windows that are shown to this page. An existing file is replaced
    only if it is such a page."""
    json: bool = False
    """Print JSON, for other programs."""

    def check(self) -> None:
        """Raise UsageError with all problems."""
        least = {"vocab_size": 1, "eos_id": 0, "context_len": 1, "ngram": 1, "decode": 1, "step": 1, "seed": 0}
        given = {name: getattr(self, name) for name in least if getattr(self, name) is not None}
        numbers = [*given.items(), *(("slot", slot) for slot in self.slot)]
        problems = [
            f"--{name.replace('_', '-')}: {number} must be at least {least.get(name, 0)}"
            for name, number in numbers
            if number < least.get(name, 0)
        ]
        problems += [
            f"--{name.replace('_', '-')}: {number} must be at most 2**53 = {LARGEST_NUMBER}; give a smaller number"
            for name, number in numbers
            if number > LARGEST_NUMBER
        ]
        if self.decode is not None and self.slot:
            problems.append("--slot: has no effect with --decode, which shows the first slots; leave one of them out")
        elif self.slot and self.step is None:
            problems.append("--slot: needs --step, the step that draws the windows; add it")
        if self.seed is not None and not self.shows_windows:
            problems.append("--seed: has no effect on numbers; add --decode or --step, or leave it out")
        if self.shows_windows and self.html is None:
            problems += [
                f"--{name.replace('_', '-')}: has no effect on windows, which are shown in place of numbers; leave it "
                "out, or add --html"
                for name in ("ngram", "all_windows")
                if getattr(self, name)
            ]
        if problems:
            raise UsageError(problems, "data")

    @property
    def shows_windows(self) -> bool:
        """Whether windows are shown."""
        return self.decode is not None or self.step is not None


def show(options: DataOptions) -> int:
    """Print what the options ask for. Errors: ConfigError, DataError, CheckpointError."""
    options.check()
    if options.html is not None:
        check_page_path(options.html, "html", "data", MARK, "such a page")
    place = find_place(options.place, options.val_data, options.token_dtype, options.context_len, options.seed)
    if options.all_windows and not place.is_run:
        problem = "--all-windows: has no effect without a run, because all windows are compared then; leave it out"
        raise UsageError(problem, "data")
    ngram = _ngram(options, place.config.context_len + 1)
    vocabulary = read_vocabulary(place, options.vocab_size, options.eos_id)
    check_tokenizers(place.config)
    shown, notes = _draw(place, vocabulary, options) if options.shows_windows else ([], [])
    findings = None
    if not shown or options.html is not None:
        findings = collect(place, vocabulary, ngram, options.all_windows)
    _print(findings, shown, notes, vocabulary, options)
    if options.html is not None and findings is not None:
        page = fill_page(findings, shown, notes)
        write_page(options.html, "html", page)
        if not options.json:
            print(f"{options.html}: {format_bytes(len(page.encode()))}; open it in a browser")
    return 0


def _ngram(options: DataOptions, window: int) -> int:
    """Return the length of n-grams. window: tokens of a window. Errors: UsageError if no window contains one."""
    if options.ngram is None:
        return min(NGRAM, window)
    if options.ngram > window:
        problem = f"--ngram: {options.ngram} is more than the {window} tokens of a window; give a smaller number"
        raise UsageError(f"{problem}, or a larger --context-len", "data")
    return options.ngram


def _draw(place: Place, vocabulary: Vocabulary, options: DataOptions) -> tuple[list[MarkedWindow], list[str]]:
    """Return the windows to show, and sentences about where their marks come from.

    Errors: DataError; UsageError for a step or a slot that does not exist.
    """
    config = place.config
    step = options.step or 1
    if place.is_run and config.epochs is None and step > config.total_steps:
        raise UsageError(f"--step: {step} is not in 1 .. {config.total_steps} (total_steps)", "data")
    check_slots(options.slot, options.decode, place, step)
    slots = options.slot or range(options.decode or config.batch_sizes.at(step - 1))
    dataset = place.training_data()
    documents = vocabulary.documents_of(dataset.sources)
    if options.html is None:  # else it may be used for the evaluation files
        check_eos_id(vocabulary, documents)
    notes = []
    if place.has_masks and not place.is_run:
        notes.append(
            "The mask files beside the token files say which tokens count, as in a run with loss_mask = true; a run "
            "without it counts all."
        )
    if any(each.known and not each.recorded for each in documents):
        notes.append(text.assumption(vocabulary))
    return training_windows(dataset, documents, config.seed, step - 1, slots), notes  # the first step follows 0 steps


def _print(
    findings: Findings | None,
    shown: list[MarkedWindow],
    notes: list[str],
    vocabulary: Vocabulary,
    options: DataOptions,
) -> None:
    texts = vocabulary.texts
    if options.json:
        values = {} if findings is None else text.as_values(findings)
        if shown:
            values |= {"windows": windows.as_values(shown, texts), "window_notes": notes}
        print(to_json(values, indent=2))
    elif shown:
        windows.print_windows(shown, texts, windows.uses_colour(), notes)
    elif findings is not None:
        text.print_findings(findings)


def main(args: list[str]) -> int:
    """Run `tinytrain data`."""
    with exit_on_stop_signals():
        return show(call_verb(DataOptions, "data", args))
