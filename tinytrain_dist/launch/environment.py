"""Make the environment .venv of a checkout: torch, the package and its extras, in the tested versions.

    python tinytrain_dist/launch/environment.py [--torch VERSION] [EXTRAS]

With --torch it makes .venv-torch-VERSION, with that version of torch and otherwise the tested versions.

launch/setup.sh runs this file by its path, before anything is installed, so it may import only Python's own library.
When nothing has changed since the last call, it returns at once and needs no network.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the checkout
DEFAULT_EXTRAS = "prep,plot"
# What pip says if an index does not offer a version; the second where a constraint of the user names the package, too.
NOT_OFFERED = ("No matching distribution found", "ResolutionImpossible")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Variables for other installations, which would put the packages elsewhere or refuse .venv.
UNWANTED = ("PYTHONHOME", "PYTHONPATH", "PIP_PREFIX", "PIP_PYTHON", "PIP_REQUIRE_VIRTUALENV", "PIP_ROOT", "PIP_TARGET")


class SetupError(Exception):
    """The environment cannot be made; the message is a sentence for the user."""


def say(text: str) -> None:
    """Print a line on stderr. An output that cannot be written must not end the installation."""
    with contextlib.suppress(OSError):
        print(f"setup: {text}", file=sys.stderr, flush=True)


class Environment:
    """The environment of one checkout, or the one that it has for another version of torch."""

    def __init__(self, root: Path, base_python: str, other_torch: str = "") -> None:
        """base_python: the Python from which the environment is made. other_torch: a version, or "" for the tested."""
        self.root = root
        self.base_python = base_python
        self.other_torch = other_torch
        self.folder = root / (f".venv-torch-{other_torch}" if other_torch else ".venv")
        self.python = self.folder / "bin" / "python"
        self._place = self.folder / ".tinytrain-place"  # the path of the checkout, which scripts in the folder contain

    def make(self, extras: str, build: str) -> None:
        """Make it, or bring it up to date. build: of torch, "cpu" or "gpu". Errors: SetupError, or pip's own error."""
        stamp = self.folder / f".tinytrain-{extras}"
        wanted = self._checksum(extras, build)
        other_python = self._has_other_python()
        if not other_python and self.python.exists() and stamp.is_file() and stamp.read_text().strip() == wanted:
            return
        self._make_folder(clear=other_python)
        self._install_torch(build)
        say(f"installing tinytrain_dist[{extras}] and its dependencies (up to 0.2 GB, about a minute)")
        self._pip("-c", self._constraints(), "-e", f".[{extras}]")
        stamp.write_text(wanted + "\n")
        say(f"ready: {self.folder}")

    def _checksum(self, extras: str, build: str) -> str:
        """Return a checksum of everything from which the environment is made."""
        files = (self.root / name for name in ("pyproject.toml", "constraints.txt"))
        content = "\n".join([str(self.root), build, extras, *(file.read_text(encoding="utf-8") for file in files)])
        return str(zlib.crc32(content.encode()))

    def _has_other_python(self) -> bool:
        """Return whether the user gave a Python whose version is not that of this environment for another torch."""
        if not (self.other_torch and os.environ.get("PYTHON") and self.python.exists()):
            return False
        return self._output("-c", "import sys; print(*sys.version_info[:2])") != "{} {}".format(*sys.version_info[:2])

    def _make_folder(self, clear: bool) -> None:
        """Make the folder if it has no working Python or was moved. clear: replace it in any case."""
        moved = self._place.is_file() and self._place.read_text().strip() != str(self.root)
        clear = clear or moved
        if clear or not self._succeeds("-c", "import sys; sys.exit(sys.version_info < (3, 11))"):
            say(f"making {self.folder.name} with {self.base_python}")
            command = [self.base_python, "-m", "venv", *(["--clear"] if clear else []), str(self.folder)]
            subprocess.run(command, check=True, cwd=self.root, env=_variables())
        self._place.write_text(f"{self.root}\n")

    def _install_torch(self, build: str) -> None:
        """Install torch first, without its dependencies. They come with the package, from the user's index.

        The CPU build is a tenth of the size of the default build for Linux.
        """
        version = self.other_torch or self._tested_torch()
        installed = self._output("-c", "import importlib.metadata as m; print(m.version('torch'))")
        is_right_version = installed == version or installed.startswith(f"{version}+")
        if is_right_version and not (build == "gpu" and installed.endswith("+cpu")):
            return
        if build == "gpu":
            say(f"installing torch {version} with GPU libraries (about 3 GB, 2 to 5 minutes)")
            self._pip("--no-deps", "--force-reinstall", f"torch=={version}")
        elif sys.platform != "linux":
            say(f"installing torch {version} (about 0.1 GB, a minute)")
            self._pip("--no-deps", f"torch=={version}")
        else:
            say(
                f"no GPU here: installing the CPU build of torch {version} (about 0.2 GB, a minute); TORCH_BUILD=gpu "
                "installs the GPU build"
            )
            self._install_cpu_build(version)

    def _tested_torch(self) -> str:
        pins = (self.root / "constraints.txt").read_text(encoding="utf-8")
        found = re.search(r"^torch==(\S+)", pins, re.MULTILINE)
        if found is None:
            raise SetupError("constraints.txt: has no line torch==VERSION; restore the file")
        return found[1]

    def _constraints(self) -> str:
        """Return the file of constraints for the packages other than torch.

        Another torch may need other versions of its dependencies, so their lines are left out for it.
        """
        if not self.other_torch:
            return "constraints.txt"
        needs = self._output("-c", "import importlib.metadata as m; print(*m.requires('torch') or [], sep='\\n')")
        left_out = {"torch", *(_package_of(line) for line in needs.splitlines())}
        lines = (self.root / "constraints.txt").read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line and not line.startswith("#") and _package_of(line) not in left_out]
        file = self.folder / "constraints.txt"
        file.write_text("\n".join([*kept, f"torch=={self.other_torch}"]) + "\n", encoding="utf-8")
        return str(file)

    def _install_cpu_build(self, version: str) -> None:
        errors = ""
        for index in ([], ["--index-url", CPU_INDEX]):
            package = [f"torch=={version}+cpu", *index]
            done = _run_captured(self._pip_command("--no-deps", *package), self.root)
            if done.returncode == 0:
                return
            errors += done.stderr + done.stdout
            if not any(reason in errors for reason in NOT_OFFERED):
                _print_errors(errors)
                raise SetupError(
                    f"pip could not install {package[-1]}, see above; correct the cause and run launch/setup.sh again"
                )
        _print_errors(errors)
        say("no index offers the CPU build, see above: installing the default one (up to 3 GB, 2 to 5 minutes)")
        self._pip("--no-deps", f"torch=={version}")

    def _pip_command(self, *arguments: str) -> list[str]:
        return [str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]

    def _pip(self, *arguments: str) -> None:
        """Run pip. Its own output tells what is wrong, so nothing is added to it."""
        subprocess.run(self._pip_command(*arguments), check=True, cwd=self.root, env=_variables())

    def _output(self, *arguments: str) -> str:
        return _run_captured([str(self.python), *arguments], self.root).stdout.strip()

    def _succeeds(self, *arguments: str) -> bool:
        if not self.python.exists():
            return False
        return _run_captured([str(self.python), *arguments], self.root).returncode == 0


