"""Every number of the paper's prose, as LaTeX macros.

python -m paper.numbers --results results --out paper/generated/numbers.tex
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from attn_ladder.problem import Problem
from attn_profiling import predict, tidy_serving
from attn_profiling.host_pairs import HOST_PAIRS
from attn_profiling.record import write_text
from attn_profiling.tidy import BEST, MEDIAN, MINIMUM, REFERENCE_PEER
from paper import in_use
from paper.evidence import Evidence, Value, interval, known_of, load, plain
from paper.tables import GATE, SUSTAINED, escape, judged, of_sustained, over_bf16, shape

DIGITS = dict(zip("0123456789", ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven",
                                 "Eight", "Nine"), strict=True))  # fmt: skip
MISSING = r"\emph{not measured}"


def macro(*words: str) -> str:
    """A macro name from words: `('stage5', 'over', 'fa3')` is `\\StageFiveOverFaThree`."""
    parts = re.findall(r"[a-z]+|[0-9]", " ".join(words).lower())
    return "\\" + "".join(DIGITS.get(part, part.capitalize()) for part in parts)


def text(value: Value | None, digits: int, unit: str = "") -> str:
    """A value as LaTeX text; says so where it was not measured."""
    return MISSING if value is None else f"{plain(value.value, digits)}{unit}"


def with_interval(value: Value | None, digits: int) -> str:
    """A value with its 95 % interval."""
    if value is None or value.low is None or value.high is None:
        return text(value, digits)
    return interval(value, digits)


def _median_of(
    evidence: Evidence, subject: str, metric: str, causal: bool | None = None
) -> Value | None:
    """The median of a counter over the grid, or over what the run was profiled on instead; of the
    causal or the full problems alone, where that is said."""
    suite = evidence.counter_suite()
    problems = [p for p in evidence.suite(suite) if causal in (None, p.causal)]
    found = [evidence.metric(suite, p.id, subject, metric) for p in problems]
    values = [v.value for v in found if v is not None]
    return Value(median(values)) if values else None


def _verdict(evidence: Evidence, constraint: str) -> str:
    rows = [r for r in evidence.verdicts if r["constraint"] == constraint]
    found = str(next(r["verdict"] for r in rows if r["suite"] == "(all)"))
    return escape(found.removeprefix("PARTLY: ").lower())  # what is partly so names its suites


def agreement(evidence: Evidence, constraint: str) -> str:
    """Whether the counter and the ablation say the same of a constraint, from their verdicts."""
    found = {"primary": set[str](), "ablation": set[str]()}
    told: dict[tuple[str, str], list[str]] = {}
    for hypothesis, suite, row in judged(evidence):
        verdict = row["verdict"].split(" ")[0]
        if hypothesis.constraint == constraint and hypothesis.role in found:
            found[hypothesis.role].add(verdict)
            if hypothesis.role == "ablation":
                by = "GPU time" if hypothesis.witness["kind"] == "speedup" else "eager latency"
                told.setdefault((verdict.lower(), by), []).append(suite)
    primary, ablation = found["primary"], found["ablation"]
    if "INCONCLUSIVE" in primary | ablation or not ablation:
        return "Counter and ablation cannot be set against each other: not both are decided."
    if primary == ablation:
        return f"Counter and ablation agree: both say {min(primary).lower()}."
    if len(ablation) > 1:
        words = [f"{verdict} by {by} ({', '.join(s)})" for (verdict, by), s in told.items()]
        return f"The ablation does not say one thing: {'; '.join(words)}."
    return (
        f"Counter and ablation disagree: the counter says {'/'.join(sorted(primary)).lower()} for"
        f" FA3, the ablation {min(ablation).lower()} for the ladder. Removing the constraint from"
        " our stage before is not removing it from FA3, which may not have it."
        if "SUPPORTED" in ablation
        else f"Counter and ablation disagree: the counter says {min(primary).lower()} for FA3, the"
        f" ablation {min(ablation).lower()} for the ladder."
    )


def _ends(values: Sequence[float], digits: int, factor: float = 1.0) -> str:
    """The least and the most of some values, as text."""
    if not values:
        return MISSING
    ends = [plain(factor * of(values), digits) for of in (min, max)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _host(evidence: Evidence) -> dict[str, str]:
    """The macros of what a call costs the host, over the gate problems whose pair agreed."""
    every = [p.id for p in evidence.suite("gate")]
    sure = [p for p in every if evidence.host_agrees("gate", p, "host_over_fa3")]

    def costs(subject: str, metric: str) -> dict[str, float]:
        found = {p: evidence.metric("gate", p, subject, metric) for p in sure}
        return {p: value.value for p, value in found.items() if value is not None}

    us = {name: costs(name, "eager_host_us") for name in (REFERENCE_PEER, "cudnn", evidence.top)}
    both = us["cudnn"].keys() & us[evidence.top].keys()
    found = {
        macro("host problems"): f"{len(sure)} of the {len(every)}",
        macro("top host over", REFERENCE_PEER): _ends(
            list(costs(evidence.top, "host_over_fa3").values()), 3
        ),
        macro("top host below cudnn"): str(
            sum(us[evidence.top][p] < us["cudnn"][p] for p in both) if both else MISSING
        ),
    }
    for name, values in us.items():
        who = "top" if name == evidence.top else name
        found[macro(who, "host us")] = _ends(list(values.values()), 0)
    return found


def _claimed(evidence: Evidence, constraint: str, metric: str, suite: str) -> str:
    """On which problems of a suite FA3 has the share that is claimed of it, and how much."""
    primary = next(
        h
        for h in evidence.constraints.hypotheses
        if (h.constraint, h.role) == (constraint, "primary")
    )
    said, measured = [], 0
    for p in evidence.suite(suite):
        share = evidence.metric(suite, p.id, REFERENCE_PEER, metric)
        if metric in HOST_PAIRS and not evidence.host_agrees(suite, p.id, metric):
            continue
        measured += share is not None
        if share is not None and share.value >= primary.threshold:
            name = " ".join(shape(p)) if suite != "gate" else f"batch {p.batch}"
            said.append(rf"{name}: {plain(share.value, 1)}\,\%")
    sure = " whose A/A pair agrees" if metric in HOST_PAIRS else ""
    where = f"on {len(said)} of {measured} problems of the {suite}{sure}"
    return f"{where} ({'; '.join(said)})" if said else where


def _replicated(evidence: Evidence) -> str:
    """Whether another run repeats the ratio of the top stage to FA3 on the grid."""
    ratio = "the ratio of the top stage to FA3 in the median of the grid"
    rows = [
        row
        for row in evidence.replications
        if (row["suite"], row["regime"], row["subject"]) == ("grid", "spaced", evidence.top)
    ]
    if passed := sorted(row["run"] for row in rows if row["verdict"] == "PASS"):
        return escape(f"{ratio[0].upper()}{ratio[1:]} is repeated by run {', '.join(passed)}.")
    told = [
        f"{row['verdict']} in run {row['run']}, which has {row['fresh']}"
        + (" of another kernel of that stage" if "kernel has changed" in row["note"] else "")
        for row in rows
    ]
    of_them = f": {'; '.join(told)}" if told else ""
    return escape(f"No other run repeats {ratio} yet{of_them}.")


def _worst(evidence: Evidence, metric: str, regime: str) -> Value | None:
    found = [
        evidence.metric("grid", p.id, "fa3", metric, regime)
        for p in evidence.suite("grid")
        if evidence.conclusive("grid", p.id, regime)
    ]
    off = [abs(v.value - 1) * 100 for v in found if v is not None]
    return Value(max(off)) if off else None


def _count(evidence: Evidence, suite: str, regime: str, wanted: bool) -> str:
    problems = [
        p
        for p in evidence.suite(suite)
        if any(evidence.metric(suite, p.id, s, "gpu_us", regime) for s in evidence.subjects)
    ]
    return str(sum(evidence.conclusive(suite, p.id, regime) == wanted for p in problems))


def _places(evidence: Evidence) -> str:
    """Whether a process has a burst of each subject, the A/A twin among them, in every place."""
    ran = {subject for _, subject in evidence.all_of("grid", "gpu_us", "sustained")}
    bursts = evidence.measuring(SUSTAINED).get("sustained_bursts", 0)
    return "every" if bursts >= len(ran | {f"{REFERENCE_PEER}#2"}) else "not every"


def _event_gap(evidence: Evidence, subjects: Sequence[str]) -> Value | None:
    gaps = []
    for problem in evidence.suite("grid"):
        for name in subjects:
            event = evidence.metric("grid", problem.id, name, "event_us", "spaced")
            gpu = evidence.metric("grid", problem.id, name, "gpu_us", "spaced")
            if event and gpu:
                gaps.append(event.value - gpu.value)
    return Value(median(gaps)) if gaps else None


def numbers(evidence: Evidence) -> dict[str, str]:
    """Macro names and their LaTeX text."""
    found: dict[str, str] = {}
    provenance, content = evidence.provenance, evidence.provenance["content"]
    measuring = dict(content["measuring"])
    bursts = evidence.measuring(SUSTAINED)
    measuring |= {name: bursts[name] for name in bursts if name.startswith("sustained")}
    top = evidence.top

    def put(text_of: str, *words: str) -> None:
        found[macro(*words)] = text_of

    put(escape(evidence.stamp), "stamp")
    put(escape(content["gpu"]), "gpu")
    put(escape(provenance["run"]), "run id")
    put(escape(provenance["commit"][:12]), "commit")
    put(escape(provenance["image_digest"] or "none (native)"), "image")
    put("".join(
        f"; added from run {escape(run['run'])} of {run['started'][:10]}, commit"
        rf" \texttt{{{run['commit'][:12]}}}: {escape(', '.join(run['files']))}"
        for run in provenance.get("addenda", [])
    ), "added runs")  # fmt: skip
    lost = [escape(again) for again in evidence.failed_checks()]
    failed = f" Of the recorded checks these failed: {'; '.join(lost)}."
    put(failed if lost else "", "failed checks")
    put(escape(provenance["started"][:10]), "started")
    for name in ("driver", "cuda", "torch", "triton", "ncu"):
        put(escape(str(content[name] or "absent")), name, "version")
    for name in ("processes", "rounds", "gap_us", "max_attempts", "host_calls",
                 "flush_l2_factor", "sustained_ms", "sustained_bursts",
                 "sustained_preheat_ms"):  # fmt: skip
        put(f"{measuring[name]:g}" if name in measuring else MISSING, "measuring", name)
    put(f"{100 * measuring.get('aa_tolerance', 0.01):g}", "measuring tolerance percent")
    put(str(len(evidence.suite("grid"))), "grid problems")
    again = evidence.replications
    put(str(len({row["run"] for row in again})), "replication runs")
    put(str(len({row["gpu_uuid"] for row in again} - {r["recorded_gpu_uuid"] for r in again})),
        "replication boards")  # fmt: skip
    put(str(len(again)), "replication ratios")
    put(str(sum(row["verdict"] == "PASS" for row in again)), "replication passed")
    decide = [row for row in again if row["verdict"] != "AMBIGUOUS"]
    for column, word in (("change", "suite"), ("most_change", "problem")):
        moved = [abs(float(row[column])) for row in decide if row[column]]
        worst = Value(100 * max(moved)) if moved else None
        put(text(worst, 2), "replication worst", word, "percent")
    put(_replicated(evidence), "replicated")
    put(top[-1], "top stage")
    for regime in ("spaced", "sustained"):
        put(_count(evidence, "grid", regime, True), "conclusive", regime)
        put(_count(evidence, "grid", regime, False), "inconclusive", regime)
        put(text(_worst(evidence, "aa_ratio", regime), 2), "aa worst", regime)
        put(evidence.attempts("grid", regime) or MISSING, "attempts", regime)
        for peer in (REFERENCE_PEER, "cudnn", "fa4", BEST):
            for name, word in ((MEDIAN, "median"), (MINIMUM, "least")):
                ratio = evidence.speedup("grid", name, top, peer, regime)
                put(with_interval(ratio, 3), "top over", peer, word, regime)
    fa4 = evidence.speedup("grid", MEDIAN, top, "fa4")
    put(str(int(fa4 is not None)), "fa4 measured")
    put(escape(of_sustained(evidence)), "sustained record")
    put(_places(evidence), "burst places")
    sustained = evidence.speedup("grid", MEDIAN, top, REFERENCE_PEER, "sustained")
    put(str(int(sustained is not None)), "sustained measured")
    fp16 = evidence.speedup("grid_fp16", MEDIAN, top, "cudnn")
    put(str(int(fp16 is not None)), "half measured")
    put(with_interval(fp16, 3), "top over cudnn half median")
    times = over_bf16(evidence)
    put(str(int(bool(times))), "half beside bf measured")
    put(text(Value(median(times)) if times else None, 3), "half over bf median")
    put(text(Value(max(times)) if times else None, 3), "half over bf most")
    wide = evidence.suite("grid256")
    ran = {problem for problem, _ in evidence.all_of("grid256", "gpu_us", "spaced")}
    put(str(int(bool(ran))), "wide measured")
    put(str(sum(p.id in ran for p in wide)), "wide problems")
    for peer in (REFERENCE_PEER, "cudnn"):
        for name, word in ((MEDIAN, "median"), (MINIMUM, "least")):
            ratio = evidence.speedup("grid256", name, top, peer)
            put(with_interval(ratio, 3), "top over", peer, "wide", word)
    found |= _left(evidence) | _half(evidence)
    runs = evidence.identical_runs(top)
    put(text(runs and Value(runs[0]), 0), "top identical runs")
    put(str(runs[1]) if runs else MISSING, "top identical problems")
    for name in known_of("stage", "peer"):
        put(text(evidence.metric("gate", GATE, name, "tflops", "spaced"), 0), name, "gate tflops")
        put(with_interval(evidence.speedup("gate", GATE, name, "fa3"), 3), name, "gate ratio")
        gpu = evidence.metric("gate", GATE, name, "timed_kernels", "spaced")
        put(text(gpu, 0), name, "kernels")
    put(text(evidence.metric("gate", GATE, top, "timed_kernels", "spaced"), 0), "top kernels")
    for stage_number in (2, 3, 4, 5):
        name, before = f"stage{stage_number}", f"stage{stage_number - 1}"
        for suite in ("gate", "grid"):
            put(
                with_interval(evidence.speedup(suite, MEDIAN, name, before), 3), name, "gain", suite
            )
    for metric in ("inactive_threads", "predicated_off", "idle_sm_cycles", "stall_barrier",
                   "samples_cta_barrier", "samples_named_barrier", "samples_wgmma",
                   "samples_mbarrier", "cta_barrier_cycles", "named_barrier_cycles",
                   "stall_memory", "samples_memory", "tensor_pipe", "dram_throughput",
                   "masked_work", "issue_slots", "xu_pipe"):  # fmt: skip
        digits = 2 if metric.startswith(("inactive", "samples_cta")) else 1
        for name in ("fa3", top):
            who = "top" if name == top else name
            put(text(_median_of(evidence, name, metric), digits), who, metric)
            for causal, part in ((True, "causal"), (False, "full")):
                found_in = _median_of(evidence, name, metric, causal)
                put(text(found_in, digits), who, metric, part)
    put(evidence.counter_problems, "counter problems")
    put(escape(evidence.counters), "counter sentence")
    put(str(int(evidence.counter_suite() == "grid")), "grid counted")
    put(_claimed(evidence, "launch", "launch_share", "gate"), "launch claimed")
    put(_claimed(evidence, "memory", "stall_memory", evidence.counter_suite()), "memory claimed")
    for name in ("fa3", "stage3", top):
        who = "top" if name == top else name
        for metric in ("launch_share", "launch_share_graph"):
            put(text(evidence.metric("gate", "gate-b32", name, metric), 1), who, metric)
        eager = evidence.metric("gate", "gate-b32", name, "per_sequence_eager")
        gpu = evidence.metric("gate", "gate-b32", name, "per_sequence_gpu", "spaced")
        put(text(eager, 2), who, "per sequence eager")
        put(text(gpu, 2), who, "per sequence gpu")
    eager = evidence.metric("gate", "gate-b32", "stage3", "eager_gain")
    put(with_interval(eager, 2), "stage3 eager gain")
    put(
        with_interval(evidence.speedup("gate", "gate-b32", "stage3", "stage2"), 2),
        "stage3 gpu gain",
    )
    for hypothesis in evidence.constraints.hypotheses:
        if hypothesis.role == "ablation":
            put(f"{hypothesis.threshold:.2f}", "claim", hypothesis.id)
    put(text(_event_gap(evidence, evidence.subjects), 1), "event gap")
    put(escape(evidence.closed("ncu/control.json").strip()), "controls closed")
    for name in evidence.constraints.constraints:
        put(_verdict(evidence, name).lower(), "verdict", name)
        put(agreement(evidence, name), "agreement", name)
    for name, unit in (("copy_bytes_per_s", 1e12), ("bf16_matmul_flops_per_s", 1e12)):
        value = provenance["ceilings"][name]["value"] / unit
        put(f"{value:.2f}" if value < 100 else f"{value:.0f}", "ceiling", name.split("_")[0])
    put(evidence.constraints.sha256[:16], "constraints hash")
    confirmatory = provenance["constraints_sha256"] == [evidence.constraints.sha256]
    put("confirmatory" if confirmatory else "post hoc", "confirmatory")
    put(str(len(provenance["stale"])), "stale count")
    for name, target in predict.TARGET.items():
        errors = evidence.prediction_errors("grid", name)
        percent = Value(100 * predict.off(errors)) if errors else None
        put(text(percent, 1, r"\,\%"), name, "prediction off")
        errors = evidence.repetition_errors("grid", name)
        percent = Value(100 * predict.off(errors)) if errors else None
        put(text(percent, 1, r"\,\%"), name, "repetition off")
        put(f"{100 * target:.0f}", "prediction target percent")
    put(evidence.prediction_status, "prediction status")
    return found | _host(evidence) | _in_use(evidence)


def _left(evidence: Evidence) -> dict[str, str]:
    """The macros of problems that leave the top stage little to gain, or on which it gains least,
    without a mask and with one."""
    found: dict[str, str] = {}
    top = evidence.top
    for length, seqlen in (("long", 8192), ("short", 512)):
        for mask in ("full", "causal"):
            problem = evidence.problems[f"grid-d128-{mask}-s{seqlen}"]
            found |= _counters(evidence, problem, f"{length} {mask}")
    for causal, mask in ((False, "full"), (True, "causal")):
        ratios = [
            ratio.value
            for p in evidence.suite("grid256")
            if p.causal == causal and evidence.conclusive("grid256", p.id)
            if (ratio := evidence.speedup("grid256", p.id, top, REFERENCE_PEER))
        ]
        middle = Value(median(ratios)) if ratios else None
        found[macro("wide", mask, "over", REFERENCE_PEER)] = text(middle, 2)
    return found


def _counters(evidence: Evidence, problem: Problem, name: str) -> dict[str, str]:
    """The macros of how fast the top stage is on a problem of the grid, and of what is busy."""
    top = evidence.top
    found = {
        macro(name, "over", REFERENCE_PEER): with_interval(
            evidence.speedup("grid", problem.id, top, REFERENCE_PEER), 3
        )
    }
    for metric, digits in (("tensor_pipe", 1), ("idle_sm_cycles", 1), ("dram_throughput", 1),
                           ("profiled_clock", 0)):  # fmt: skip
        found[macro(name, metric)] = text(evidence.anywhere(problem, top, metric), digits)
    copied = evidence.anywhere(problem, top, "tma_bytes")
    found[macro(name, "copied megabytes")] = text(copied and Value(copied.value / 1e6), 0)
    least = evidence.roofline(problem, top)
    found[macro(name, "limit")] = escape(least.limit) if least else MISSING
    tiles = predict.tiles(top, problem)
    rounds = problem.batch * problem.nheads * problem.seqlen_q / tiles.rows
    rounds /= evidence.provenance["properties"]["sms"]
    found[macro(name, "rounds")] = text(Value(rounds), 1)
    return found


def _half(evidence: Evidence) -> dict[str, str]:
    """The macros of time in fp16 over time in bf16, by head dimension: percent more, in the
    median."""
    found = {}
    for name in (evidence.top, "cudnn"):
        times = evidence.all_of("grid_fp16", "over_bf16", "spaced")
        for headdim in (64, 128):
            more = [
                100 * (value.value - 1)
                for (problem, subject), value in times.items()
                if subject == name and evidence.problems[problem].headdim == headdim
            ]
            who = "top" if name == evidence.top else name
            words = (who, "half more", "wide" if headdim == 128 else "narrow")
            found[macro(*words)] = text(Value(median(more)) if more else None, 1)
    return found


def _in_use(evidence: Evidence) -> dict[str, str]:
    """The macros of decoding and of the model; `...Measured` is 1 where there is something."""
    found: dict[str, str] = {}

    def put(text_of: str, *words: str) -> None:
        found[macro(*words)] = text_of

    suite, ours = in_use.SUITE, tidy_serving.OURS
    timed = [subject for _, subject in evidence.all_of(suite, "gpu_us")]
    put(str(int(ours in timed)), "decode measured")
    for name, word in (
        (tidy_serving.SMALL, "small"), (tidy_serving.LARGE, "large"), (MINIMUM, "least"),
    ):  # fmt: skip
        ratio = evidence.speedup(suite, name, ours, REFERENCE_PEER)
        put(with_interval(ratio, 3), "decode over", REFERENCE_PEER, word)
        clean = evidence.speedup(suite, name, ours, REFERENCE_PEER, tidy_serving.CLEAN)
        if name != tidy_serving.SMALL:
            put(with_interval(clean, 3), "decode clean", word)
            put(str(int(clean is not None)), "decode clean", word, "measured")
    pages = evidence.speedup(suite, MINIMUM, ours, tidy_serving.CONTIGUOUS)
    put(with_interval(pages, 3), "decode pages least")
    for name in ("right", "wrong"):
        checks = evidence.metric(suite, tidy_serving.CHECKS, ours, f"checks_{name}")
        put(text(checks, 0), "decode checks", name)
    shares = [
        value.value
        for problem, _ in in_use.shapes(evidence)
        if tidy_serving.kv_bytes(problem) > 1e9
        and (value := evidence.metric(suite, problem.id, ours, "of_copy", "spaced"))
    ]
    put(text(Value(min(shares)) if shares else None, 0), "decode of copy least")
    model, library = tidy_serving.MODEL, "attn_ladder"
    every = evidence.metric(model, tidy_serving.TOKENS, library, "token_agreement")
    put(str(int(every is not None)), "model measured")
    put(text(every and Value(100 * every.value), 1), "token agreement percent")
    for name in ("prompts", "ties", "differences"):
        count = evidence.metric(model, tidy_serving.TOKENS, library, f"token_{name}")
        put(text(count, 0), "token", name)
    control = evidence.metric(model, tidy_serving.TOKENS, "sdpa", "token_agreement")
    put(str(int(control is not None)), "token control")
    for dtype, format_word in (("bf16", "bfloat"), ("fp16", "half")):
        for subject, word in ((library, "ours"), ("sdpa", "references")):
            whole = f"{tidy_serving.TOKENS}, {dtype}"
            share = evidence.metric(model, whole, subject, "token_agreement")
            put(text(share and Value(100 * share.value), 1), "tokens", format_word, word, "percent")
    for name in ("cache_bytes", "expanded_bytes"):
        sizes = [value.value / 1e6 for value in evidence.all_of(model, name).values()]
        put(text(Value(sizes[0]) if sizes else None, 0), name.split("_")[0], "megabytes")
    return found


def render(found: dict[str, str]) -> str:
    """The macros as LaTeX source, sorted."""
    return "".join(f"\\newcommand{{{name}}}{{{found[name]}}}\n" for name in sorted(found))


def main(
    out: Annotated[Path, typer.Option("--out")],
    results: Annotated[Path, typer.Option("--results")] = Path("results"),
    problems: Annotated[Path, typer.Option("--problems")] = Path("config/problems.tsv"),
    constraints: Annotated[Path, typer.Option("--constraints")] = Path("config/constraints.yaml"),
) -> None:
    """Write numbers.tex."""
    write_text(out, render(numbers(load(results, problems, constraints))))


if __name__ == "__main__":
    typer.run(main)
