"""The shapes that are measured: one row of `config/problems.tsv` is one `Problem`."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, fields
from pathlib import Path

DTYPES = ("bf16", "fp16")
DTYPE_BYTES = {"bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Problem:
    """One attention forward pass.

    `id` uses only `[a-z0-9-]`, so that it can stand in file names and NVTX range names. `seqlen_*`
    count tokens of one sequence, `nheads` query heads, `nheads_k` key/value heads; `page_size` is 0
    where K and V are contiguous.

    Raises `ValueError` naming the field, its value and what was expected.
    """

    id: str
    suites: tuple[str, ...]
    dtype: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    nheads: int
    nheads_k: int
    headdim: int
    causal: bool
    page_size: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.id):
            raise ValueError(
                f"id={self.id!r} must be lower-case words of letters and digits joined by '-'"
            )
        if not self.suites:
            raise ValueError(f"problem {self.id}: suites is empty; name at least one suite")
        if self.dtype not in DTYPES:
            raise ValueError(
                f"problem {self.id}: dtype={self.dtype!r} must be one of {', '.join(DTYPES)}"
            )
        for name in ("batch", "seqlen_q", "seqlen_k", "nheads", "nheads_k", "headdim"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"problem {self.id}: {name}={getattr(self, name)} must be at least 1"
                )
        if self.nheads % self.nheads_k:
            raise ValueError(
                f"problem {self.id}: nheads={self.nheads} must be a multiple of "
                f"nheads_k={self.nheads_k}"
            )
        if self.page_size < 0:
            raise ValueError(
                f"problem {self.id}: page_size={self.page_size} must be 0 (contiguous) or more"
            )

    @property
    def visible_pairs(self) -> int:
        """Query-key pairs of one head that are not masked (causal aligns bottom-right)."""
        if not self.causal:
            return self.seqlen_q * self.seqlen_k
        offset = self.seqlen_k - self.seqlen_q
        first = max(0, -offset)  # rows before it see no key
        rows = self.seqlen_q - first
        shortest = first + offset + 1
        return rows * shortest + rows * (rows - 1) // 2

    @property
    def flops(self) -> int:
        """Operations of the two matrix products over the visible pairs (exact causal area)."""
        return 4 * self.batch * self.nheads * self.headdim * self.visible_pairs

    @property
    def convention_flops(self) -> int:
        """Operations as the FA3 paper counts them: 4·S²·D·H·B, halved when causal."""
        full = 4 * self.batch * self.nheads * self.headdim * self.seqlen_q * self.seqlen_k
        return full // 2 if self.causal else full

    @property
    def min_bytes(self) -> int:
        """Bytes that must cross device memory: Q, K, V read once, O and the LSE written once."""
        size = DTYPE_BYTES[self.dtype]
        q_and_o = 2 * self.batch * self.seqlen_q * self.nheads * self.headdim * size
        k_and_v = 2 * self.batch * self.seqlen_k * self.nheads_k * self.headdim * size
        return q_and_o + k_and_v + 4 * self.batch * self.nheads * self.seqlen_q


def _parse(column: str, text: str) -> object:
    if column == "suites":
        return tuple(s for s in text.split(",") if s)
    if column in ("id", "dtype"):
        return text
    if column == "causal":
        if text not in ("0", "1"):
            raise ValueError(f"causal={text!r} must be 0 or 1")
        return text == "1"
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{column}={text!r} must be an integer") from None


def read_problems(path: Path) -> dict[str, Problem]:
    """Read a tab-separated problem table into `{id: Problem}`, in file order.

    Raises `ValueError` naming the file, the line and the field of a bad row, a duplicate id or a
    wrong header.
    """
    expected = [f.name for f in fields(Problem)]
    problems: dict[str, Problem] = {}
    with path.open(newline="") as handle:
        reader = csv.DictReader(handle, delimiter="\t")
        if reader.fieldnames != expected:
            raise ValueError(f"{path}: columns are {reader.fieldnames}, expected {expected}")
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{where}: expected {len(expected)} tab-separated fields")
            try:
                problem = Problem(**{name: _parse(name, row[name]) for name in expected})  # type: ignore[arg-type]
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if problem.id in problems:
                raise ValueError(f"{where}: id={problem.id!r} is used twice; ids must be unique")
            problems[problem.id] = problem
    if not problems:
        raise ValueError(f"{path}: no problems; add at least one row")
    return problems


def select(problems: dict[str, Problem], suite: str) -> list[Problem]:
    """The problems of one suite, in file order. Raises `ValueError` listing the known suites if
    there are none."""
    chosen = [p for p in problems.values() if suite in p.suites]
    if not chosen:
        known = sorted({s for p in problems.values() for s in p.suites})
        raise ValueError(f"{suite=} selects no problem; known suites: {', '.join(known)}")
    return chosen
