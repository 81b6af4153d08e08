"""Child processes that measure: what one of them breaks, hangs or leaks stays with it.

A worker is `python -m attn_profiling.cli worker KIND`; it reads one request (a line of JSON) from
its standard input and reports lines of JSON through a pipe of its own. What it prints goes to a
log file, whose end is shown when it fails.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

REPORT_FD = "ATTN_LADDER_REPORT_FD"
COMMAND = (sys.executable, "-m", "attn_profiling.cli", "worker")


class WorkerDied(RuntimeError):
    """A worker ended without finishing: by a signal, an exit status or the clock."""


class Reporter:
    """The worker's end: takes the request, sends messages."""

    def __init__(self) -> None:
        self._pipe = os.fdopen(int(os.environ[REPORT_FD]), "w")

    def request(self) -> dict[str, Any]:
        """Say that this worker is ready and wait for the request. Ends the process where the parent
        has gone."""
        self.send(ready=True)
        line = sys.stdin.readline()
        if not line:
            raise SystemExit(0)
        return dict(json.loads(line))

    def send(self, **message: Any) -> None:
        """Report one message to the parent."""
        self._pipe.write(json.dumps(message) + "\n")
        self._pipe.flush()


class Worker:
    """The parent's end. Starting one lets it import; `begin` hands it its request."""

    def __init__(
        self, kind: str, arguments: list[str], log: Path, environment: Mapping[str, str]
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        read, write = os.pipe()
        with log.open("ab") as handle:
            self._process = subprocess.Popen(
                [*COMMAND, kind, *arguments],
                stdin=subprocess.PIPE,
                stdout=handle,
                stderr=subprocess.STDOUT,
                pass_fds=[write],
                env={
                    **os.environ,
                    "KINETO_LOG_LEVEL": "5",
                    # CUPTI that is torn down and set up again loses the kernels of CUDA graphs
                    "TEARDOWN_CUPTI": "0",
                    "DISABLE_CUPTI_LAZY_REINIT": "1",
                    "PYTHONUNBUFFERED": "1",
                    **environment,
                    REPORT_FD: str(write),
                },
            )
        os.close(write)
        self._pipe = read
        self._buffer = b""

    def wait_ready(self, silence_s: float) -> None:
        """Wait until the worker has imported everything and waits for its request.

        Raises `WorkerDied` if it ends before, or takes longer than `silence_s` seconds.
        """
        if next(self._lines(silence_s), None) is None:
            raise WorkerDied(f"it ended without waiting for its request{self._said()}")

    def begin(self, request: Mapping[str, Any]) -> None:
        """Send the request."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # its death is reported by messages()

    def messages(self, silence_s: float) -> Iterator[dict[str, Any]]:
        """Messages until the worker ends.

        Raises `WorkerDied` if it fails, or says nothing for `silence_s` seconds (it is killed).
        """
        for message in self._lines(silence_s):
            if "ready" not in message:
                yield message

    def _lines(self, silence_s: float) -> Iterator[dict[str, Any]]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._pipe, selectors.EVENT_READ)
            while True:
                while b"\n" in self._buffer:
                    line, self._buffer = self._buffer.split(b"\n", 1)
                    yield json.loads(line)
                if not selector.select(silence_s):
                    self.kill()
                    raise WorkerDied(
                        f"no progress for {silence_s:.0f} s, so it was killed{self._said()}"
                    )
                chunk = os.read(self._pipe, 1 << 16)
                if not chunk:
                    break
                self._buffer += chunk
        try:
            status = self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.kill()
            raise WorkerDied(f"it did not end after its last message{self._said()}") from None
        if status < 0:
            raise WorkerDied(f"it was ended by {signal.Signals(-status).name}{self._said()}")
        if status:
            raise WorkerDied(f"it ended with exit status {status}{self._said()}")

    def kill(self) -> None:
        """End the process and everything held for it."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Release the pipe; ends a worker that was never begun."""
        self.kill()
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    def _said(self) -> str:
        text = self.log.read_text(errors="replace").strip() if self.log.is_file() else ""
        lines = text.splitlines()[-8:]
        return f"; the end of {self.log}:\n  " + "\n  ".join(lines) if lines else ""
