"""Check that the helper for multi-process tests reports results, failures, killed ranks and hangs correctly.

This file is also the example of a multi-process test: a module-level function that runs on the ranks, and a test that
passes it to `run_ranks`.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers import ranks
from tests.helpers.ranks import descendants, launch_training, living_processes, run_ranks, training_process

pytestmark = pytest.mark.multiprocess


def sum_over_ranks(factor: float) -> tuple[int, torch.Tensor]:
    dist.init_process_group("gloo")
    value = torch.full((2,), factor * (dist.get_rank() + 1))
    dist.all_reduce(value)
    return os.getpid(), value


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_reduce_over_real_processes(world_size: int) -> None:
    results = run_ranks(world_size, sum_over_ranks, 10.0)
    pids = {pid for pid, _ in results}
    assert len(pids) == world_size
    assert os.getpid() not in pids
    expected = 10.0 * world_size * (world_size + 1) / 2
    for _, value in results:
        assert value.tolist() == [expected, expected]


def rank_environment() -> dict[str, str]:
    return {**os.environ, "cwd": os.getcwd(), "threads": str(torch.get_num_threads())}


def test_each_rank_gets_the_environment_torchrun_would_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SET_BY_THE_TEST", "yes")
    for rank, seen in enumerate(run_ranks(2, rank_environment, env={"LOCAL_WORLD_SIZE": "1"})):
        assert (seen["RANK"], seen["LOCAL_RANK"], seen["WORLD_SIZE"]) == (str(rank), str(rank), "2")
        assert seen["LOCAL_WORLD_SIZE"] == "1"
        assert seen["SET_BY_THE_TEST"] == "yes"
        assert seen["cwd"] == str(tmp_path.resolve())
        assert seen["threads"] == "1"


def leave_traces() -> tuple[str | None, str]:
    before = os.environ.get("LEFT_BEHIND"), str(torch.get_default_dtype())
    os.environ["LEFT_BEHIND"] = "yes"
    torch.set_default_dtype(torch.float64)
    return before


def test_a_call_leaves_nothing_behind_for_the_next() -> None:
    assert run_ranks(1, leave_traces) == run_ranks(1, leave_traces) == [(None, "torch.float32")]


def fail_on_rank_one() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        print("the last words of rank 1")
        raise ValueError("rank one cannot go on")
    dist.all_reduce(torch.zeros(1))  # hangs, because rank 1 never joins


def test_failing_rank_is_reported_while_the_others_hang() -> None:
    with pytest.raises(AssertionError) as failure:
        run_ranks(3, fail_on_rank_one, timeout_seconds=1000)  # far above what the test may take
    message = str(failure.value)
    assert message.startswith("rank 1 of 3 failed in fail_on_rank_one:")
    assert "ValueError: rank one cannot go on" in message
    assert "in fail_on_rank_one" in message.split("Traceback")[1]
    assert "the last words of rank 1" in message
    assert "rank 0 was killed while it ran" in message


def test_stacks_are_complete_with_the_outermost_frame_of_the_main_thread(tmp_path: Path) -> None:
    log = tmp_path / "rank0.log"
    late = ranks._Rank(0, None, None, log)  # type: ignore[arg-type]  # only its log is read
    dump = (
        "Timeout (0:00:00.500000)!\nThread 0x00007ff469dd56c0 (most recent call first):\n"
        '  File "threading.py", line 1002 in _bootstrap\n\nThread 0x00007ff48cfbab80 (most recent call first):\n'
        '  File "test_ranks.py", line 97 in <module>\n  File "ranks.py", line 212 in _rank_main\n'
        '  File "forkserver.py", line 313 in main\n  File "<string>", line 1 in <module>\n'
    )
    for length in range(len(dump)):
        log.write_text(dump[:length])
        assert not ranks._has_all_stacks(late), dump[:length]
    log.write_text(dump)
    assert ranks._has_all_stacks(late)


def kill_rank_one() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(1))


def test_killed_rank_is_reported_as_the_cause() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 of 2 failed in kill_rank_one: died: .* was killed by SIGKILL"):
        run_ranks(2, kill_rank_one, timeout_seconds=1000)


def hang_on_rank_zero(folder: str) -> None:
    Path(folder, os.environ["RANK"]).write_text(str(os.getpid()))
    if os.environ["RANK"] == "0":
        threading.Event().wait()


def is_running(pid: int) -> bool:
    return pid in {pid for pid, _ in living_processes()}


def test_a_hang_ends_with_all_stacks_and_leaves_no_process(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as failure:
        run_ranks(2, hang_on_rank_zero, str(tmp_path), timeout_seconds=0.5)
    message = str(failure.value)
    assert "rank 0 of 2 failed in hang_on_rank_zero: was not done after 0.5 s" in message
    assert "in hang_on_rank_zero" in message.split("Timeout (")[1]
    assert "rank 1 had returned" in message
    assert not any(is_running(int(path.read_text())) for path in tmp_path.iterdir())


def start_a_child_and_hang(folder: str) -> None:
    child = os.fork()
    if child == 0:
        threading.Event().wait()
    Path(folder, "pids.part").write_text(f"{os.getpid()} {child}")
    os.rename(Path(folder, "pids.part"), Path(folder, "pids"))
    threading.Event().wait()


def interrupt_when(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_leaves_neither_ranks_nor_their_children(tmp_path: Path) -> None:
    thread = threading.Thread(target=interrupt_when, args=(tmp_path / "pids",))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell put us in the background
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            run_ranks(1, start_a_child_and_hang, str(tmp_path))
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    rank, child = map(int, (tmp_path / "pids").read_text().split())
    assert not is_running(rank)
    wait_until_gone([child])


def return_something_that_cannot_travel() -> threading.Lock:
    return threading.Lock()


def test_a_result_that_cannot_be_pickled_is_reported() -> None:
    with pytest.raises(AssertionError, match="cannot pickle"):
        run_ranks(1, return_something_that_cannot_travel)


def test_a_function_that_cannot_travel_is_refused() -> None:
    with pytest.raises(TypeError, match="move it to the top level"):
        run_ranks(1, lambda: None)


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while alive := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.01)


SCRIPT = """
import os, sys, time
print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} got {sys.argv[1:]}", flush=True)
if "hang" in sys.argv:
    time.sleep(1000)
