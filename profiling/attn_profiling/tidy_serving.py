"""The part of `tidy` that turns records of the step `serving` into rows.

Decoding: suite and problem as in the table; subject `decode`, peer `fa3`, and peer `contiguous`
where keys lie in pages. The model: suite `model`, the problem says what was asked of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attn_ladder.problem import DTYPE_BYTES, Problem
from attn_profiling import record, stats

if TYPE_CHECKING:
    from attn_profiling.tidy import Tidier

OURS, PEER, CONTIGUOUS = "decode", "fa3", "contiguous"
REGIME, CLEAN = "spaced", "spaced, clean L2"
SMALL_BYTES = 64 * 2**20
SMALL, LARGE = "(median, K and V < 64 MiB)", "(median, K and V >= 64 MiB)"
CHECKS, TOKENS = "(checks)", "(tokens)"
"""Stand in the column `problem` for what belongs to no single one."""
MODEL = "model"
IMPLEMENTATIONS = {"attn_ladder_fa3": "fa3"}
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
FIGURES = ("margin", "rounding", "ulp", "exact_margin", "logit_error", "reference_error")
"""Of the first difference of two rows of tokens (`serving_tokens.agreement`)."""

Ratios = dict[str, list[tuple[Problem, stats.Replicates]]]


def kv_bytes(problem: Problem) -> int:
    """Bytes of K and V, which one query token reads once."""
    size = DTYPE_BYTES[problem.dtype]
    return 2 * size * problem.batch * problem.seqlen_k * problem.nheads_k * problem.headdim


def inverse(found: stats.Interval, amount: float) -> stats.Interval:
    """The interval of `amount` over a time."""
    return replace(
        found, value=amount / found.value, low=amount / found.high, high=amount / found.low
    )


def decodes(tidier: Tidier) -> None:
    """Rows of every suite of decoding."""
    for path, data in tidier.run.decodes:
        _checks(tidier, data)
        taken: dict[Problem, Mapping[str, Any]] = {}
        ratios: dict[str, Ratios] = {REGIME: {}, CLEAN: {}}
        tried: dict[str, list[Problem]] = {}
        for entry, problem in tidier.entries(path, data):
            attempts = entry["attempts"]
            attempt = next((a for a in attempts if a["ok"]), attempts[-1])
            conclusive = entry["status"] == "ok"
            samples = {
                name: found
                for name, found in attempt["samples"].items()
                if not tidier.is_stale(path, data, name)
            }
            taken[problem] = samples
            _timed(tidier, data["suite"], problem, samples, attempt["copy_bytes_per_s"])
            _judged(tidier, data["suite"], problem, entry, samples, conclusive)
            there = next((a for a in (attempt, *attempts) if a.get("clean_ok")), attempt)
            clean = {n: s for n, s in there.get("clean", {}).items() if n in samples}
            agrees = conclusive and bool(there.get("clean_ok"))
            _clean(tidier, data["suite"], problem, clean, agrees)
            if PEER in clean and entry.get("clean_chosen"):
                place = (data["suite"], problem, PEER, CLEAN)
                tidier.metric(*place, "chosen_there", "1", value=1.0)
                if entry.get("clean_tried"):
                    count = float(len(entry["clean_tried"][PEER]))
                    tidier.metric(*place, "tried_there", "1", value=count)
            for peer in _ratios(problem, samples, taken):
                tried.setdefault(peer, []).append(problem)
            for regime, found, counts in (
                (REGIME, samples, conclusive), (CLEAN, clean, agrees),
            ):  # fmt: skip
                for peer, ratio in _ratios(problem, found, taken).items():
                    tidier.speedup(
                        data["suite"], problem.id, problem.dtype, regime, OURS, peer,
                        ratio.interval(),
                    )  # fmt: skip
                    if counts:
                        ratios[regime].setdefault(peer, []).append((problem, ratio))
        for regime, of in ratios.items():
            _reduced(tidier, data["suite"], regime, of, tried)


def _checks(tidier: Tidier, data: record.Record) -> None:
    right = sum(row["ok"] for row in data["checks"])
    wrong = len(data["checks"]) - right
    for name, value in (("checks_right", right), ("checks_wrong", wrong)):
        tidier.row(data["suite"], CHECKS, "-", OURS, "-", name, "1", value=value)
    for row in data["checks"]:
        if not row["ok"]:
            tidier.left_out(data, row["name"], OURS, "failed", row["detail"])
    if data["checks_stopped"]:
        tidier.left_out(data, CHECKS, OURS, "left out", data["checks_stopped"])


def _timed(
    tidier: Tidier,
    suite: str,
    problem: Problem,
    samples: Mapping[str, Any],
    copies: Sequence[float],
) -> None:
    size, copy = kv_bytes(problem), float(np.median(copies)) if copies else None
    for subject, found in samples.items():
        place = (suite, problem, subject, REGIME)
        us = stats.median_interval(found["gpu_us"])
        tidier.interval(*place, "gpu_us", "us", us)
        event = float(np.median(np.concatenate([np.asarray(p) for p in found["event_us"]])))
        tidier.metric(*place, "event_us", "us", median=event)
        rate = inverse(us, size / 1e-6)
        tidier.interval(*place, "kv_bytes_per_s", "B/s", rate)
        if copy:
            of_copy = inverse(us, 100 * size / 1e-6 / copy)
            tidier.interval(*place, "of_copy", "%", of_copy)
        kernels = float(sum(found["kernels"].values()))
        tidier.metric(*place, "timed_kernels", "1", value=kernels)


def _clean(
    tidier: Tidier, suite: str, problem: Problem, samples: Mapping[str, Any], agrees: bool
) -> None:
    """Times behind the flush that leaves no modified lines in L2."""
    for subject, found in samples.items():
        us = stats.median_interval(found["gpu_us"])
        tidier.interval(suite, problem, subject, CLEAN, "gpu_us", "us", us)
    for name in (OURS, PEER):
        twin = samples.get(f"{name}#2")
        if twin and name in samples:
            ratio = stats.ratio_interval(twin["gpu_us"], samples[name]["gpu_us"])
            tidier.interval(suite, problem, name, CLEAN, "aa_ratio", "1", ratio)
    if OURS in samples:
        tidier.metric(suite, problem, OURS, CLEAN, "conclusive", "1", value=agrees)


def _judged(
    tidier: Tidier,
    suite: str,
    problem: Problem,
    entry: Mapping[str, Any],
    samples: Mapping[str, Any],
    conclusive: bool,
) -> None:
    for name in (OURS, PEER):
        twin = samples.get(f"{name}#2")
        if twin and name in samples:
            found = stats.ratio_interval(twin["gpu_us"], samples[name]["gpu_us"])
            tidier.interval(suite, problem, name, REGIME, "aa_ratio", "1", found)
    if OURS not in samples:
        return
    tidier.metric(suite, problem, OURS, REGIME, "conclusive", "1", value=conclusive)
    if not conclusive:
        last = entry["attempts"][-1]
        tidier.inconclusive.append(
            {
                "suite": suite,
                "problem": problem.id,
                "regime": REGIME,
                "aa_ratios": list(last["aa_ratios"].values()),
                "reason": last["message"],
            }
        )
    for name, config in sorted(entry["chosen"].items()):
        if config:
            tidier.chosen.append(
                {
                    "suite": suite,
                    "problem": problem.id,
                    "regime": REGIME,
                    "subject": name,
                    "config": config,
                }
            )


def _ratios(
    problem: Problem, samples: Mapping[str, Any], taken: Mapping[Problem, Mapping[str, Any]]
) -> dict[str, stats.Replicates]:
    """Ours over the peer; with pages, over the same shape without."""
    if OURS not in samples:
        return {}
    ours = samples[OURS]["gpu_us"]
    if not problem.page_size:
        found = samples.get(PEER)
        return {PEER: stats.ratio_replicates(ours, found["gpu_us"])} if found else {}
    for other, found in taken.items():
        same = replace(problem, id=other.id, suites=other.suites, page_size=0) == other
        if same and OURS in found:
            return {CONTIGUOUS: stats.ratio_replicates(ours, found[OURS]["gpu_us"])}
    return {}


def _reduced(
    tidier: Tidier, suite: str, regime: str, ratios: Ratios, tried: Mapping[str, list[Problem]]
) -> None:
    """Ratios over the shapes, none that would leave out more than a tenth of those measured."""
    from attn_profiling.tidy import MEDIAN, MINIMUM
    from attn_profiling.verdict import LEFT_OUT

    def small(problem: Problem) -> bool:
        return kv_bytes(problem) < SMALL_BYTES

    for peer, of in ratios.items():
        dtype = "/".join(sorted({problem.dtype for problem, _ in of}))
        for name, wanted, reduce in (
            (MEDIAN, lambda p: True, np.median),
            (MINIMUM, lambda p: True, np.min),
            (SMALL, small, np.median),
            (LARGE, lambda p: not small(p), np.median),
        ):
            chosen = [ratio for problem, ratio in of if wanted(problem)]
            every = sum(map(wanted, tried[peer]))
            if chosen and every - len(chosen) <= LEFT_OUT * every:
                found = stats.over_problems(chosen, reduce).interval()
                tidier.speedup(suite, name, dtype, regime, OURS, peer, found)


# -- the model


def models(tidier: Tidier) -> None:
    """Rows of the model's tokens, memory and speed."""
    for path, data in tidier.run.models:
        if data["reason"]:
            tidier.notes.append(f"serving/model.json: {data['reason']}")
            continue
        if tidier.is_stale(path, data, "transformers"):
            continue
        dtype = _short(data["dtype"] or "-")
        for name, text in sorted(data["errors"].items()):
            tidier.left_out(data, name, "attn_ladder", "error", text)
        _tokens(tidier, data)
        _memory(tidier, data, dtype)
        _speed(tidier, path, data, dtype)


