"""Call the private and version-dependent parts of torchrun: the agent that starts ranks, and its rendezvous.

As in `torch_internals`, each docstring names the torch versions that have these parts. torchrun is imported where it is
needed, because that takes seconds. Must not know what ranks do, or why nodes come and go.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from subprocess import Popen
from typing import Any, NoReturn, Protocol

from tinytrain_dist.distributed.network import LISTENER_VARIABLE, StoreLostError
from tinytrain_dist.distributed.torch_internals import tcp_store

HEAD_KEYS = ["MASTER_ADDR", "MASTER_PORT"]  # under which the first node of a round announces itself to the others
HEAD_POLL_SECONDS = 0.1
PROBE_SECONDS = 2.0  # for a store to answer a new connection
SILENT_STORE_SECONDS = 30  # after which an agent gives its connection to the store up
SILENT_NODE_SECONDS = 10.0  # after which a node of an earlier run, whose rendezvous is closed, has surely ended


@dataclass(frozen=True, order=True)
class Node:
    """One agent in the rendezvous: the address that it has announced, and its process ID."""

    address: str
    pid: int


@dataclass(frozen=True)
class RendezvousState:
    """What all agents know about the rendezvous.

    * `round`: number of the world; it grows with every new world.
    * `complete`: whether this round has all of its nodes, so that their ranks run.
    * `closed`: whether the run has ended.
    * `nodes`: the nodes of the round, in the order of their ranks. A node that is silent is left out.
    * `waiting`: nodes that wait for the next round.
    """

    round: int
    complete: bool
    closed: bool
    nodes: tuple[Node, ...]
    waiting: tuple[Node, ...]


@contextlib.contextmanager
def _store_in_use() -> Iterator[None]:
    """Let torch's errors about the store be StoreLostError."""
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError

    try:
        yield
    except (RendezvousConnectionError, DistNetworkError) as error:
        raise StoreLostError from error


class RendezvousHooks(Protocol):
    """What an agent adds to torchrun's rendezvous. The methods are called in the thread of the agent."""

    def before_round(self, rendezvous: ElasticRendezvous) -> None:
        """Act before this node leaves its round and joins the next one."""

    def after_round(self, rendezvous: ElasticRendezvous) -> None:
        """Act after a round is complete, before its ranks are started."""

    def all_have_joined(self, rendezvous: ElasticRendezvous) -> bool:
        """Return whether the round that forms need not wait for further nodes."""
        raise NotImplementedError

    def store_is_lost(self, rendezvous: ElasticRendezvous) -> NoReturn:
        """End the run by an error, because the store cannot be reached."""
        raise NotImplementedError

    def must_regroup(self, rendezvous: ElasticRendezvous) -> bool:
        """Return whether to end the ranks and join a new round. Called about once a second while ranks run."""


class HeadLostError(Exception):
    """The first node of a round was lost before it has told the others its address, so the round cannot begin."""


