"""Tables of what users call: decoding beside FA3, and a model through transformers."""

from __future__ import annotations

from statistics import median

from attn_ladder.problem import Problem
from attn_profiling.tidy_serving import (
    CHECKS,
    CLEAN,
    CONTIGUOUS,
    FIGURES,
    LARGE,
    MODEL,
    OURS,
    SMALL,
    kv_bytes,
)
from attn_profiling.tidy_serving import TOKENS as ALL
from paper.evidence import MINIMUM, REFERENCE_PEER, Evidence, Value, interval, number
from paper.table import Table

SUITE = "decode"
MODEL_FILE = "serving/model.json"
TOKENS = ("token_prompts", "token_ties", "token_differences")


def shapes(evidence: Evidence) -> list[tuple[Problem, Problem | None]]:
    """The problems of decoding without pages, each with its twin in pages."""

    def shape(p: Problem) -> tuple[object, ...]:
        return (p.dtype, p.batch, p.seqlen_k, p.nheads, p.nheads_k, p.headdim)

    problems = evidence.suite(SUITE)
    paged = {shape(p): p for p in problems if p.page_size}
    return [(p, paged.get(shape(p))) for p in problems if not p.page_size]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}" if size < 1e7 else f"{size / 1e6:.0f}"


def decode(evidence: Evidence) -> Table:
    """One query token on a KV cache: ours, FA3, and how far from reading K and V once."""
    rows = []
    for problem, twin in shapes(evidence):
        sure = "" if evidence.conclusive(SUITE, problem.id) else "†"
        times = [
            number(evidence.metric(SUITE, problem.id, name, "gpu_us", "spaced"), 1)
            for name in (OURS, REFERENCE_PEER)
        ]
        pages = evidence.speedup(SUITE, twin.id, OURS, CONTIGUOUS) if twin else None
        clean_sure = "" if evidence.conclusive(SUITE, problem.id, CLEAN) else "†"
        clean = evidence.speedup(SUITE, problem.id, OURS, REFERENCE_PEER, CLEAN)
        rows.append(
            [
                str(problem.batch),
                f"{problem.nheads}/{problem.nheads_k}",
                str(problem.headdim),
                f"{problem.seqlen_k}{sure}",
                _megabytes(kv_bytes(problem)),
                *times,
                interval(evidence.speedup(SUITE, problem.id, OURS, REFERENCE_PEER), 3),
                interval(clean, 3) + clean_sure,
                number(evidence.metric(SUITE, problem.id, OURS, "of_copy", "spaced")),
                interval(pages, 3),
            ]
        )
    for name, word in (
        (SMALL, "median, under 64 MiB"),
        (LARGE, "median, from 64 MiB"),
        (MINIMUM, "least"),
    ):
        found = [evidence.speedup(SUITE, name, OURS, p) for p in (REFERENCE_PEER, CONTIGUOUS)]
        cells = [interval(value, 3) for value in found]
        cells.insert(1, interval(evidence.speedup(SUITE, name, OURS, REFERENCE_PEER, CLEAN), 3))
        rows.append(["", word, "", "", "", "", "", *cells[:2], "", cells[2]])
    choice = "with the same choice for FA3"
    if evidence.all_of(SUITE, "chosen_there", CLEAN):
        choice = "with what was fastest for FA3 there in a short try"
    if not evidence.all_of(SUITE, "tried_there", CLEAN):  # a record from before these were kept
        choice += ", and not measured again where the A/A pair was off"
    off = (
        " † the A/A pair was off: inconclusive, left out of the reductions; one that would leave"
        " out more than a tenth is not made."
        if any("†" in cell for row in rows for cell in row)
        else ""
    )
    return Table(
        ["batch", "heads", "d", "keys", "MB", "ours µs", "FA3 µs", "over FA3", "clean", "of copy %",
         "pages of 256"],
        rows,
        "One query token for each sequence, bf16, GPU time behind a full queue, L2 cold. MB: K and"
        " V, read once. FA3: the best of its numbers of splits and its own choice, by shape. Clean:"
        " over FA3 behind a flush that reads, after which no modified line in L2 has to go back to"
        f" memory while the call runs, {choice}; all else is behind one that writes."
        " Of copy: bytes of K and V over time, against a large copy. Pages: time contiguous over"
        f" time in pages. {_checks(evidence)}{off}{evidence.added(f'serving/{SUITE}.json')}",
        frozenset({len(rows) - 3}),
        "rlrrrrrrrrr",
        labels=5,
    )  # fmt: skip


def _checks(evidence: Evidence) -> str:
    right = evidence.metric(SUITE, CHECKS, OURS, "checks_right")
    wrong = evidence.metric(SUITE, CHECKS, OURS, "checks_wrong")
    if right is None or wrong is None:
        return "Checks: not measured."
    return f"Checks before: {right.value:.0f} right, {wrong.value:.0f} wrong."


def _case(problem: str, subject: str) -> list[str]:
    """Number format, case, cache, whose tokens, and against whose, of a group of prompts."""
    case, *cache, dtype, against = problem.split(", ")
    who = "ours" if subject == "attn_ladder" else subject
    return [dtype, case, ", ".join(cache), who, against.removeprefix("against ")]


