"""The settings for copies: what is refused, and that no message repeats a secret."""

from __future__ import annotations

import pytest

from tests.helpers.configs import only_problem, problems_of
from tinytrain_dist.config.checkpoint_copies import shown_place

SECRETS = [
    "s3://key:secret@bucket/x",
    "s3://secret@bucket/x",
    "ftp://me:secret@host/x",
    "abfs://box/x?sig=secret",
    "s3://bucket/x#secret",
]


@pytest.mark.parametrize("name", ["checkpoint_copies", "resume", "ckpt_path_to_resume"])
@pytest.mark.parametrize("url", SECRETS)
def test_a_url_with_a_secret_is_refused_without_repeating_it(name: str, url: str) -> None:
    problem = only_problem(**{name: url})
    assert problem.startswith(f"{name}: ")
    assert "is given with a password, a key or a query" in problem
    assert "secret" not in problem
    assert "secret" not in shown_place(url)


@pytest.mark.parametrize("place", ["s3://bucket/x", "sftp://me@host/x", "file:///disk/x", "/disk/x", "disk", "a:b@c/x"])
def test_places_that_are_accepted(place: str) -> None:
    assert problems_of(checkpoint_copies=place) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint_copies": ""}, "is empty"),
        ({"checkpoint_copies": "https://host/x"}, "https://host/x cannot be written to"),
        ({"checkpoint_copies": "runs/a", "target_dir": "runs/a"}, "is the folder of the run itself"),
        ({"checkpoint_copies": "file:///d/c", "ckpt_dir": "/d/c"}, "is the folder of the run itself"),
        ({"copies_keep_last": 3}, "copies_keep_last: 3 has no effect without checkpoint_copies"),
        ({"copies_end_limit": 1.0}, "has no effect without checkpoint_copies"),
        ({"checkpoint_copies": "/x", "copies_keep_every": 7, "ckpt_every": 5}, "7 is not a multiple of ckpt_every 5"),
        ({"checkpoint_copies": "/x", "copies_keep_last": 0}, "must be at least 1"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, object], message: str) -> None:
    assert message in only_problem(**settings)