class ElasticRendezvous:
    """torchrun's rendezvous, as `RendezvousHooks` see it. Versions: DynamicRendezvousHandler in 2.11 to 2.15.

    The methods that use the store raise StoreLostError if it cannot be reached.
    """

    def __init__(self, handler: Any) -> None:
        """Wrap torchrun's handler."""
        self._handler = handler
        self.failed_rounds = 0  # that were complete since the last one that began, and could not begin

    @property
    def own(self) -> Node:
        """This node."""
        return _node(self._handler._this_node)

    @property
    def state(self) -> RendezvousState:
        """The state as of the last exchange with the store."""
        state = self._handler._state_holder.state
        ranked = sorted(state.participants)
        return RendezvousState(
            state.round,
            state.complete,
            state.closed,
            tuple(map(_node, ranked)),
            tuple(map(_node, sorted(state.wait_list))),
        )

    @property
    def fewest_nodes(self) -> int:
        """The smallest number of nodes of a round."""
        return int(self._handler._settings.min_nodes)

    def refresh(self) -> None:
        """Read the state from the store."""
        with self._handler._heartbeat_lock, _store_in_use():
            self._handler._state_holder.sync()

    def shorten_last_call(self, seconds: float) -> None:
        """Wait only this long for more nodes once the fewest have joined."""
        self._handler._settings.timeout._last_call = timedelta(seconds=seconds)

    def begin_when(self, all_have_joined: Callable[[], bool]) -> None:
        """Begin a round without the last call once this node is in it, it has the fewest nodes, and all have joined.

        Versions: _BackendRendezvousStateHolder with these attributes in 2.11 to 2.15.
        """
        handler, holder = self._handler, self._handler._state_holder
        plain_sync = type(holder).sync

        def sync() -> Any:
            has_written = plain_sync(holder)
            state = holder.state
            forms = not state.complete and not state.closed and handler._this_node in state.participants
            # torchrun sets the deadline when the fewest nodes have joined; the first node that finds it past begins
            if forms and state.deadline is not None and all_have_joined():
                state.deadline = datetime.now(UTC) - timedelta(seconds=1)
            return has_written

        holder.sync = sync

    def reopen(self, forget: str) -> bool:
        """Begin a new run in a rendezvous that an ended run has closed; return whether it is open.

        forget: key of a value of the ended run, which is deleted.

        False: a node of the ended run has still shown a sign of life a few seconds ago.
        """
        holder = self._handler._state_holder
        self.refresh()
        state = holder.state
        if not state.closed:
            return True
        newest = max(state.last_heartbeats.values(), default=datetime.min.replace(tzinfo=UTC))
        if datetime.now(UTC) - newest < timedelta(seconds=SILENT_NODE_SECONDS) and state.participants:
            return False
        state.closed = state.complete = False
        state.participants.clear()
        state.wait_list.clear()
        state.redundancy_list.clear()
        state.last_heartbeats.clear()
        state.deadline = None
        state.round += 1  # keys of the ended run must not be found again
        self._handler._store.delete_key(self._key(forget))
        holder.mark_dirty()
        self.refresh()  # fails if another node was faster; its state is as good
        return not holder.state.closed

    def await_head(self, store: Any) -> None:
        """Wait until the first node of this round has announced its address. store: torchrun's of this round.

        By itself, torchrun waits for a minute, and then ends all agents. Errors: HeadLostError.
        """
        handler = self._handler
        while handler._state_holder.state.participants.get(handler._this_node) != 0 and not store.check(HEAD_KEYS):
            self.refresh()
            ranks = handler._state_holder.state.participants
            if handler._this_node not in ranks or 0 not in ranks.values():
                self.failed_rounds += 1
                raise HeadLostError
            time.sleep(HEAD_POLL_SECONDS)

    def leave_open(self) -> None:
        """Do not close the rendezvous when this agent ends: the other nodes train on."""
        self._handler.shutdown = lambda: True

    def exit_round(self) -> None:
        """Leave the present round, so that the others need not wait until this node counts as silent."""
        from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _RendezvousExitOp

        handler = self._handler
        handler._stop_heartbeats()
        with _store_in_use():
            handler._op_executor.run(_RendezvousExitOp(), handler._get_deadline(handler._settings.timeout.join))

    def write(self, key: str, value: str) -> None:
        """Write a value that all nodes can read."""
        with _store_in_use():
            self._handler._store.set(self._key(key), value)

    def read(self, key: str) -> str:
        """Return a value that a node has written; "" if there is none."""
        name = self._key(key)
        store = self._handler._store
        with _store_in_use():
            return str(store.get(name).decode()) if store.check([name]) else ""

    def write_once(self, key: str, value: str) -> str:
        """Write a value unless there is one; return the one that counts."""
        with _store_in_use():
            return str(self._handler._store.compare_set(self._key(key), "", value).decode())

    def limit_silence(self, endpoint: str) -> None:
        """Let an exchange with the store at HOST:PORT fail after a while without any answer, such as on a cut network.

        By itself it fails after a quarter of an hour. If the network returns before, it takes as long again as it was
        cut, two minutes at most, until TCP tries again. torch has no setting for this, so its sockets are found by
        their other end. Versions: TCPStore with a socket of this process in 2.11 to 2.15; only on Linux.
        """
        port = int(endpoint.rpartition(":")[2])
        with contextlib.suppress(OSError):
            for name in os.listdir("/proc/self/fd"):
                with contextlib.suppress(OSError):
                    if stat.S_ISSOCK(os.stat(int(name)).st_mode):
                        _limit_silence_of(int(name), port)

    def is_served_at(self, endpoint: str, key: str, value: str) -> bool | None:
        """Return whether a store at HOST:PORT has this value, through a new connection; None if nothing answers there.

        False: there is no store, or another one that was started since. None: the network is cut.
        """
        answers: list[bool | None] = []
        # a thread, because torch waits without a limit for what accepts the connection and then says nothing
        probe = threading.Thread(target=lambda: answers.append(self._probe(endpoint, key, value)), daemon=True)
        probe.start()
        probe.join(3 * PROBE_SECONDS)
        return answers[0] if answers else None

    def _probe(self, endpoint: str, key: str, value: str) -> bool | None:
        host, _, port = endpoint.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=PROBE_SECONDS).close()
            store = tcp_store(host, int(port), None, False, timedelta(seconds=PROBE_SECONDS))
            name = self._key(key)
            return bool(store.check([name])) and store.get(name).decode() == value
        except ConnectionRefusedError:
            return False
        except (OSError, RuntimeError):
            return None

    def _key(self, name: str) -> str:
        return f"tinytrain.{self._handler._settings.run_id}.{name}"


def _limit_silence_of(descriptor: int, port: int) -> None:
    """Set the limit for a socket if its other end has this port."""
    with socket.socket(fileno=os.dup(descriptor)) as copy:  # closes the copy, and not the socket
        if copy.getpeername()[1:2] == (port,):
            copy.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_STORE_SECONDS * 1000)