def _package_of(line: str) -> str:
    """Return the normalized name of the package with which a requirement or constraint begins."""
    found = re.match(r"[\w.-]+", line)
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else ""


def _variables() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in UNWANTED}
    return {**kept, "PIP_USER": "0"}  # also against a configuration file of pip


def _run_captured(command: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=_variables())


def _print_errors(errors: str) -> None:
    with contextlib.suppress(OSError):
        print(errors.strip(), file=sys.stderr, flush=True)


def torch_build(asked: str) -> str:
    """Return "cpu" or "gpu" for the value of TORCH_BUILD. auto: gpu where nvidia-smi works. Errors: SetupError."""
    if asked in ("cpu", "gpu"):
        return asked
    if asked != "auto":
        raise SetupError(f"TORCH_BUILD is '{asked}'; expected cpu, gpu or auto.")
    try:
        return (
            "gpu" if subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0 else "cpu"
        )
    except OSError:
        return "cpu"


def checked_torch_version(version: str, root: Path) -> str:
    """Return the version if pyproject.toml allows it. Errors: SetupError."""
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise SetupError(f"--torch is '{version}'; expected a version of three numbers, such as 2.13.0.")
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    allowed = re.search(r'"torch>=([\d.]+),<([\d.]+)"', text)
    if allowed and not _numbers(allowed[1]) <= _numbers(version) < _numbers(allowed[2]):
        raise SetupError(
            f"--torch is {version}, but pyproject.toml allows torch>={allowed[1]},<{allowed[2]}; give a version in "
            "this range, or change the range there."
        )
    return version


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def main(args: Sequence[str], root: Path = ROOT, base_python: str = sys.executable) -> int:
    """Make the environment that `args` describe; return 0, or 1 if it cannot be made."""
    try:
        build = torch_build(os.environ.get("TORCH_BUILD") or "auto")
        other_torch = ""
        if args and args[0] == "--torch":
            other_torch = checked_torch_version(args[1] if len(args) > 1 else "", root)
            args = args[2:]
        Environment(root, base_python, other_torch).make(args[0] if args else DEFAULT_EXTRAS, build)
    except SetupError as error:
        say(str(error))
        return 1
    except subprocess.CalledProcessError as error:
        say(f"failed: {' '.join(map(str, error.cmd[1:]))}; correct the cause above and run launch/setup.sh again")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
