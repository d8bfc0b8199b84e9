"""Check that output which cannot be written is dropped and reported once, and that closed streams are replaced."""

from __future__ import annotations

import io
import subprocess
import sys

from tinytrain_dist.utils.lost_output import TolerantStream


class FullDisk(io.StringIO):
    """A stream on a disk that is full, and may have room again later."""

    full = True

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_lost_output_is_reported_once() -> None:
    disk, told = FullDisk(), list[str]()
    stream = TolerantStream(disk, "stdout")
    stream.call_on_loss(told.append)
    assert stream.write("lost") == 4
    stream.writelines(["lost", "again"])
    disk.full = False
    stream.write("kept")
    stream.flush()
    assert disk.getvalue() == "kept"
    assert told == ["stdout cannot be written (No space left on device); what cannot be written there is dropped"]
    late = list[str]()
    stream.call_on_loss(late.append)
    assert late == told


def test_a_closed_stream_loses_output_too() -> None:
    closed = io.StringIO()
    closed.close()
    stream = TolerantStream(closed, "stderr")
    stream.write("x")
    stream.flush()
    assert "stderr cannot be written" in stream.loss


def run_program(body: str, redirections: str) -> subprocess.CompletedProcess[str]:
    program = f"from tinytrain_dist.utils.lost_output import keep_output_from_failing as keep; {body}"
    shell = f'exec "$0" -c "$1" {redirections}'
    return subprocess.run(["sh", "-c", shell, sys.executable, program], capture_output=True, text=True, check=False)


def test_programs_print_to_a_full_disk_and_end_well() -> None:
    done = run_program("keep(); import sys; print('x' * 10**5); print('y', file=sys.stderr)", ">/dev/full 2>/dev/full")
    assert done.returncode == 0
    assert run_program("print('x' * 10**5)", ">/dev/full").returncode != 0, "without it the program fails"


def test_a_character_that_the_terminal_lacks_is_replaced() -> None:
    done = run_program(
        "import sys; sys.stdout.reconfigure(encoding='ascii', errors='strict'); keep(); print('a\\u00fc')", ""
    )
    assert (done.returncode, done.stdout) == (0, "a?\n")


def test_files_do_not_take_the_place_of_closed_streams() -> None:
    body = "keep(); import os, sys; number = os.open('/dev/null', os.O_RDONLY); print('x'); sys.exit(number)"
    assert run_program(body, "<&- >&- 2>&-").returncode == 3
    assert run_program(body, ">&-").returncode == 3