sys.exit(3 if "fail" in sys.argv else 0)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def test_launch_training_returns_exit_code_and_output(tmp_path: Path, script: Path) -> None:
    finished = launch_training(["run.toml", "--seed", "1"], 2, tmp_path, script=script)
    assert finished.returncode == 0, finished.stdout
    for rank in range(2):
        assert f"rank {rank} of 2 got ['run.toml', '--seed', '1']" in finished.stdout
    assert launch_training(["fail"], 1, tmp_path, script=script).returncode != 0


def test_a_training_process_ends_with_its_workers(tmp_path: Path, script: Path) -> None:
    with training_process(["hang"], 2, tmp_path, script=script) as running:
        running.wait_for_output("rank 0 of 2 got")
        running.wait_for_output("rank 1 of 2 got")
        workers = running.worker_pids()
        assert len(workers) == 2
        assert set(workers) <= set(descendants(running.process.pid))
        with pytest.raises(AssertionError, match=r"was not done after 0\.1 s"):
            running.wait(0.1)
    wait_until_gone(workers)


def start_of_this_rank() -> tuple[bool, str, float]:
    preloaded = ranks.PRELOADED in sys.modules
    from tinytrain_dist.reliability import start_times

    return preloaded, start_times.__file__, start_times.rank_start()


def test_a_rank_has_the_imports_of_the_server_but_not_its_start() -> None:
    run_ranks(1, rank_environment)  # the server runs
    before = time.monotonic()
    ((preloaded, file, start),) = run_ranks(1, start_of_this_rank)
    assert preloaded == (ranks.START_METHOD == "forkserver")
    assert Path(file).is_relative_to(ranks.REPOSITORY), "not another checkout"
    assert before - 0.01 <= start < time.monotonic(), "its start is known to 10 ms"
