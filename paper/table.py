"""What a table of the paper is, before it is LaTeX, HTML or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of plain text under a header; `note` says what the reader must know."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    rules: frozenset[int] = frozenset()
    """Rows before which a rule is drawn."""
    align: str = ""
    labels: int = 1
    """How many leading columns name a row; the others hold what was found."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was found for any row."""
        return all(cell in ("", "–") for row in self.rows for cell in row[self.labels :])
