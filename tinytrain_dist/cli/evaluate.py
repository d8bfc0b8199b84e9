"""`tinytrain evaluate`: the loss of a checkpoint on token files or a text, in which every token counts once.

With --nproc the ranks share the windows; every rank holds the whole model.
"""

from __future__ import annotations

import glob
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt
import tyro

from tinytrain_dist.checkpoint.discovery import find_model, is_huggingface_folder, read_trainer_state
from tinytrain_dist.checkpoint.load_model import load_model
from tinytrain_dist.checkpoint.load_tokenizer import ids_before_document, load_tokenizer
from tinytrain_dist.cli.arguments import UsageError, call_verb
from tinytrain_dist.cli.rank_program import run_rank
from tinytrain_dist.cli.tables import PathArgument
from tinytrain_dist.data.bytes_per_token import bytes_per_token
from tinytrain_dist.data.preparation.content_type import JSON_LINES_SUFFIXES
from tinytrain_dist.data.stored_tokenizer import check_same_tokenizer
from tinytrain_dist.data.token_dataset import open_side_files
from tinytrain_dist.data.token_file import SlicedTokens
from tinytrain_dist.data.token_source import TokenSource
from tinytrain_dist.distributed.context import init_distributed, launcher_rank, shutdown
from tinytrain_dist.errors import DataError
from tinytrain_dist.launch.start import module_command
from tinytrain_dist.metrics.perplexity import perplexity_of
from tinytrain_dist.training.scoring import (
    Score,
    TokenMarks,
    Window,
    sliding_windows,
    summarize,
    window_losses,
)
from tinytrain_dist.utils.option_types import Number
from tinytrain_dist.utils.progress import progress_bar
from tinytrain_dist.utils.regular_files import read_text
from tinytrain_dist.utils.shard_paths import TOKEN_FILE_ENDINGS, data_folders

WINDOWS_AT_ONCE = 16  # a rank takes this many windows in a row, so that they share forward passes


@dataclass(frozen=True)
class Tokens:
    """What is scored: token IDs, the first of which is only context."""

    ids: SlicedTokens
    num_bytes: int | None  # of the text that the other tokens stand for, if they count; None: not known
    marks: TokenMarks = TokenMarks()


def evaluate(
    checkpoint: PathArgument,
    data: Annotated[str, tyro.conf.arg(metavar="FILE")],
    token_dtype: Literal["uint16", "uint32", "int32"] | None = None,
    stride: Number = None,
    nproc: Number = None,
    ema: bool = False,
) -> int:
    """Print loss, perplexity and bits per byte of a checkpoint on a token file or a text.

    Every token is predicted once, so the numbers do not depend on sampling. The model computes in float32. If it was
    trained with loss_mask or document_mask, token files are read with their masks and their documents as well.

    Args:
        checkpoint: A checkpoint, a run (its newest valid checkpoint is used), or a Hugging Face folder, such as an
            export.
        data: Token files made with the tokenizer of the model, as val_data takes them: a .npy or .bin file, a folder,
            or a glob in quotes, whose files are read as one. Any other file is a text (UTF-8).
        token_dtype: Type of the token IDs in files without a header.
        stride: Tokens that each window predicts. The tokens before them in the window are context, so a smaller stride
            gives more context and takes longer. Default: context_len, that is windows without overlap.
        nproc: Number of processes. Default: 1.
        ema: Evaluate the moving average of the weights (see ema_decay).
    """
    if nproc is not None and nproc < 1:
        raise UsageError(f"--nproc: {nproc} is not a number of processes; give at least 1", "evaluate")
    if nproc is not None and nproc > 1 and launcher_rank()[1] == 1:
        _start_ranks(
            checkpoint, data, _words({"stride": stride, "token-dtype": token_dtype, "ema": ema or None}), nproc
        )
    context = init_distributed()
    try:
        folder = find_model(checkpoint)
        model = load_model(folder, context.device, average=ema)
        context_len = model.model_config.context_len
        stride = context_len if stride is None else stride
        if not 1 <= stride <= context_len:
            raise UsageError(f"--stride: {stride} is not in 1 .. {context_len} (context_len of the model)", "evaluate")
        vocab_size = model.model_config.vocab_size or 1
        if _names_token_files(data, token_dtype):
            tokens = _read_token_files(data, folder, vocab_size, token_dtype)
        else:
            tokens = _read_text(Path(data), folder, vocab_size)
        marks = tokens.marks
        windows = sliding_windows(len(tokens.ids), context_len, stride)
        # blocks of windows, so that the forward passes are the same for any number of ranks
        blocks = [windows[at : at + WINDOWS_AT_ONCE] for at in range(0, len(windows), WINDOWS_AT_ONCE)]
        mine = blocks[context.rank :: context.world_size]
        with progress_bar("windows", sum(map(len, mine)), shown=context.is_main) as advance:
            losses = [window_losses(model, tokens.ids, block, context.device, advance, marks) for block in mine]
        gathered = context.all_gather_object(losses)
        if context.is_main:
            _print(folder, data, stride, _in_order(gathered, len(blocks)), windows, tokens)
    finally:
        shutdown()
    return 0


