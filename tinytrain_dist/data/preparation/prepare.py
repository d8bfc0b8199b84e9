"""Turn text into a tokenizer and token files, with the same bytes for any number of workers and interruptions.

Must not know models, training, or how token files are sampled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinytrain_dist import __version__
from tinytrain_dist.data.preparation.corpus import Corpus, Position
from tinytrain_dist.data.preparation.encoding import ChatTokenizer, encode_all, in_batches
from tinytrain_dist.data.preparation.options import MAX_DOCUMENT_BYTES, PrepareOptions
from tinytrain_dist.data.preparation.output_folder import WorkFolder, new_folder, resumable_folder
from tinytrain_dist.data.preparation.planning import Plan, make_plan, say
from tinytrain_dist.data.preparation.recognition import recognise
from tinytrain_dist.data.preparation.sources import find_sources
from tinytrain_dist.data.preparation.text_documents import Reading
from tinytrain_dist.data.preparation.token_writer import TokenWriter, write_file
from tinytrain_dist.utils.json_files import parse_json, to_json
from tinytrain_dist.utils.text import is_url

_MIN_DEFAULT_DOCUMENT_BYTES = 4096
# `prepare` warns about a file with fewer tokens than this: a common context_len and the token after it.
_MIN_TOKENS = 1025


def prepare(sources: tuple[str, ...] | str, out: str, **options: Any) -> dict[str, Any]:
    """Turn text into a tokenizer and token files for training. sources, out, options: see `PrepareOptions`.

    Returns the contents of meta.json. Raises DataError for text, tokenizers or folders that cannot be used, and
    ConfigError for settings that are out of range or have no effect.
    """
    return prepare_with(PrepareOptions((sources,) if isinstance(sources, str) else sources, out, **options))


def prepare_with(given: PrepareOptions) -> dict[str, Any]:
    """Do what `prepare` does, with its arguments as one value."""
    given.check()
    target = Path(os.path.realpath(os.path.expanduser(given.out)))
    if given.shard_tokens is None:
        with new_folder(target, given.overwrite) as folder:
            corpus = _corpus(given)
            return _Preparation(given, corpus, make_plan(corpus, given, folder), folder).run()
    with resumable_folder(target, given.overwrite) as work:
        corpus = _corpus(given)
        plan = _resume_or_make_plan(work, corpus, given)
        return _Preparation(given, corpus, plan, work.data, work).run()


def _corpus(given: PrepareOptions) -> Corpus:
    """Find and look at every file, and choose the longest document where the settings leave it open."""
    sources = find_sources(given.sources, say)
    reading = Reading(
        given.document_field,
        given.split_by,
        given.errors,
        given.max_document_bytes or 0,
        given.format,
        given.selection(),
        given.chat,
    )
    corpus = Corpus(sources, reading, recognise(sources, reading, say))
    size_is_unknown = any(is_url(path) and facts.size == 0 for path, facts in corpus.facts.items())
    by_default = MAX_DOCUMENT_BYTES if size_is_unknown else max(corpus.total_bytes // 128, _MIN_DEFAULT_DOCUMENT_BYTES)
    limit = given.max_document_bytes or min(by_default, MAX_DOCUMENT_BYTES)
    return replace(corpus, reading=replace(reading, max_document_bytes=limit))


def _resume_or_make_plan(work: WorkFolder, corpus: Corpus, given: PrepareOptions) -> Plan:
    """Return the plan of the same work that was interrupted, or a new one."""
    identity = _stored_json(
        {
            **given.of_bytes(),
            "tokenizer_digest": _digest_of_tokenizer(given.tokenizer),
            "ids_digest": hashlib.sha256("\n".join(sorted(corpus.reading.selection.ids)).encode()).hexdigest(),
            "tinytrain_dist": __version__,
            "sources": [source.name for source in corpus.sources],
            "files": [[source.name_of(path), corpus.facts[path].identity] for source, path in corpus.files],
        }
    )
    saved = work.resume(identity, given.overwrite)
    if saved is not None:
        plan = Plan.load(work.path, saved["plan"])
        corpus.digests = plan.digests
        return plan
    plan = make_plan(corpus, given, work.path)
    work.save_plan({"identity": identity, "plan": plan.save(work.path)})
    return plan


def _stored_json(value: Any) -> Any:
    """Return a value as it is after it was stored as JSON, with lists in place of tuples."""
    return parse_json(to_json(value))


def _digest_of_tokenizer(place: str | None) -> str:
    """Return a digest of the files of a tokenizer, as far as they can be read."""
    if place is None:
        return ""
    path = Path(place).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    files = [file, *(file.with_name(name) for name in ("tokenizer_config.json", "chat_template.jinja"))]
    contents = [name.read_bytes() if name.is_file() else b"" for name in files]
    return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()


def _default_workers() -> int:
    usable_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable_cpus, 16)  # the single process that reads cannot keep more of them busy


@dataclass(frozen=True)
class _Preparation:
    """Encode a corpus as planned, and write the files of a data set. work: where progress is kept, if it is."""

    given: PrepareOptions
    corpus: Corpus
    plan: Plan
    folder: Path
    work: WorkFolder | None = None

    @property
    def dtype(self) -> str:
        """The type of the token files, in numpy's notation."""
        return "<u2" if self.plan.vocabulary.size <= 1 << 16 else "<u4"

    def run(self) -> dict[str, Any]:
        """Write all files, and return the contents of meta.json. Errors: DataError; OSError from the disk."""
        progress = self.work.progress() if self.work is not None else {}
        with self._writer("train", progress) as train, self._writer("val", progress) as val:
            start = Position(**progress["position"]) if progress else None
            if start is not None and self.work is not None:
                file, files = min(start.file + 1, len(self.corpus.files)), len(self.corpus.files)
                say(
                    f"resuming the work in {self.work.path} after {train.shards:,} shards of train and {val.shards:,} "
                    f"of val, in file {file:,} of {files:,}"
                )
            self._encode(train, val, start)
            digests = {**train.finish(), **val.finish()}
        vocabulary = self.plan.vocabulary
        digests["tokenizer.json"] = write_file(self.folder / "tokenizer.json", vocabulary.text)
        write_file(self.folder / "tokenizer_config.json", to_json(vocabulary.config, indent=2) + "\n")
        meta = self._meta({"train": train, "val": val}, digests)
        write_file(self.folder / "meta.json", to_json(meta, indent=2) + "\n")
        for writer in (train, val):
            if writer.tokens < _MIN_TOKENS:
                say(
                    f"{writer.side}.npy has only {writer.tokens:,} tokens: context_len must be smaller than that; give "
                    "more text or another --val-fraction"
                )
            if self.given.chat and writer.counted == 0:
                say(
                    f"{writer.side}: no token counts, because the assistant says nothing in these conversations; "
                    "training with loss_mask = true needs some that count"
                )
        return meta

    def _writer(self, side: str, progress: dict[str, Any]) -> TokenWriter:
        return TokenWriter(
            self.folder, side, self.dtype, self.given.shard_tokens, progress.get(side), masked=self.given.chat
        )

    def _encode(self, train: TokenWriter, val: TokenWriter, start: Position | None) -> None:
        """Encode all documents from a position on, and commit whenever a shard is complete."""
        positions: deque[Position] = deque()  # after each batch that is being encoded

        def batches() -> Iterator[list[bytes]]:
            for batch in in_batches(self._kept_documents(start)):
                positions.append(self.corpus.position)
                yield batch

        chat = None
        if self.given.chat and self.given.tokenizer is not None:
            chat = ChatTokenizer(self.given.tokenizer, self.plan.tokenizer_class)
        settings = (self.plan.vocabulary, self.plan.use_fast, self.plan.threshold, self.dtype, chat)
        committed = train.shards + val.shards
        for parts in encode_all(batches(), settings, self.given.workers or _default_workers()):
            train.append(parts[0])
            val.append(parts[1])
            position = positions.popleft()
            if self.work is not None and train.shards + val.shards > committed:
                committed = train.shards + val.shards
                state = {"train": train.commit(), "val": val.commit(), "position": dataclasses.asdict(position)}
                self.work.commit(state)

    def _kept_documents(self, start: Position | None) -> Iterator[bytes]:
        """Yield the documents from a position on, without those that repeat an earlier one."""
        duplicates = self.plan.duplicates
        for document in self.corpus.documents("encoding", start):
            if duplicates is None or self.corpus.position.total - 1 not in duplicates:
                yield document

    def _record_of_duplicates(self) -> dict[str, Any]:
        removed = self.plan.duplicates
        if removed is None:
            return {}
        return {
            "dedup": {
                "method": self.given.dedup,
                "removed_documents": removed.documents,
                "removed_bytes": removed.bytes,
            }
        }

    def _meta(self, files: dict[str, TokenWriter], digests: dict[str, str]) -> dict[str, Any]:
        """Return the contents of meta.json."""
        vocabulary = self.plan.vocabulary
        shard_tokens = self.given.shard_tokens
        shards = {f"{name}_shards": file.shards for name, file in files.items()} if shard_tokens is not None else {}
        return {
            "vocab_size": vocabulary.size,
            "dtype": np.dtype(self.dtype).name,
            "eos_id": vocabulary.eos_id,
            "bos_id": next(iter(vocabulary.before), None),
            **{f"{name}_tokens": file.tokens for name, file in files.items()},
            **{f"{name}_documents": file.documents for name, file in files.items()},
            **{f"{name}_bytes": file.bytes for name, file in files.items()},
            **shards,
            **({f"{name}_counted_tokens": file.counted for name, file in files.items()} if self.given.chat else {}),
            "max_document_bytes": self.corpus.reading.max_document_bytes,
            **self._record_of_duplicates(),
            "sources": self.corpus.records(),
            "digests": digests,
            "tokenizer": {
                "kind": vocabulary.kind,
                "regex": vocabulary.regex,
                "eos_token": vocabulary.eos_token,
                "ids_before_document": list(vocabulary.before),
                "ids_after_document": list(vocabulary.after),
                "special_tokens": vocabulary.spelled,
            },
            "tinytrain_dist": __version__,
        }
