"""Files and folders that this user must not read are named in a sentence, by every verb that meets them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tools import newest

SECONDS = 300.0
CODE = """
import contextlib, io, json, os, sys
from tinytrain_dist.cli.main import main
found = []
for path, args in json.loads(sys.argv[1]):
    mode = os.stat(path).st_mode
    os.chmod(path, 0)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main(args)
    os.chmod(path, mode)
    found.append([code, errors.getvalue()])
print(json.dumps(found))
"""
# root may read everything, unless it gives up the capabilities for that
AS_OTHERS = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
AS_OTHERS += ["--inh-caps", "-dac_override,-dac_read_search"]


def test_what_must_not_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root reads everything, and there is no setpriv")
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for name in ("train.npy", "val.npy", "meta.json", "tokenizer.json"):
        shutil.copy(folder / name, data)
    for name in ("train", "val"):
        (data / f"{name}.documents.npy").write_bytes(starts_of_one_document())
    shutil.copytree(folder / "one", run)
    checkpoint = newest(run)
    config = tmp_path / "c.toml"
    config.write_text("")
    sample = ["sample", str(run), "--prompt", "a", "--max-new-tokens", "1"]
    cases = [
        (data, ["data", str(data)], "folder"),
        (data / "train.npy", ["data", str(data)], "file"),
        (data / "meta.json", ["data", str(data)], "file"),
        (data / "tokenizer.json", ["data", str(data)], "file"),
        (data / "train.documents.npy", ["data", str(data)], "file"),
        (run / "checkpoints", sample, "folder"),
        (checkpoint / "tokenizer.json", ["sample", str(checkpoint), "--prompt", "a"], "file"),
        (checkpoint / "manifest.json", ["sample", str(checkpoint), "--prompt", "a"], "file"),
        (run / "checkpoints", ["ls", str(run)], "folder"),
        (config, ["config", str(config)], "file"),
    ]
    command = [sys.executable, "-c", CODE, json.dumps([(str(path), args) for path, args, _ in cases])]
    done = subprocess.run(
        [*(AS_OTHERS if os.geteuid() == 0 else []), *command],
        capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (path, args, kind), (code, err) in zip(cases, json.loads(done.stdout), strict=True):
        assert code in (1, 2), (args, err)
        assert str(path) in err, (args, err)
        assert "no permission to read" in err, (args, err)
        assert kind in err
        for wrong in ("Errno", "Traceback", "not a tokenizer", "make it again", "prepare` again"):
            assert wrong not in err, (args, err)


def starts_of_one_document() -> bytes:
    """Return a .npy file of document starts with one document."""
    import io

    import numpy as np

    file = io.BytesIO()
    np.save(file, np.zeros(1, np.int64))
    return file.getvalue()