def _in_order(gathered: list[list[list[float]]], num_blocks: int) -> list[float]:
    """Return the losses of all windows in their order. gathered: by rank, the losses of each of its blocks."""
    world_size = len(gathered)
    return [loss for block in range(num_blocks) for loss in gathered[block % world_size][block // world_size]]


def _words(options: dict[str, object]) -> list[str]:
    """Return options as words of a command. None: left out; True: a flag without a value."""
    given = {f"--{name}": value for name, value in options.items() if value is not None}
    return [word for name, value in given.items() for word in ([name] if value is True else [name, str(value)])]


def _start_ranks(checkpoint: Path, data: str, options: list[str], nproc: int) -> NoReturn:
    """Become the command that runs this verb on several processes."""
    module_command("tinytrain_dist.cli.evaluate", [str(checkpoint), "--data", data, *options], nproc).run()


def _names_token_files(data: str, token_dtype: str | None) -> bool:
    """Return whether --data names token files, and not a text."""
    if token_dtype is not None or data.endswith(TOKEN_FILE_ENDINGS) or os.path.isdir(data):
        return True
    return not os.path.exists(data) and (glob.has_magic(data) or os.path.exists(f"{data}.bin"))


class _SourceTokens:
    """The token IDs of a source, which are read when a slice of them is taken."""

    def __init__(self, source: TokenSource) -> None:
        self.source, self.dtype = source, source.dtype

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, part: slice) -> npt.NDArray[Any]:
        first, last, _ = part.indices(len(self))
        return self.source.read(first, max(0, last - first))


def _read_token_files(data: str, checkpoint: Path, vocab_size: int, token_dtype: str | None) -> Tokens:
    """Return the tokens of an entry that val_data could have. Errors: DataError."""
    source = TokenSource(data, vocab_size=vocab_size, token_dtype=token_dtype)
    for folder in data_folders([data]):
        check_same_tokenizer(checkpoint, folder)
    _check_length(data, len(source))
    marks = _read_marks(source, checkpoint)
    tables = (bytes_per_token(folder, vocab_size) for folder in (*data_folders([data]), checkpoint))
    table = next((table for table in tables if table is not None), None)
    ids = _SourceTokens(source)
    return Tokens(ids, None if table is None else _sum_of_bytes(table, ids, marks), marks)


def _read_text(path: Path, checkpoint: Path, vocab_size: int) -> Tokens:
    """Return the tokens of a text. Errors: DataError, or UsageError if there is no tokenizer."""
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise UsageError(
            f"--data: {checkpoint} has no tokenizer.json to read a text with; give a token file (.npy, .bin)",
            "evaluate",
        )
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--data: {path} cannot be read ({error}); give token files (.npy, .bin) or a text file"
        ) from None
    if path.name.lower().endswith(JSON_LINES_SUFFIXES):
        _print_note(
            f"{path} is read as it is, so its braces and field names are scored as well; `tinytrain prepare` makes "
            "token files of its texts"
        )
    before = ids_before_document(checkpoint, tokenizer)
    found = tokenizer.encode(text, add_special_tokens=False).ids
    _check_length(path, len(before) + len(found))
    num_bytes = len(text.encode())
    if not before:  # then the first token of the text is not predicted
        table = bytes_per_token(checkpoint, vocab_size)
        num_bytes -= int(table[found[0]]) if table is not None else len(tokenizer.decode(found[:1]).encode())
    return Tokens(np.array([*before[-1:], *found]), num_bytes)