def _node(described: Any) -> Node:
    return Node(described.addr, described.pid)


def hook_into_rendezvous(hooks: RendezvousHooks | None) -> None:
    """Let torchrun serve a new store to the ranks of each round, and call hooks. None: no hooks.

    By itself torchrun keeps one store across restarts, in which ranks would read the addresses of dead ranks. With
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 it chooses a free port, which rank 0 binds seconds later. Another process can
    take the port in between.

    TORCH_ELASTIC_WORKER_IDENTICAL: all nodes have the same number of ranks, so torchrun need not wait until all nodes
    have announced theirs. If a node is lost meanwhile, it would wait for a minute, and then end all agents.
    Versions: DynamicRendezvousHandler with these attributes in 2.11 to 2.15.
    """
    from torch.distributed.elastic.rendezvous import RendezvousTimeoutError
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

    plain_next = DynamicRendezvousHandler.next_rendezvous
    plain_waiting = DynamicRendezvousHandler.num_nodes_waiting

    if hooks is not None:
        os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"

    def next_rendezvous(self: DynamicRendezvousHandler) -> Any:
        self._shared_tcp_store_server = None
        self._bootstrap_store_info = None
        if hooks is None:
            return plain_next(self)
        rendezvous = ElasticRendezvous(self)
        self._get_store = partial(_store_with_head, rendezvous, type(self)._get_store)  # type: ignore[method-assign]
        try:
            hooks.before_round(rendezvous)
            rendezvous.begin_when(partial(hooks.all_have_joined, rendezvous))
            while True:
                try:
                    with _store_in_use():
                        joined = plain_next(self)
                    break
                except HeadLostError:
                    continue  # in the next round
                except RendezvousTimeoutError:
                    if not self._state_holder.state.complete:
                        raise
                    # the others train, and this node is a spare: it may wait for as long as they do
            hooks.after_round(rendezvous)
        except StoreLostError:
            hooks.store_is_lost(rendezvous)
        return joined

    def num_nodes_waiting(self: DynamicRendezvousHandler) -> int:
        if hooks is None:
            return plain_waiting(self)
        rendezvous = ElasticRendezvous(self)
        try:
            with _store_in_use():
                plain_waiting(self)
            return int(hooks.must_regroup(rendezvous))
        except StoreLostError:
            hooks.store_is_lost(rendezvous)

    DynamicRendezvousHandler.next_rendezvous = next_rendezvous  # type: ignore[method-assign]
    DynamicRendezvousHandler.num_nodes_waiting = num_nodes_waiting  # type: ignore[method-assign]


def _store_with_head(rendezvous: ElasticRendezvous, plain_store: Callable[[Any], Any]) -> Any:
    """Return torchrun's store of a round, when the address of its first node is in it. Errors: HeadLostError."""
    store = plain_store(rendezvous._handler)
    rendezvous.await_head(store)
    return store


def wrap_worker_close(make_close: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Replace the method with which torchrun ends its workers by `make_close(original method)`.

    Both have the signature (context, death_sig, timeout=30). `context.subprocess_handlers` maps local ranks to
    workers, and `context.error_files` maps them to error files. Versions: SubprocessContext._close in 2.11 to 2.15.
    """
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    SubprocessContext._close = make_close(SubprocessContext._close)  # type: ignore[method-assign]


def wrap_rank_start(take: Callable[[Sequence[str], Mapping[str, str]], Popen[bytes] | None]) -> None:
    """Let torchrun use processes that are ready to become ranks.

    take: gets the command and the environment of a rank, and returns the process that has become this rank; None: it is
    started as usual. Ranks whose output torchrun redirects are always started as usual.
    Versions: SubprocessHandler._popen in 2.11 to 2.15.
    """
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    plain_popen = SubprocessHandler._popen

    def popen(self: Any, args: tuple[str, ...], env: dict[str, str]) -> Popen[bytes]:
        is_plain = self._stdout is None and self._stderr is None
        taken = take(args, env) if is_plain else None
        return plain_popen(self, args, env) if taken is None else taken

    SubprocessHandler._popen = popen  # type: ignore[method-assign]


def serve_rendezvous(endpoint: str) -> Any:
    """Serve torchrun's rendezvous at HOST:PORT on the listening socket that this process was given, if there is one.

    torchrun shares this server with its own store of the same port (multi_tenant). Returns the store, to keep.
    """
    port = endpoint.rpartition(":")[2]
    if not (port.isdecimal() and LISTENER_VARIABLE in os.environ):
        return None
    return tcp_store("127.0.0.1", int(port), None, True, timedelta(seconds=60))


def serve_store(port: int) -> Any:
    """Serve a store for torchrun's rendezvous in this process; `port` 0 takes a free one, which `store.port` tells.

    Errors: RuntimeError if the port is taken.
    """
    return tcp_store("127.0.0.1", port, None, True, timedelta(seconds=60))
