"""Results of single steps, kept beside a record until it is whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attn_ladder.problem import Problem
from attn_profiling.record import write_text


class Partial:
    """Results of single processes on single problems, so that an interrupted suite goes on."""

    def __init__(self, folder: Path, key: Callable[[Problem], str]) -> None:
        self._folder = folder
        self._key = key

    def _path(self, attempt: int, process: int, problem: Problem) -> Path:
        return self._folder / f"{problem.id}.a{attempt}.p{process}.json"

    def get(self, attempt: int, process: int, problem: Problem) -> dict[str, Any] | None:
        """What was measured under the same conditions, or None."""
        path = self._path(attempt, process, problem)
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text())
        except json.JSONDecodeError:
            return None
        return dict(data["result"]) if data["key"] == self._key(problem) else None

    def put(self, attempt: int, process: int, problem: Problem, result: dict[str, Any]) -> None:
        """Keep a result."""
        text = json.dumps({"key": self._key(problem), "result": result})
        write_text(self._path(attempt, process, problem), text)

    def files(self) -> list[Path]:
        """Where results are kept, in the order of their names."""
        return sorted(self._folder.glob("*.json"))

    def clear(self) -> None:
        """Remove them; the record holds everything."""
        for path in self.files():
            path.unlink()
