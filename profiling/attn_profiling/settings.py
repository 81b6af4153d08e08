"""The part of the configuration that a measuring command needs, read from a run's config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from attn_ladder.problem import Problem, read_problems, select
from attn_ladder.stage import in_suite, subject, subjects

INPUT_DISTRIBUTION = "standard normal, drawn afresh for each problem and process"


@dataclass(frozen=True)
class Measuring:
    """Numbers that say how a measurement is made; part of what identifies it."""

    processes: int = 3
    rounds: int = 30
    gap_us: float = 1000
    sustained_ms: float = 600
    sustained_bursts: int = 1
    sustained_preheat_ms: float = 1000
    warmup_rounds: int = 3
    max_attempts: int = 3
    aa_tolerance: float = 0.01
    seed: int = 0
    flush_l2_factor: float = 2
    host_calls: int = 300

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"measuring.{each.name}={value!r} must be a number")
            least = 0 if each.name in ("seed", "aa_tolerance", "warmup_rounds") else 1
            if value < least:
                raise ValueError(f"measuring.{each.name}={value} must be at least {least}")


def selected(
    names: Sequence[str], only: Mapping[str, Sequence[str]], suite: str, step: str
) -> tuple[str, ...]:
    """Those of `names` that a suite has in a step; `only` narrows steps and suites down."""
    kept = set(only.get(step, names)) & set(only.get(suite, names))
    return tuple(name for name in names if name in kept and in_suite(name, suite))


def once(
    suite: str,
    order: Sequence[str],
    problems: Callable[[str], Sequence[Problem]],
    subjects: Callable[[str], Sequence[str]],
) -> list[Problem]:
    """The problems of a suite without those that a suite before it in `order` holds, with all the
    subjects of this one."""
    before = order[: order.index(suite)] if suite in order else ()
    wider = [s for s in before if set(subjects(suite)) <= set(subjects(s))]
    held = {problem.id for s in wider for problem in problems(s)}
    return [problem for problem in problems(suite) if problem.id not in held]


@dataclass(frozen=True)
class Settings:
    """What to measure and how."""

    run: str
    run_dir: Path
    problems: dict[str, Problem]
    subjects: tuple[str, ...]
    measuring: Measuring
    fa3_module: str
    constraints: Path
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    model: Path | None = None
    profile: tuple[str, ...] = ()

    @property
    def measuring_fields(self) -> dict[str, float]:
        """The measuring numbers as they stand in a record."""
        return asdict(self.measuring)

    def subjects_of(self, suite: str, step: str) -> tuple[str, ...]:
        """The subjects that a suite has in a step (`check`, `spaced`, `sustained`, `host`,
        `profile`). Raises `ValueError` if there are none."""
        chosen = selected(self.subjects, self.only, suite, step)
        if not chosen:
            raise ValueError(
                f"{suite=} has no subject among {', '.join(self.subjects)}; name others in the"
                " config key `subjects`"
            )
        return chosen

    def suite(self, name: str) -> list[Problem]:
        """The problems of a suite. Raises `ValueError` if there are none."""
        return select(self.problems, name)

    def profiled(self, suite: str) -> list[Problem]:
        """The problems of a suite that are profiled in it, and not in one before it."""
        return once(
            suite,
            self.profile,
            self.suite,
            lambda name: selected(self.subjects, self.only, name, "profile"),
        )


def load(config: Path, run_dir: Path) -> Settings:
    """Read a merged configuration. Raises `ValueError` naming the key that is wrong."""
    try:
        data: dict[str, Any] = json.loads(config.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"--config {config}: no such file; the workflow writes it to runs/<id>/config.json"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"--config {config}: not valid JSON: {error}") from None
    given = data.get("measuring", {})
    known = {each.name for each in fields(Measuring)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(
            f"--config {config}: measuring.{unknown[0]} is unknown; known keys:"
            f" {', '.join(sorted(known))}"
        )
    named = data.get("subjects", "all")
    chosen = tuple(subjects()) if named == "all" else tuple(subject(n).name for n in named)
    return Settings(
        run=run_dir.name,
        run_dir=run_dir,
        problems=read_problems(Path(data.get("problems", "config/problems.tsv"))),
        subjects=chosen,
        measuring=Measuring(**given),
        fa3_module=data.get("fa3_module", "fa3_fwd_interface"),
        constraints=Path(data.get("constraints", "config/constraints.yaml")),
        only={
            where: tuple(subject(name).name for name in names)
            for where, names in data.get("only", {}).items()
        },
        model=Path(data["model"]) if data.get("model") else None,
        profile=tuple(data.get("suites", {}).get("profile", ())),
    )
