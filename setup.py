"""Put the example configurations and batch scripts of a checkout into the wheel; see pyproject.toml for the rest."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithFolders(build_py):
    """Build the package, with the folders that are at the top level of a checkout inside it."""

    def run(self) -> None:
        """Copy the folders into the package; an editable installation finds them in the checkout."""
        super().run()
        if self.editable_mode:
            return
        for folder in ("configs", "slurm"):
            target = Path(self.build_lib) / "tinytrain_dist" / folder
            shutil.copytree(ROOT / folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("env.sh"))


setup(cmdclass={"build_py": BuildWithFolders})
