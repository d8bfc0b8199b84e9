"""The elastic agent: how a run ends or continues when ranks or nodes die or are stopped."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from tests.helpers.launching import free_port
from tests.helpers.ranks import AGENT, REPOSITORY, TrainingProcess, training_process
from tests.helpers.training import Run, config_file, train
from tinytrain_dist.distributed.torch_internals import tcp_store
from tinytrain_dist.launch import agent_signals, death_texts
from tinytrain_dist.launch.agent_state import AgentState
from tinytrain_dist.metrics.phase_timer import START_PHASES
from tinytrain_dist.reliability.start_marks import claim

pytestmark = pytest.mark.multiprocess
TRAIN = REPOSITORY / "launch" / "train.py"
ENDLESS = {"total_steps": 100_000, "ckpt_every": 100_000, "eval_every": 100_000, "log_every": 5}


def wait_until(holds: Callable[[], object], running: TrainingProcess | None = None, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, running.output() if running else "waited too long"
        time.sleep(0.02)


def state_of(folder: Path) -> dict[str, object]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / "run" / "state.json").read_text())
    return {}


def phase_of(folder: Path, rank: int = 0) -> str:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / "run" / "logs" / "heartbeat" / f"rank-{rank:05d}.json").read_text())["phase"]
    return ""


def nodes(
    folder: Path, config: str, stack: contextlib.ExitStack, nnodes: str, *arguments: str, script: Path = TRAIN
) -> list[TrainingProcess]:
    """Start two agents on this machine, as if on two nodes; the first one serves the rendezvous."""
    port = free_port()
    rendezvous = [f"--nnodes={nnodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"]
    conf = "--rdzv-conf=is_host={},last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=2"
    return [
        stack.enter_context(
            training_process(
                [config],
                1,
                folder,
                launcher=AGENT,
                script=script,
                rendezvous=[*rendezvous, conf.format(int(node == 0)), "--local-addr=127.0.0.1", *arguments],
            )
        )
        for node in range(2)
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_the_agent_saves_and_ends_well(tmp_path: Path, number: signal.Signals) -> None:
    config = config_file(tmp_path, total_steps=100_000, ckpt_every=100_000, log_every=5)
    with training_process([config], 2, tmp_path, launcher=AGENT) as running:
        running.wait_for_output("step 5/")
        os.kill(running.process.pid, number)
        assert running.wait(60) == 0, running.output()
        assert "Traceback" not in running.output()
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["state"] == "preempted"
    assert Run(tmp_path / "run").checkpoint.name == f"checkpoint-{state['step']:08d}"


def test_a_killed_rank_ends_the_others_and_is_named_in_the_last_line(tmp_path: Path) -> None:
    config = config_file(tmp_path, total_steps=100_000, ckpt_every=100_000, log_every=5)
    with training_process([config], 2, tmp_path, launcher=AGENT) as running:
        running.wait_for_output("step 5/")
        os.kill(running.worker_pids()[1], signal.SIGKILL)
        assert running.wait(60) == 128 + signal.SIGKILL
        last = running.output().rstrip().splitlines()[-1]
    assert last.startswith("error: rank ")
    assert "was killed by SIGKILL, after step " in last


def test_restart_in_place_resumes_from_the_newest_checkpoint(tmp_path: Path) -> None:
    config = config_file(tmp_path, total_steps=60, ckpt_every=5, eval_every=1000, log_every=5)
    with training_process([config], 2, tmp_path, launcher=AGENT, torchrun_args=["--max-restarts=2"]) as running:
        running.wait_for_output("checkpoint-00000005")
        os.kill(running.worker_pids()[0], signal.SIGKILL)
        assert running.wait(120) == 0, running.output()
    assert Run(tmp_path / "run").values("resumed", "text")
    assert json.loads((tmp_path / "run" / "state.json").read_text()) == {"state": "done", "step": 60}


def test_a_killed_rank_ends_both_nodes_with_the_same_last_line(tmp_path: Path) -> None:
    config = config_file(tmp_path, **ENDLESS)
    with contextlib.ExitStack() as stack:
        agents = nodes(tmp_path, config, stack, "2")
        wait_until(lambda: any("step 5/" in agent.output() for agent in agents), agents[0])
        os.kill(agents[1].worker_pids()[0], signal.SIGKILL)
        codes = [agent.wait(60) for agent in agents]
        words = [agent.output().rstrip().splitlines()[-1] for agent in agents]
    cause = json.loads((tmp_path / "run" / "error.json").read_text())
    assert words == [f"error: {cause['message']}"] * 2
    assert "was killed by SIGKILL, after step " in cause["message"]
    assert "memory" in cause["message"]
    assert not cause["secondary"]
    assert cause["step"] > 0
    assert codes[1] == 128 + signal.SIGKILL
    assert codes[0] != 0
    assert state_of(tmp_path)["state"] == "failed"


def test_a_run_continues_on_one_node_after_the_other_is_lost(tmp_path: Path) -> None:
    settings = {**ENDLESS, "total_steps": 400, "ckpt_every": 10, "keep_last": 1}
    config = config_file(tmp_path, **settings)
    with contextlib.ExitStack() as stack:
        agents = nodes(tmp_path, config, stack, "1:2", "--max-restarts=2")
        wait_until(lambda: any("checkpoint-00000010" in agent.output() for agent in agents), agents[0])
        both = [pid for agent in agents for pid in agent.worker_pids()]
        os.killpg(agents[1].process.pid, signal.SIGKILL)
        agents[1].process.wait()
        assert agents[0].wait(180) == 0, agents[0].output()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in both))  # no process is left over
    assert len(both) == 2
    run = Run(tmp_path / "run")
    assert state_of(tmp_path)["state"] == "done"
    assert run.values("restarted", "text")
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"]) == 1


def test_a_restart_in_place_reports_why_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    settings = {"total_steps": 40, "ckpt_every": 10, "eval_every": 1000, "log_every": 5}
    config = config_file(tmp_path, **settings)
    with training_process([config], 2, tmp_path, launcher=AGENT, torchrun_args=["--max-restarts=2"]) as running:
        running.wait_for_output("checkpoint-00000010")
        os.kill(running.worker_pids()[1], signal.SIGKILL)
        assert running.wait(120) == 0, running.output()
    run = Run(tmp_path / "run")
    (why,) = run.values("restarted", "text")
    assert "was killed by SIGKILL" in str(why)
    assert run.digests() == train(tmp_path, "whole", 2, parallel="ddp", **settings).digests()
    assert not (tmp_path / "run" / "error.json").exists()
    assert not (tmp_path / "run" / "logs" / "heartbeat").exists(), "it tells of live processes"


def test_the_ranks_of_an_agent_that_dies_end_too(tmp_path: Path) -> None:
    with training_process([config_file(tmp_path, **ENDLESS)], 2, tmp_path, launcher=AGENT) as running:
        running.wait_for_output("step 5/")
        pids = running.worker_pids()
        assert len(pids) == 2
        os.kill(running.process.pid, signal.SIGKILL)
        wait_until(lambda: not any(_runs(pid) for pid in pids), seconds=30)


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_stop_during_a_long_evaluation_abandons_it_and_saves(tmp_path: Path) -> None:
    settings = {**ENDLESS, "eval_every": 3, "eval_steps": 100_000}
    with training_process([config_file(tmp_path, **settings)], 2, tmp_path, launcher=AGENT) as running:
        wait_until(lambda: phase_of(tmp_path) == "evaluation", running)
        os.kill(running.process.pid, signal.SIGTERM)
        assert running.wait(60) == 0, running.output()
    run = Run(tmp_path / "run")
    assert state_of(tmp_path) == {"state": "preempted", "step": 3} | state_of(tmp_path)
    assert run.checkpoint.name == "checkpoint-00000003"
    assert run.values("eval", "loss") == []
    assert "preempted (SIGTERM) at step 3" in str(run.values("stopped", "text")[0])


@pytest.mark.parametrize("moment", ["agent imports", "ranks start"])
def test_a_signal_during_the_start_ends_well_before_the_first_step(tmp_path: Path, moment: str) -> None:
    config = config_file(tmp_path, **ENDLESS)
    with training_process([config], 2, tmp_path, {"TINYTRAIN_ATTEMPT": "9"}, launcher=AGENT) as running:
        if moment == "agent imports":  # wait until the agent has its handlers; before that, signals act on the shell
            wait_until(lambda: _catches(running.process.pid, signal.SIGUSR1), running)
            os.kill(running.process.pid, signal.SIGUSR1)
        else:
            wait_until(lambda: len(running.worker_pids()) == 2, running)
            os.kill(running.process.pid, signal.SIGTERM)
        assert running.wait(60) == 0, running.output()
        assert "step 5/" not in running.output()
    state = state_of(tmp_path)
    assert (state["state"], state["attempt"]) == ("preempted", "9")
    assert not list((tmp_path / "run").glob("checkpoints/checkpoint-*"))


def test_a_stop_request_ends_a_rank_that_hangs_in_its_start(tmp_path: Path) -> None:
    config = config_file(tmp_path, **ENDLESS)
    options = {"env": {"TINYTRAIN_ATTEMPT": "9"}, "torchrun_args": ["--max-restarts=2"]}
    with training_process([config], 2, tmp_path, launcher=AGENT, **options) as running:
        wait_until(lambda: phase_of(tmp_path, 1), running)
        rank_1 = json.loads((tmp_path / "run/logs/heartbeat/rank-00001.json").read_text())
        assert rank_1["phase"] in START_PHASES
        os.kill(rank_1["pid"], signal.SIGSTOP)  # none of its threads runs, as if it were blocked in native code
        os.kill(running.process.pid, signal.SIGTERM)
        assert running.wait(60) == 0, running.output()
        assert "stopped during the start" in running.output()
        assert "error:" not in running.output()
    state = state_of(tmp_path)
    assert (state["state"], state["attempt"]) == ("preempted", "9")
    assert not list((tmp_path / "run").glob("checkpoints/checkpoint-*"))


def test_after_the_start_the_agent_ends_no_rank(tmp_path: Path) -> None:
    with training_process([config_file(tmp_path, **ENDLESS)], 2, tmp_path, launcher=AGENT) as running:
        running.wait_for_output("step 5/")
        pids = running.worker_pids()
        environment = Path(f"/proc/{pids[0]}/environ").read_bytes().decode().split("\0")
        (note,) = [Path(line.partition("=")[2]) for line in environment if line.startswith("TINYTRAIN_AGENT=")]
        assert [claim(note, pid) for pid in pids] == [False, False], "the agent could kill them"
        assert not list(note.parent.glob("starting-*"))


def _catches(pid: int, number: int) -> bool:
    with contextlib.suppress(OSError):
        caught = Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0]
        return bool(int(caught, 16) >> (number - 1) & 1)
    return False


DYING = f"""
import os, signal, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from tinytrain_dist.reliability import stop_requests
stop_requests.install_signal_handlers()
from tinytrain_dist.launch import rank_program
from tinytrain_dist.training import train_step
build = train_step.build_model
def build_or_die(*arguments, **rest):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return build(*arguments, **rest)
train_step.build_model = build_or_die
sys.exit(rank_program.main(sys.argv[1:]))
"""


def test_a_rank_that_dies_in_the_start_is_a_failure_and_no_preemption(tmp_path: Path) -> None:
    """Other ranks get SIGTERM then. If they reported a preemption, the batch script would requeue the job."""
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    attempt = {"TINYTRAIN_ATTEMPT": "9"}
    with training_process([config_file(tmp_path)], 2, tmp_path, attempt, launcher=AGENT, script=script) as running:
        assert running.wait(60) == 128 + signal.SIGKILL, running.output()
        assert "was killed by SIGKILL" in running.output().rstrip().splitlines()[-1]
    assert state_of(tmp_path).get("state") != "preempted"


LATE = f"""
import os, sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
from tinytrain_dist.reliability import stop_requests
stop_requests.install_signal_handlers()
from tinytrain_dist.distributed import context
from tinytrain_dist.launch import rank_program
join = context.rendezvous
def join_late():
    if os.environ["RANK"] == "1":
        time.sleep(1000)
    return join()
