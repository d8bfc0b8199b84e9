"""Fixtures of several test files of text preparation: a corpus and a trained vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tinytrain_dist.data.preparation.tokenizer import Vocabulary


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A file of 120 stories, separated as in TinyStories."""
    from tests.helpers.prepared_text import write_stories  # here: the import skips a test without the packages

    return write_stories(tmp_path / "stories.txt")


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    """A byte-level BPE of at most 600 token IDs."""
    from tests.helpers.prepared_text import story
    from tinytrain_dist.data.preparation.tokenizer import train_bpe

    return train_bpe((story(seed, 500) for seed in range(20)), 600)