def token_case(row: Mapping[str, Any]) -> str:
    """What stands in the column `problem` for a group of prompts."""
    return ", ".join(
        [
            row["case"],
            row["cache"],
            _short(row.get("dtype", "-")),
            f"against {row.get('against', '-')}",
        ]
    )


def _short(dtype: str) -> str:
    name = dtype.removeprefix("torch.")
    return DTYPES.get(name, name)


def _tokens(tidier: Tidier, data: record.Record) -> None:
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in data["token_agreement"]:
        dtype, subject = _short(row.get("dtype", "-")), row.get("implementation", "attn_ladder")
        groups.setdefault((token_case(row), dtype, subject), []).append(row)
        groups.setdefault((f"{TOKENS}, {dtype}", dtype, subject), []).append(row)
        groups.setdefault((TOKENS, "-", subject), []).append(row)
        if "error" in row:
            tidier.left_out(data, token_case(row), subject, "error", row["error"])
    for (problem, dtype, subject), group in groups.items():
        same = sum(row.get("same", False) for row in group)
        ties = sum(row.get("tie", False) for row in group)
        for name, value in (
            ("token_agreement", same / len(group)),
            ("token_prompts", len(group)),
            ("token_ties", ties),
            ("token_differences", len(group) - same - ties),
        ):
            tidier.row(MODEL, problem, dtype, subject, "-", name, "1", value=value)
        if problem.startswith(TOKENS):
            continue
        for row in group:
            if row.get("same", True):
                continue
            place = f"{problem}, {row['prompt_tokens']} tokens"
            for name in ("agree", *FIGURES, "tie"):
                if name not in row:  # a record without fp32 logits
                    continue
                metric, value = f"first_difference_{name}", float(row[name])
                tidier.row(MODEL, place, dtype, subject, "-", metric, "1", value=value)