context.rendezvous = join_late
sys.exit(rank_program.main(sys.argv[1:]))
"""


def test_a_stop_on_one_node_before_all_ranks_have_joined_ends_the_other_node_too(tmp_path: Path) -> None:
    script = tmp_path / "late.py"
    script.write_text(LATE)
    config = config_file(tmp_path, **ENDLESS)
    with contextlib.ExitStack() as stack:
        agents = nodes(tmp_path, config, stack, "2", script=script)
        wait_until(lambda: phase_of(tmp_path, 0) == phase_of(tmp_path, 1) == "join", agents[0])
        late = json.loads((tmp_path / "run/logs/heartbeat/rank-00001.json").read_text())["pid"]
        os.kill(late, signal.SIGTERM)
        assert [agent.wait(60) for agent in agents] == [0, 0], agents[0].output()
        assert "error:" not in agents[0].output() + agents[1].output()


STORE_USER = """
import os, socket, sys
from datetime import timedelta
from torch.distributed import TCPStore
port = int(os.environ["MASTER_PORT"])
with socket.socket() as thief:
    thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        thief.bind(("", port))
        sys.exit(f"another process could take port {port} before rank 0 uses it")
    except OSError:
        pass
store = TCPStore(os.environ["MASTER_ADDR"], port, 1, False, timedelta(seconds=60), wait_for_workers=False)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    store.set("address of a dead rank", "")
    sys.exit(1)