def tokens(evidence: Evidence) -> Table:
    """Greedy tokens against those of the references, by case."""
    rows, sums = [], []
    for (problem, subject), share in evidence.all_of(MODEL, "token_agreement").items():
        found = [evidence.metric(MODEL, problem, subject, name) for name in TOKENS]
        prompts = found[0].value if found[0] else 0
        numbers = [number(value) for value in found]
        cells = [numbers[0], f"{share.value * prompts:.0f}", *numbers[1:]]
        if problem.startswith(ALL):
            dtype = problem.removeprefix(ALL).removeprefix(", ") or "all"
            who = "ours" if subject == "attn_ladder" else subject
            sums.append([dtype, "all", "", who, "", *cells])
        else:
            rows.append([*_case(problem, subject), *cells])
    sums.sort(key=lambda row: (row[0] == "all", row[3], row[0]))
    return Table(
        ["", "case", "cache", "tokens of", "against", "prompts", "identical",
         "first difference a tie", "different"],
        rows + sums,
        f"64 greedy tokens for each prompt. {_tie(evidence)}{evidence.added(MODEL_FILE)}",
        frozenset({len(rows)}) if rows else frozenset(),
        "lllllrrrr",
        labels=5,
    )  # fmt: skip


def _tie(evidence: Evidence) -> str:
    """What a tie is in the record."""
    if evidence.all_of(MODEL, "first_difference_margin") and not evidence.all_of(
        MODEL, "first_difference_exact_margin"
    ):
        return (
            "A tie: the reference prefers its token by no more than two units of the logits' number"
            " format and twice the largest difference of the logits at that step."
        )
    return (
        "Those of sdpa against eager show what two references make of it. A tie: where tokens first"
        " differ, the margin between the two in fp32 logits (same weights, eager attention) and our"
        " largest distance from these logits are both within twice the references' largest"
        " distance."
    )


def token_differences(evidence: Evidence) -> Table:
    """Where tokens differ: the figures of the first differences, median and largest of a group."""
    groups: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for problem, subject in evidence.all_of(MODEL, "first_difference_agree"):
        dtype, _, _, who, against = _case(problem.rpartition(", ")[0], subject)
        values = {
            name: evidence.metric(MODEL, problem, subject, f"first_difference_{name}")
            for name in (*FIGURES, "tie")
        }
        found = {name: value.value for name, value in values.items() if value is not None}
        groups.setdefault((dtype, who, against), []).append(found)
    rows = []
    for names, group in sorted(groups.items()):
        in_fp32 = [each for each in group if "reference_error" in each]
        columns = (
            [each["margin"] / each["ulp"] for each in group],
            [each["margin"] / each["rounding"] for each in group if each["rounding"]],
            [abs(each["exact_margin"]) / each["reference_error"] for each in in_fp32],
            [each["logit_error"] / each["reference_error"] for each in in_fp32],
        )
        cells = [
            f"{median(column):.2g}, {max(column):.2g}" if column else "–" for column in columns
        ]
        ties = sum(bool(each["tie"]) for each in group)
        rows.append([*names, str(len(group)), *cells, str(ties)])
    if not rows and evidence.all_of(MODEL, "token_agreement"):
        rows = [["none", "", "", "no token differs", *[""] * 5]]
    return Table(
        ["", "tokens of", "against", "differences", "margin, units", "margin / rounding",
         "exact / bound", "error / bound", "ties"],
        rows,
        "Of the first differences; median, largest. Margin: by how much the reference prefers its"
        " token, in units of the logits' number format; rounding: the largest difference of the two"
        " logits at that step. Exact: the margin in fp32 logits of the same weights. Error: our"
        " largest distance from these. Bound: that distance of the references. Every difference is"
        " in results/metrics.csv, first_difference_*.",
        align="lllrrrrrr",
        labels=3,
    )  # fmt: skip


def serving_speed(evidence: Evidence) -> Table:
    """Tokens a second of a model, wall time, by attention implementation."""
    found = evidence.all_of(MODEL, "tokens_per_s")
    names = ("attn_ladder", "sdpa", REFERENCE_PEER)
    turns = [value.value for value in evidence.all_of(MODEL, "taken_in_turn").values()]
    how = "in turn" if turns and all(turns) else "one after the other"
    rows = []
    for problem in sorted({problem for problem, _ in found}):
        values: list[Value | None] = [found.get((problem, name)) for name in names]
        ours, sdpa = values[:2]
        ratio = f"{ours.value / sdpa.value:.2f}" if ours and sdpa else "–"
        rows.append([problem, *(interval(value, 0) for value in values), ratio])
    return Table(
        ["", "ours", "sdpa", "FA3", "ours over sdpa"],
        rows,
        f"Tokens a second of wall time, the same model with the attention implementations {how};"
        " intervals are of one process. Eager, the host's time decides. Decode as a CUDA graph: FA3"
        f" is not registered with a static cache.{evidence.added(MODEL_FILE)}",
        align="lrrrr",
    )