def _check_length(path: Path | str, num_tokens: int) -> None:
    if num_tokens < 2:
        raise DataError(f"--data: {path} has {num_tokens} token(s), but at least 2 are needed; give a longer text")


def _read_marks(source: TokenSource, checkpoint: Path) -> TokenMarks:
    """Return the masks and the documents of token files, if the run of the checkpoint used such. Errors: DataError."""
    if is_huggingface_folder(checkpoint):
        if source.open_masks():
            _print_note(
                f"{checkpoint} does not say with which settings it was trained, so the mask files are not read and all "
                "tokens count"
            )
        return TokenMarks()
    settings = read_trainer_state(checkpoint).get("config", {})
    loss_mask, document_mask = bool(settings.get("loss_mask")), bool(settings.get("document_mask"))
    if not loss_mask and not document_mask:
        return TokenMarks()
    open_side_files(source, loss_mask, document_mask)
    length = len(source)
    counted = source.read_mask(0, length) if loss_mask else np.ones(length, np.bool_)
    if not document_mask:
        return TokenMarks(counted)
    begins = np.zeros(length, np.bool_)
    begins[source.document_starts(0, length)] = True
    return TokenMarks(counted & ~begins, np.cumsum(begins))


def _print_note(note: str) -> None:
    """Print a note on one rank."""
    if launcher_rank()[0] == 0:
        print(f"note: {note}", file=sys.stderr)


def _sum_of_bytes(table: npt.NDArray[np.int64], ids: SlicedTokens, marks: TokenMarks, at_once: int = 2**24) -> int:
    """Return the bytes of all tokens but the first that count, without loading the whole file."""
    total = 0
    for start in range(1, len(ids), at_once):
        num_bytes = table[ids[start : start + at_once]]
        total += int((num_bytes if marks.counted is None else num_bytes * marks.counted[start : start + at_once]).sum())
    return total


def _print(
    checkpoint: Path, data: str, stride: int, losses: list[float], windows: list[Window], tokens: Tokens
) -> None:
    score: Score = summarize(losses, windows, tokens.marks)
    if not score.tokens:
        raise DataError(f"--data: no token of {data} counts, by its mask file; give another file")
    error = score.standard_error
    low, high = perplexity_of(score.loss - error), perplexity_of(score.loss + error)
    several = score.windows > 1  # else there is no standard error
    print(f"{checkpoint} on {data}: {score.tokens:,} tokens in {score.windows:,} window(s), stride {stride}")
    margin = f" ± {error:.5f} nats per token (± one standard error)" if several else " nats per token"
    print(f"loss           {score.loss:.5f}{margin}")
    print(f"perplexity     {score.perplexity:.4f}" + (f" ({low:.4f} .. {high:.4f})" if several else ""))
    if tokens.num_bytes:
        error_per_byte = error * score.tokens / math.log(2) / tokens.num_bytes
        margin = f" ± {error_per_byte:.5f}" if several else ""
        print(f"bits per byte  {score.bits_per_byte(tokens.num_bytes):.5f}{margin}, over {tokens.num_bytes:,} bytes")
    else:
        print("bits per byte  not known: the bytes of a token are not (no tokenizer.json, no token_bytes.npy)")


def main(args: list[str]) -> int:
    """Run `tinytrain evaluate`."""
    return call_verb(evaluate, "evaluate", args)


if __name__ == "__main__":  # the agent starts this module by its name
    run_rank(main)