print("found of the last round:", store.check(["address of a dead rank"]))
"""


def test_the_agent_holds_the_port_of_the_ranks_and_serves_a_new_store_after_a_restart(tmp_path: Path) -> None:
    script = tmp_path / "store_user.py"
    script.write_text(STORE_USER)
    options = {"launcher": AGENT, "torchrun_args": ["--max-restarts=1"]}
    with training_process([], 1, tmp_path, script=script, **options) as running:
        assert running.wait(60) == 0, running.output()
        assert "found of the last round: False" in running.output()


def test_a_second_interrupt_ends_at_once_unless_it_is_the_same_key_press(monkeypatch: pytest.MonkeyPatch) -> None:
    state = AgentState()
    now = 100.0
    monkeypatch.setattr(agent_signals, "agent", state)
    monkeypatch.setattr(agent_signals.time, "monotonic", lambda: now)
    assert agent_signals._count_interrupt() == signal.SIGINT
    now += agent_signals.SECOND_INTERRUPT_SECONDS / 2
    assert agent_signals._count_interrupt() == signal.SIGINT
    assert not state.killed_by
    now += agent_signals.SECOND_INTERRUPT_SECONDS
    assert agent_signals._count_interrupt() == signal.SIGKILL
    assert state.killed_by == "a second Ctrl-C"


def test_a_death_is_described_with_a_remedy_for_lack_of_memory() -> None:
    describe = death_texts.describe_death
    assert describe("rank 1", 3, 7, 0) == "rank 1 ended with exit code 3, without an error message, after step 7"
    assert describe("rank 1", -11, None, 0) == "rank 1 was killed by SIGSEGV"
    killed = describe("rank 1", -9, None, death_texts.out_of_memory_kills() - 2)
    assert "smaller micro_batch_size needs less" in killed
    assert "it has killed " in killed


def test_nodes_that_do_not_join_are_reported_in_a_sentence(tmp_path: Path) -> None:
    config = config_file(tmp_path)
    port = free_port()
    options = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"]
    options += ["--rdzv-conf=is_host=1,join_timeout=2", "--local-addr=127.0.0.1"]
    with training_process([config], 1, tmp_path, launcher=AGENT, script=TRAIN, rendezvous=options) as running:
        assert running.wait(120) == 1
        *_, last = running.output().splitlines()
        assert last.startswith(f"error: only some of the 2 nodes joined at 127.0.0.1:{port} in time; start the others")
        assert "Traceback" not in running.output()


def test_a_node_that_waits_for_the_head_in_native_code_ends_on_a_signal(tmp_path: Path) -> None:
    config = config_file(tmp_path)
    options = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=test"]
    options += ["--rdzv-conf=is_host=0,join_timeout=600", "--local-addr=127.0.0.1"]
    with training_process([config], 1, tmp_path, launcher=AGENT, script=TRAIN, rendezvous=options) as running:
        running.wait_for_output("waiting for the other nodes to join")
        os.kill(running.process.pid, signal.SIGTERM)
        assert running.wait(60) == 0, running.output()


def participants(port: int) -> int:
    """Return how many nodes have joined the rendezvous that is served on a port of this machine."""
    store = tcp_store("127.0.0.1", port, None, False, timedelta(seconds=60))
    if not store.check(["torch.rendezvous.test"]):
        return 0
    return len(pickle.loads(base64.b64decode(store.get("torch.rendezvous.test"))).participants)


def test_a_stop_of_a_node_that_waits_for_others_ends_the_other_nodes_too(tmp_path: Path) -> None:
    config = config_file(tmp_path)
    with contextlib.ExitStack() as stack:
        head, other = nodes(tmp_path, config, stack, "3")  # the third one never comes
        found = re.search(r"to join at 127\.0\.0\.1:(\d+)", head.wait_for_output("waiting for the other nodes to join"))
        assert found is not None
        wait_until(lambda: participants(int(found[1])) == 2, head)
        os.kill(other.process.pid, signal.SIGTERM)
        assert other.wait(60) == 0, other.output()
        assert "error:" not in other.output()
        assert head.wait(60) == 1, head.output()
        assert head.output().splitlines()[-1].startswith("error: another node has ended the rendezvous at 127.0.0.1:")
        assert "Traceback" not in head.output() + other.output()