def _memory(tidier: Tidier, data: record.Record, dtype: str) -> None:
    memory = data["memory"]
    if memory is None:
        return
    problem = f"cache, batch {memory['batch']}, {memory['tokens']} tokens"
    for name in ("cache_bytes", "expanded_bytes", "allocated_bytes", "allocated_expanded_bytes"):
        tidier.row(MODEL, problem, dtype, "attn_ladder", "-", name, "B", value=memory[name])


def speed_case(row: Mapping[str, Any]) -> str:
    """What stands in the column `problem` for a measurement of speed."""
    after = f", after {row['before']}" if row["before"] else ""
    return f"{row['kind']}, batch {row['batch']}{after}"


def _speed(tidier: Tidier, path: Path, data: record.Record, dtype: str) -> None:
    for row in data["speed"]:
        subject = IMPLEMENTATIONS.get(row["implementation"], row["implementation"])
        problem = speed_case(row)
        if subject == PEER and tidier.is_stale(path, data, PEER):
            continue
        if "error" in row:
            tidier.left_out(data, problem, subject, "error", row["error"])
            continue
        seconds = stats.median_interval(row["seconds"])
        rate = inverse(seconds, row["batch"] * row["tokens"])
        statistics = {
            "median": rate.value, "ci_low": rate.low, "ci_high": rate.high,
            "n_processes": rate.n_processes, "n": rate.n,
        }  # fmt: skip
        tidier.row(
            MODEL, problem, dtype, subject, "-", "tokens_per_s", "token/s", None, **statistics
        )
        in_turn = float(row.get("in_turn", False))
        tidier.row(MODEL, problem, dtype, subject, "-", "taken_in_turn", "1", value=in_turn)
