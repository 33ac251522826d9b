"""Processes that hold one variant each, kept warm, and turns among them in random order.

Variants share no process: their compilers' settings are global, and a reset of one would drop the others.
They are not run one after the other either, because machines drift: in each round every worker takes one
turn, and the ratio of two turns of one round is free of whatever drifts more slowly than a round.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Protocol

from benchmarks.models.messages import Failure
from fxpasses.errors import FxpassesError

REQUEST_SECONDS = 3600.0
_ROOT = Path(__file__).resolve().parents[2]
_LOG_LINES = 3


class WorkerError(FxpassesError, RuntimeError):
    """A worker that answered with an exception, died or did not answer."""

    def __init__(self, message: str, kind: str = "WorkerError") -> None:
        super().__init__(message)
        self.kind = kind


class Answering(Protocol):
    """Anything that answers requests."""

    def request(self, message: object) -> object:
        """The reply to `message`; raises WorkerError where there is none."""


class Worker:
    """A process that answers requests, one at a time; a context manager that ends it."""

    def __init__(
        self,
        *,
        threads: int,
        cache: Path,
        request_seconds: float = REQUEST_SECONDS,
        environment: Mapping[str, str] = MappingProxyType({}),
        module: str = "benchmarks.models.worker",
    ) -> None:
        """Starts the process.

        Args:
            threads: of its OpenMP runtime.
            cache: the folder of inductor's caches; an empty one makes compilation cold.
            request_seconds: how long to wait for an answer.
            environment: further variables.
            module: what the process runs.
        """
        self._request_seconds = request_seconds
        self._log = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115  # closed by close()
        self._connection, theirs = Pipe()
        path = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join(path),
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            **environment,
        }
        # What is measured while compiling is cold with the other caches, and warm with them.
        variables.setdefault("FXPASSES_PROFILE_DIR", str(cache / "fxpasses-profiles"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=variables,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def request(self, message: object) -> object:
        """Sends a request and waits for the reply.

        Raises:
            WorkerError: the reply is a failure, the process died, or it took longer than it may.
        """
        try:
            self._connection.send(message)
            if not self._connection.poll(self._request_seconds):
                self._process.kill()
                raise WorkerError(f"no answer within {self._request_seconds:.0f} s; the process was ended")
            reply: object = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise WorkerError(self._obituary()) from error
        if isinstance(reply, Failure):
            raise WorkerError(f"{reply.kind}: {reply.message}", reply.kind)
        return reply

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _obituary(self) -> str:
        status = self._process.wait(timeout=60)
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        self._log.seek(0)
        last = [line.strip() for line in self._log.read().splitlines() if line.strip()][-_LOG_LINES:]
        return f"the process died with {how}" + (f": {' | '.join(last)}" if last else "")


def time_in_rounds(
    workers: Mapping[str, Answering],
    turn: object,
    rounds: int,
    *,
    seed: int = 0,
    after_round: Callable[[], None] = lambda: None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Lets every worker take one turn in each round, in an order drawn anew for each.

    Args:
        workers: by name.
        turn: the request whose reply is the seconds of a step.
        rounds: how many.
        seed: of the orders.
        after_round: called when a round is over, for progress.

    Returns:
        For each worker that took every turn the seconds of its steps, one a round; and for each that
        failed the reason. The others go on.
    """
    shuffled = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    failures: dict[str, str] = {}
    for _ in range(rounds):
        order = list(seconds)
        shuffled.shuffle(order)
        for name in order:
            try:
                reply = workers[name].request(turn)
            except WorkerError as error:
                failures[name] = str(error)
                del seconds[name]
                continue
            if not isinstance(reply, float):
                raise TypeError(f"a turn must be answered with seconds, {name} answered {reply!r}")
            seconds[name].append(reply)
        after_round()
    return seconds, failures
