"""Watches the processes of one node: passes on the wish to stop, shows rank 0, ends what hangs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from nemo_fp8_recipes.launch import notice, worker
from nemo_fp8_recipes.launch.directory import LaunchDirectory
from nemo_fp8_recipes.launch.progress import HangWatch

__all__ = ["HUNG", "STOPPED", "Agent"]

HUNG = 124
"""Exit status of a job that was ended because it hung."""

STOPPED = (None, 0, 128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Exit statuses that are no failure: not known yet, finished, stopped as asked."""

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_POLL_SECONDS = 0.1
_LAST_WORDS_SECONDS = 60.0
_DUMP_SECONDS = 2.0  # for the processes to write their stacks
_TAIL_LINES = 15


def _say(text: str) -> None:
    print(f"nemo-fp8 launch: {text}", file=sys.stderr, flush=True)


def _prepare_child() -> None:
    """In the child: these two mean nothing until it knows what to do about them; SIGTERM when the agent is
    gone, upon which torchrun ends its workers (Linux)."""
    for number in (worker.STOP, worker.DUMP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@dataclass
class Agent:
    """One node's share of a job: `command` starts its processes, directly or through torchrun."""

    directory: LaunchDirectory
    command: Sequence[str]
    environment: Mapping[str, str]
    watch: HangWatch
    stop_timeout: float
    """Seconds that the processes may take to end after the wish to stop."""
    failed_elsewhere: Callable[[], int | None]
    """The exit status with which another node failed, if one did."""
    output: Path | None
    """Where torchrun's own words go: they explain a failure only when no process of the job could."""
    log_to_file: bool
    """Whether ranks write to their logs, of which rank 0's is shown; else where this process writes."""

    _token: str = field(default_factory=lambda: uuid.uuid4().hex, init=False)
    asked: signal.Signals | None = field(default=None, init=False)
    """The first signal that asked the job to stop, once one has come."""
    _interrupts: int = field(default=0, init=False)
    _hung: bool = field(default=False, init=False)
    _told: set[int] = field(default_factory=set, init=False)

    def run(self) -> int:
        """Start the processes, wait for their end, and return the job's exit status on this node."""
        with self._signals():  # before there is a child: what comes from now on is not lost
            if notice.given():
                self.asked = signal.SIGUSR1
                _say("the job's time is nearly up before it has begun: nothing is started.")
                return 128 + signal.SIGTERM
            child = self._start()
            try:
                self._wait(child)
            finally:
                self._kill(child)
        return self._status(child.returncode)

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {
            **self.environment,
            worker.LAUNCH_DIR: str(self.directory.path),
            worker.AGENT: self._token,
            worker.LOG_TO_FILE: "1" if self.log_to_file else "",
        }
        with contextlib.ExitStack() as files:
            output = files.enter_context(self.output.open("ab")) if self.output is not None else None
            return subprocess.Popen(
                list(self.command),
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches this process alone, which says it on
                preexec_fn=_prepare_child,
            )

    # -- waiting -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._note) for number in _STOP_SIGNALS}
        before[worker.DUMP] = signal.signal(worker.DUMP, signal.SIG_IGN)  # meant for the ranks
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._interrupts += number == signal.SIGINT
        if self.asked is None:
            self.asked = signal.Signals(number)

    def _wait(self, child: subprocess.Popen[bytes]) -> None:
        shown = _Follower(self)
        deadline: float | None = None
        while child.poll() is None:
            time.sleep(_POLL_SECONDS)
            shown.show()
            if self.asked is None and notice.given():
                self.asked = signal.SIGUSR1
            if self.asked is not None:
                if deadline is None:
                    deadline = time.monotonic() + self.stop_timeout
                    again = " (Ctrl-C again: at once)" if self.asked == signal.SIGINT else ""
                    _say(f"{self.asked.name}: the job stops after its current step{again}.")
                self._tell(worker.STOP)
                if self._interrupts > 1:
                    break
                if time.monotonic() > deadline:
                    self._end_hung(f"the job did not end within {self.stop_timeout:g} s of the wish to stop")
                    break
            elif self.watch.hangs():
                self._end_hung("no step, checkpoint or output for launcher.hang_timeout_minutes")
                break
        if child.poll() is None:
            self._kill(child)
        shown.show()

    def _own_ranks(self) -> list[dict[str, Any]]:
        return [record for record in self.directory.ranks() if record["agent"] == self._token]

    def _tell(self, number: signal.Signals) -> None:
        """Send the signal once to every process of this node that is ready for it."""
        for record in self._own_ranks():
            if record["pid"] not in self._told and record["exit_code"] is None:
                self._told.add(record["pid"])
                _signal(record["pid"], number)

    def _end_hung(self, reason: str) -> None:
        self._hung = True
        ranks = [record for record in self._own_ranks() if record["exit_code"] is None]
        for record in ranks:
            _signal(record["pid"], worker.DUMP)
        time.sleep(_DUMP_SECONDS)
        _say(f"{reason}; the stacks of {len(ranks)} process(es) are in {self.directory.path / 'stacks'}.")

    def _kill(self, child: subprocess.Popen[bytes]) -> None:
        """End everything that is left of this node's processes."""
        for record in self._own_ranks():
            if record["exit_code"] is None:
                _signal(record["pid"], signal.SIGKILL)
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        child.wait()

    # -- the end -----------------------------------------------------------------------------------------

    def _status(self, returned: int) -> int:
        """The exit status that says most: what failed first, or that the job stopped as asked."""
        if self._hung:
            return HUNG
        if returned == 0:
            return 0
        ranks = self._own_ranks()
        for record in ranks:
            if record["exit_code"] not in STOPPED:
                self._show_failure(record)
                return int(record["exit_code"])
        for record in ranks:
            if record["exit_code"] is None and self._interrupts < 2:
                _say(f"rank {record['rank']} was killed; its log: {self.directory.log(record['rank'])}")
                return 128 + signal.SIGKILL
        for record in ranks:
            if record["exit_code"] not in (None, 0):
                self._await_rank_0()
                elsewhere = self.failed_elsewhere()
                if elsewhere is not None:  # why the scheduler stopped this node
                    return elsewhere
                return int(record["exit_code"]) if self.asked != signal.SIGINT else 128 + signal.SIGINT
        if self.output is not None:
            _say(f"torchrun failed; all it said is in {self.output}")
            _show_tail(self.output)
        return returned if returned > 0 else 128 - returned

    def _await_rank_0(self) -> None:
        """Let rank 0, on another node perhaps, write its last words: SLURM ends the other tasks of a job once
        one has ended with a status that is not 0."""
        deadline = time.monotonic() + min(_LAST_WORDS_SECONDS, self.stop_timeout)
        while time.monotonic() < deadline:
            first = next((record for record in self.directory.ranks() if record["rank"] == 0), None)
            if first is None or first["exit_code"] is not None:
                return
            time.sleep(_POLL_SECONDS)

    def _show_failure(self, record: Mapping[str, Any]) -> None:
        log = self.directory.log(record["rank"])
        if not self.log_to_file:
            return
        _say(f"rank {record['rank']} failed with exit status {record['exit_code']}; its log: {log}")
        if record["rank"] != 0 and log.exists():
            _show_tail(log)


class _Follower:
    """Shows what rank 0 writes to its log from now on, on the node where rank 0 runs."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        log = agent.directory.log(0)
        self._position = log.stat().st_size if log.exists() else 0
        self._here: bool | None = None if agent.log_to_file else False

    def show(self) -> None:
        if self._here is None:
            first = next((r for r in self._agent.directory.ranks() if r["rank"] == 0), None)
            if first is not None and first["agent"] == self._agent._token:
                self._here = True
        if not self._here:
            return
        with self._agent.directory.log(0).open("rb") as file:
            file.seek(self._position)
            new = file.read()
        if new:
            self._position += len(new)
            with contextlib.suppress(BrokenPipeError):  # the reader of our output went away; the job goes on
                sys.stdout.buffer.write(new)
                sys.stdout.buffer.flush()


def _show_tail(path: Path) -> None:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    print("\n".join(f"  {line}" for line in lines[-_TAIL_LINES:]), file=sys.stderr, flush=True)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
