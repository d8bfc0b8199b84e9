"""Stages about the machine: what it has, and whether the tests of the suite that need a GPU pass."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu_stages.context import Stage

ROOT = Path(__file__).resolve().parents[2]


def environment(stage: Stage) -> None:
    """Record devices and versions."""
    import torch

    from tinytrain_dist.metrics.device_specs import spec_of_gpu
    from tinytrain_dist.metrics.environment import library_versions

    stage.put("versions", library_versions())
    packages: dict[str, Any] = {}
    for name in ("triton", "transformers", "accelerate", "flash_attn", "flash_attn_interface", "pytest"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "present" if importlib.util.find_spec(name) else None
    stage.put("packages", packages)
    stage.put("processors", os.cpu_count())
    stage.put("machine", platform.platform())
    if stage.device == "cpu":
        stage.note("no GPU is used: every number below is of a CPU and says nothing about a GPU")
        return
    stage.put("cudnn", torch.backends.cudnn.version())
    gpus: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": found.name,
                "memory GiB": round(found.total_memory / 2**30, 1),
                "multiprocessors": found.multi_processor_count,
                "capability": f"{found.major}.{found.minor}",
            }
        )
    stage.put("gpus", gpus)
    spec = spec_of_gpu(gpus[0]["name"])
    if spec is None:
        stage.note(f"{gpus[0]['name']} is not in metrics/device_specs.py, so the report has no MFU")
    else:
        stage.put("peak bf16 TFLOP/s", spec.bf16_flops / 1e12)
    query = "power.limit,clocks.max.sm,clocks.sm,temperature.gpu,driver_version"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        stage.put(query, shown.stdout.strip().splitlines())
    except (OSError, subprocess.TimeoutExpired) as error:
        stage.note(f"nvidia-smi: {error}")


def tests(stage: Stage) -> None:
    """Run the tests of the suite that are marked `cuda`."""
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        stage.note(f"the tests were not run: {' and '.join(missing)} missing")
        return
    xml = stage.folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider", f"--junitxml={xml}"]
    # other tests may import packages that this machine lacks; their files are then not collected
    command += ["--continue-on-collection-errors", *(["tests/cuda"] if stage.dry else [])]
    env = {**os.environ, **({"TINYTRAIN_TEST_DEVICE": "cpu"} if stage.dry else {})}
    log = stage.folder / "tests.log"
    with open(log, "w") as file:
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, check=False)
    text = log.read_text(errors="replace")
    lines = text.strip().splitlines()
    print(text[-12000:])
    stage.put("exit code", done.returncode)
    stage.put("summary", lines[-1].strip("= ") if lines else "")
    if xml.exists():
        stage.put("failures", _failures(xml))
    elif done.returncode:
        stage.put("failures", {"pytest": "\n".join(lines[-20:])})


def _failures(xml: Path) -> dict[str, str]:
    """Return the last lines of each failure or error, by test."""
    found = {}
    for case in ElementTree.parse(xml).getroot().iter("testcase"):
        for kind in ("failure", "error"):
            for problem in case.iter(kind):
                text = re.sub(r"\x1b\[[0-9;]*m", "", problem.text or problem.get("message") or "")
                errors = [line for line in text.splitlines() if line.startswith("E ")] or text.splitlines()
                found[f"{case.get('classname')}::{case.get('name')}"] = "\n".join(errors[-12:])[-1500:]
    return found
