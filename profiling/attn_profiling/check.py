"""The gate: which subject is right on which problem. What fails it is neither timed nor profiled.

The rule is that of FA3's own tests: the error against an fp32 reference may be at most twice that
of PyTorch in the input's precision, plus a rounding term. Each subject is called three times on
fresh random inputs, into memory full of NaN: on one set, on new values in the same buffers, and on
the first values at other addresses (for what is made here, views with other strides and NaN around
them). So an output that is unwritten, kept from the call before, or computed from inputs seen
earlier is found.

On the problems of REPEATED a stage also runs REPEATS times on the same inputs, and all runs must
give the same bits. So must calls on two streams in turn and replays of a CUDA graph (`elsewhere`).

On a large problem the fp32 comparison covers a sample of (batch, head) pairs, the first and the
last among them; every element must be finite, and all other pairs must agree with PyTorch's SDPA.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from attn_ladder.problem import Problem
from attn_ladder.stage import subject as known_subject
from attn_profiling.elsewhere import CannotCapture, bits, in_graph, on_streams
from attn_profiling.guard import Guard, poison_recycled, poisoned
from attn_profiling.inputs import Tensors, draw, grown, strided
from attn_profiling.machine import Machine
from attn_profiling.record import (
    Record,
    problem_fields,
    problem_of,
    read,
    stale,
    stale_problem,
    write,
)
from attn_profiling.session import Session
from attn_profiling.settings import Settings
from attn_profiling.workers import Reporter, Worker, WorkerDied

LONG = 4096
FULL_HEADS = 32  # (batch, head) pairs up to which all are compared; beyond LONG queries a sample
SAMPLED_HEADS, LONG_SAMPLED_HEADS = 6, 3  # of more pairs, up to LONG queries and beyond
ELSEWHERE = 3.0  # how many bounds another head may be away from SDPA, which errs itself
REPEATED = "variant"  # the suite, a few problems of every kind, on which runs are compared
REPEATS = 1000
QUEUED = 50  # of them between two looks at the result
RTOL, ATOL = 1e-3, 2e-3  # the plan's own criterion, recorded beside the stricter rule
LSE_BOUND = 1e-3  # natural log; scores and sums are fp32 in every subject
SILENCE_S = 240.0
PATIENCE, PATIENCE_S = 12, 10.0  # waits for memory that others hold, and how long about
AT_ONCE = max(1, min(8, (os.cpu_count() or 2) // 2))


@dataclass(frozen=True)
class Verdict:
    """What comparing one output gave. `message` is None where it is right.

    `unit_error` is the largest error on inputs of unit scale. `unit_share` is the largest error
    over bound of such inputs, `unit_reference_error` and `unit_bound` are PyTorch's error and the
    bound there. `allclose` says whether an fp16 output of such inputs is close to PyTorch's SDPA on
    all heads, within `RTOL` and `ATOL`.
    """

    message: str | None
    max_error: float | None
    reference_error: float | None
    bound: float | None
    lse_error: float | None
    unit_error: float | None = None
    allclose: bool | None = None
    unit_reference_error: float | None = None
    unit_bound: float | None = None
    unit_share: float | None = None


def sdpa_can(problem: Problem) -> bool:
    """Whether PyTorch's SDPA computes a problem: it aligns causal masks top-left."""
    return not problem.causal or problem.seqlen_q == problem.seqlen_k


def sampled_heads(problem: Problem, seed: int) -> list[tuple[int, int]] | None:
    """(batch, head) pairs that are compared with the fp32 reference; None means all of them."""
    pairs = problem.batch * problem.nheads
    most, count = FULL_HEADS, SAMPLED_HEADS
    if problem.seqlen_q > LONG:
        most = count = LONG_SAMPLED_HEADS
    if pairs <= most or not sdpa_can(problem):
        return None
    chosen = random.Random(seed).sample(range(1, pairs - 1), count - 2)
    return [divmod(i, problem.nheads) for i in sorted({0, pairs - 1, *chosen})]


class Oracle:
    """What is right on one set of inputs; computed once, asked for many outputs."""

    def __init__(
        self,
        torch: Any,
        problem: Problem,
        inputs: Tensors,
        heads: list[tuple[int, int]] | None,
        unit_scale: bool = True,
    ) -> None:
        from attn_ladder.reference import attention_reference, rounding_term

        self._torch = torch
        self._problem = problem
        self._heads = heads
        pairs = heads or [(b, h) for b in range(problem.batch) for h in range(problem.nheads)]
        group = problem.nheads // problem.nheads_k
        self._outs, self._lses = [], []
        own, rounding = 0.0, 0.0
        for b, h in pairs:
            q = inputs[0][b : b + 1, :, h : h + 1]
            k, v = (t[b : b + 1, :, h // group : h // group + 1] for t in inputs[1:])
            out, lse = attention_reference(q, k, v, causal=problem.causal)
            low, _ = attention_reference(q, k, v, causal=problem.causal, upcast=False)
            own = max(own, (low.float() - out).abs().max().item())
            rounding = max(rounding, rounding_term(out.to(low.dtype)))
            self._outs.append(out[0, :, 0])
            self._lses.append(lse[0, 0])
        self._pairs = pairs
        self.reference_error = own
        self.bound = 2.0 * own + rounding
        self._unit_scale = unit_scale
        compared = heads is not None or (problem.dtype == "fp16" and sdpa_can(problem))
        self._sdpa = self._everywhere(inputs) if unit_scale and compared else None

    def _everywhere(self, inputs: Tensors) -> Any:
        """SDPA's memory-efficient backend, which is none of the subjects, on all heads."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        group = self._problem.nheads // self._problem.nheads_k
        q, k, v = inputs
        if group > 1:
            k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            out = self._torch.nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                is_causal=self._problem.causal,
            )
        return out.transpose(1, 2)

    def judge(self, out: Any, lse: Any) -> Verdict:
        """Compare an output with what is right."""
        problem = self._problem
        message = self._wrong_form(out, lse)
        if message is not None:
            return Verdict(message, None, self.reference_error, self.bound, None)
        error = max(
            (out[b, :, h].float() - expected).abs().max().item()
            for (b, h), expected in zip(self._pairs, self._outs, strict=True)
        )
        lse_error = None
        if lse is not None:
            lse_error = max(
                self._lse_error(lse[b, h].float(), expected)
                for (b, h), expected in zip(self._pairs, self._lses, strict=True)
            )
        if not error <= self.bound:
            message = (
                f"error {error:.3g} against the fp32 reference exceeds {self.bound:.3g} (2 x"
                f" {self.reference_error:.3g} of PyTorch in {problem.dtype}, plus rounding)"
            )
        elif lse_error is not None and not lse_error <= LSE_BOUND:
            message = f"log-sum-exp is off by {lse_error:.3g}, more than {LSE_BOUND:g}"
        elif self._sdpa is not None and self._heads is not None:
            away = (out - self._sdpa).abs().amax(dim=(1, 3)).float()
            if not away.max().item() <= ELSEWHERE * self.bound:
                b, h = divmod(int(away.argmax()), problem.nheads)
                message = (
                    f"batch {b} head {h} is {away.max().item():.3g} away from PyTorch's SDPA,"
                    f" more than {ELSEWHERE:g} x {self.bound:.3g}"
                )
        close = None
        if self._sdpa is not None and problem.dtype == "fp16":
            close = self._torch.allclose(out, self._sdpa, rtol=RTOL, atol=ATOL)
        found = Verdict(message, error, self.reference_error, self.bound, lse_error, allclose=close)
        if not self._unit_scale:
            return found
        return replace(
            found,
            unit_error=error,
            unit_reference_error=self.reference_error,
            unit_bound=self.bound,
            unit_share=error / self.bound if self.bound else None,
        )

    def _wrong_form(self, out: Any, lse: Any) -> str | None:
        problem = self._problem
        shape = (problem.batch, problem.seqlen_q, problem.nheads, problem.headdim)
        if tuple(out.shape) != shape:
            return f"out has shape {tuple(out.shape)}, expected {shape}"
        expected = str(out.dtype).removeprefix("torch.")
        if expected != {"bf16": "bfloat16", "fp16": "float16"}[problem.dtype]:
            return f"out has dtype {expected}, expected that of q ({problem.dtype})"
        unwritten = int((~self._torch.isfinite(out)).sum().item())
        if unwritten:
            return (
                f"{unwritten} of {out.numel()} elements of out are not finite: left unwritten"
                " (the memory was full of NaN) or overflowed"
            )
        if lse is None:
            return None
        rows = (problem.batch, problem.nheads, problem.seqlen_q)
        if tuple(lse.shape) != rows or lse.dtype != self._torch.float32:
            return f"lse is {tuple(lse.shape)} {lse.dtype}, expected {rows} in fp32"
        if self._torch.isnan(lse).any().item():
            return "lse holds NaN: left unwritten (the memory was full of NaN) or overflowed"
        return None

    def _lse_error(self, found: Any, expected: Any) -> float:
        torch = self._torch
        empty = torch.isneginf(expected)
        if not torch.equal(torch.isneginf(found), empty):
            return float("inf")
        difference = torch.where(empty, torch.zeros_like(expected), found - expected)
        return float(difference.abs().max().item())


Forward = Callable[..., tuple[Any, Any]]


def check_subject(
    torch: Any, problem: Problem, forward: Forward, seed: int, device: str, views: bool = False
) -> Verdict:
    """Call a subject four times on fresh inputs and judge each; the first fault is told.

    With `views` those of the third call are not contiguous. The inputs of the last call make scores
    grow along a row, which trips guarded fast paths.
    """
    heads = sampled_heads(problem, seed)
    first = draw(torch, problem, seed, device)
    second = draw(torch, problem, seed + 1, device)
    buffers: Tensors = (first[0].clone(), first[1].clone(), first[2].clone())
    # (what is in the buffers, inputs of the call, what to say before a fault)
    before = Oracle(torch, problem, first, heads)
    verdict = _call(torch, problem, forward, buffers, before, "")
    if verdict.message is None and not _same(torch, buffers, first):
        return _with(verdict, "the call changed its inputs")
    if verdict.message is None:
        for buffer, values in zip(buffers, second, strict=True):
            buffer.copy_(values)
        after = Oracle(torch, problem, second, heads)
        again = _call(
            torch, problem, forward, buffers, after, "on new values in the same buffers: "
        )
        verdict = _worse(verdict, again)
    if verdict.message is None:
        if views:
            first, when = strided(first), "on inputs with other strides: "
        else:
            when = "on inputs at other addresses: "
        moved = _call(torch, problem, forward, first, before, when)
        verdict = _worse(verdict, moved)
    if verdict.message is None:
        large = grown(second)
        oracle = Oracle(torch, problem, large, heads, unit_scale=False)
        when = "on scores that grow along a row: "
        verdict = _worse(verdict, _call(torch, problem, forward, large, oracle, when))
    return verdict


def repeated(
    torch: Any, problem: Problem, forward: Forward, seed: int, device: str, runs: int
) -> int:
    """How many of `runs` calls on the same inputs gave the bits of the first, until one did not."""
    inputs = draw(torch, problem, seed, device)
    first = forward(*inputs, causal=problem.causal)
    differs = torch.zeros(runs, dtype=torch.bool, device=device)  # read now and then: no waiting
    for run in range(1, runs):
        again = forward(*inputs, causal=problem.causal)
        for a, b in zip(first, again, strict=True):
            if a is not None:
                differs[run] |= (bits(torch, a) != bits(torch, b)).any()
                b.fill_(float("nan"))  # the next call may get this memory, and leave a tile out
        if (run % QUEUED == 0 or run + 1 == runs) and bool(differs.any()):
            return int(differs.int().argmax())
    return runs


@dataclass(frozen=True)
class Elsewhere:
    """Whether calls on two streams and replays of a CUDA graph gave the bits of a call alone.

    `message` is None where both did; `fatal` says that the process is to be given up.
    """

    streams: bool | None = None
    graph: bool | None = None
    message: str | None = None
    fatal: bool = False


NOWHERE = Elsewhere()


def elsewhere(torch: Any, problem: Problem, forward: Forward, seed: int) -> Elsewhere:
    """Call a subject on two new streams and in a CUDA graph."""
    inputs = draw(torch, problem, seed, "cuda")
    call = partial(forward, *inputs, causal=problem.causal)
    machine = Machine(torch, 0.0)  # it flushes nothing here
    streams = [torch.cuda.stream(torch.cuda.Stream()) for _ in range(2)]
    on_two = on_streams(torch, call, streams, machine.synchronize)
    gc.collect()  # these two as `torch.cuda.graph` does: under capture little may be freed
    torch.cuda.empty_cache()
    fatal = False
    try:
        graph = in_graph(torch, call, machine.capture, machine.synchronize)
    except CannotCapture as error:
        graph, fatal = str(error), True
    told = [fault for fault in (on_two, graph) if fault is not None]
    return Elsewhere(on_two is None, graph is None, "; ".join(told) or None, fatal)


def _call(
    torch: Any, problem: Problem, forward: Forward, inputs: Tensors, oracle: Oracle, when: str
) -> Verdict:
    lse_like = torch.empty(problem.batch, problem.nheads, problem.seqlen_q, device=inputs[0].device)
    poison_recycled(torch, [inputs[0], lse_like], copies=3)
    del lse_like
    with poisoned(torch):
        out, lse = forward(*inputs, causal=problem.causal)
    verdict = oracle.judge(out, lse)
    return verdict if verdict.message is None else _with(verdict, when + verdict.message)


def _with(verdict: Verdict, message: str) -> Verdict:
    return replace(verdict, message=message)


def _worse(a: Verdict, b: Verdict) -> Verdict:
    """The failing one, else the one with the larger error; what is of unit scale from both."""
    worse = b if b.message is not None or (b.max_error or 0.0) > (a.max_error or 0.0) else a
    errors = [v.unit_error for v in (a, b) if v.unit_error is not None]
    close = [v.allclose for v in (a, b) if v.allclose is not None]
    nearest = max((a, b), key=lambda v: -1.0 if v.unit_share is None else v.unit_share)
    return replace(
        worse,
        unit_error=max(errors, default=None),
        allclose=all(close) if close else None,
        unit_reference_error=nearest.unit_reference_error,
        unit_bound=nearest.unit_bound,
        unit_share=nearest.unit_share,
    )


def _same(torch: Any, a: Iterable[Any], b: Iterable[Any]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def explain(error: BaseException) -> str:
    """One line of an exception, with what to do where that is known."""
    kind = type(error).__name__
    text = " ".join(str(error).split())[:400]
    if kind == "OutOfMemoryError":
        return f"out of GPU memory: {text}; end other programs on the GPU, or drop this problem"
    return f"{kind}: {text}"


def others_hold_memory(torch: Any) -> bool:
    """Whether other processes, such as checks of other subjects, hold much of the GPU's memory."""
    free, total = torch.cuda.mem_get_info()
    return bool(total - free - torch.cuda.memory_reserved() > total / 10)


def patiently(
    check: Callable[[], Any], crowded: Callable[[], bool], wait: Callable[[], None]
) -> Any:
    """What `check` returns; where it runs out of GPU memory that others hold, it is tried again,
    at most PATIENCE times, after a wait in which nothing of the failed attempt is alive."""
    for _ in range(PATIENCE):
        try:
            return check()
        except Exception as error:
            if type(error).__name__ != "OutOfMemoryError" or not crowded():
                raise
        wait()
    return check()


def poisons_process(error: BaseException) -> bool:
    """Whether CUDA is unusable after it in this process."""
    text = str(error)
    return type(error).__name__ != "OutOfMemoryError" and (
        "CUDA error" in text or "CUDNN_STATUS" in text or "device-side assert" in text
    )


def result(
    problem: Problem,
    subject: str,
    status: str,
    message: str | None,
    verdict: Verdict | None = None,
    heads: list[tuple[int, int]] | None = None,
    seconds: float | None = None,
    identical_runs: int | None = None,
    other: Elsewhere = NOWHERE,
    views: bool = False,
) -> dict[str, Any]:
    """One row of a check record. A number that is not finite stands as null."""

    def number(value: float | None) -> float | None:
        return value if value is not None and abs(value) < float("inf") else None

    return {
        "problem": problem_fields(problem),
        "subject": subject,
        "ok": status == "ok",
        "status": status,
        "message": message,
        "max_error": number(verdict.max_error) if verdict else None,
        "reference_error": number(verdict.reference_error) if verdict else None,
        "bound": number(verdict.bound) if verdict else None,
        "lse_error": number(verdict.lse_error) if verdict else None,
        "unit_error": number(verdict.unit_error) if verdict else None,
        "unit_reference_error": number(verdict.unit_reference_error) if verdict else None,
        "unit_bound": number(verdict.unit_bound) if verdict else None,
        "unit_share": number(verdict.unit_share) if verdict else None,
        "allclose": verdict.allclose if verdict else None,
        "heads": [list(pair) for pair in heads] if heads else None,
        "strided": views if verdict else None,
        "identical_runs": identical_runs,
        "streams": other.streams,
        "graph": other.graph,
        "seconds": seconds,
    }


def work() -> None:
    """The worker: one subject, the problems it is given, a message before and after each."""
    reporter = Reporter()
    request = reporter.request()
    import torch

    guard = Guard(torch)
    from attn_ladder.stage import load

    subject, seed = request["subject"], request["seed"]
    problems = [problem_of(fields) for fields in request["problems"]]
    try:
        module = load(subject)
    except Exception as error:  # a peer that is not installed, a stage that does not parse
        for problem in problems:
            reporter.send(result=result(problem, subject, "error", explain(error)))
        return

    views = known_subject(subject).kind in ("stage", "variant")

    def judged(problem: Problem) -> Verdict:
        with torch.inference_mode():
            return check_subject(torch, problem, module.forward, seed, "cuda", views)

    def runs(problem: Problem) -> int:
        with torch.inference_mode():
            return repeated(torch, problem, module.forward, seed, "cuda", REPEATS)

    def calls_elsewhere(problem: Problem) -> Elsewhere:
        with torch.inference_mode():
            return elsewhere(torch, problem, module.forward, seed)

    def rest(problem: Problem) -> None:
        torch.cuda.empty_cache()  # what the failed attempt held is free only now
        reporter.send(begin=problem.id)  # so that nobody takes the wait for a hang
        time.sleep(PATIENCE_S * (0.5 + random.random()))

    def patient(check: Callable[[Problem], Any], problem: Problem) -> Any:
        return patiently(
            partial(check, problem), partial(others_hold_memory, torch), partial(rest, problem)
        )

    for problem in problems:
        reporter.send(begin=problem.id)
        started = time.perf_counter()
        status, message, verdict, identical = "ok", None, None, None
        other, fatal = NOWHERE, False
        try:
            reason = module.unsupported(problem, tuple(request["capability"]))
            if reason is not None:
                status, message = "unsupported", reason
            else:
                verdict = patient(judged, problem)
                torch.cuda.synchronize()
                guard.verify()
                if verdict.message is not None:
                    status, message = "failed", verdict.message
                elif problem.id in request["repeated"]:
                    identical = patient(runs, problem)
                    guard.verify()
                    if identical < REPEATS:
                        status = "failed"
                        message = f"run {identical + 1} on the same inputs gave other bits"
                    else:
                        other = patient(calls_elsewhere, problem)
                        guard.verify()
                        fatal = other.fatal
                        if other.message is not None:
                            status, message = "failed", other.message
        except Exception as error:
            status, message, fatal = "error", explain(error), poisons_process(error)
        heads = sampled_heads(problem, seed) if verdict is not None else None
        seconds = round(time.perf_counter() - started, 3)
        reporter.send(
            result=result(
                problem, subject, status, message, verdict, heads, seconds, identical, other, views
            )
        )
        if fatal:
            return
        torch.cuda.empty_cache()


Tell = Callable[[str], None]


def to_repeat(name: str, problems: list[Problem]) -> list[str]:
    """Ids of the problems on which a subject's runs are compared with each other."""
    if known_subject(name).kind != "stage":
        return []
    return [p.id for p in problems if REPEATED in p.suites]


def check_one(
    subject: str,
    problems: list[Problem],
    capability: tuple[int, int],
    seed: int,
    log: Path,
    environment: Mapping[str, str],
    tell: Tell,
    silence_s: float = SILENCE_S,
) -> list[dict[str, Any]]:
    """Check one subject in workers of its own: a crash or a hang costs the problem it met."""
    results: dict[str, dict[str, Any]] = {}
    while True:
        todo = [p for p in problems if p.id not in results]
        if not todo:
            return [results[p.id] for p in problems]
        worker = Worker("check", [], log, environment)
        current = todo[0]
        try:
            worker.begin(
                {
                    "subject": subject,
                    "seed": seed,
                    "capability": list(capability),
                    "repeated": to_repeat(subject, todo),
                    "problems": [problem_fields(p) for p in todo],
                }
            )
            for message in worker.messages(silence_s):
                if "begin" in message:
                    current = next(p for p in todo if p.id == message["begin"])
                else:
                    found = message["result"]
                    results[found["problem"]["id"]] = found
                    tell(f"{subject} {found['problem']['id']}")
        except WorkerDied as error:
            if current.id not in results:
                results[current.id] = result(current, subject, "error", str(error))
                tell(f"{subject} {current.id}")
        else:
            if current.id not in results:
                results[current.id] = result(
                    current, subject, "error", "the worker ended without a result"
                )
                tell(f"{subject} {current.id}")
        finally:
            worker.close()


def run(settings: Settings, suite: str, out: Path) -> Record:
    """Check every subject on every problem of a suite and write the record."""
    from attn_profiling.progress import progress

    problems = settings.suite(suite)
    subjects = settings.subjects_of(suite, "check")
    session = Session(settings, subjects)
    capability = session.gpu.capability
    seed = settings.measuring.seed
    logs = out.parent / ".partial" / f"{suite}.logs"
    with progress(f"check {suite}", len(problems) * len(subjects)) as tell:
        with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
            done = pool.map(
                lambda name: check_one(
                    name,
                    problems,
                    capability,
                    seed,
                    logs / f"{name}.log",
                    session.environment,
                    tell,
                ),
                subjects,
            )
            results = [row for rows in done for row in rows]
    data = {**session.header("check", suite), "results": results}
    write(out, data, "check")
    return data


class NotChecked(ValueError):
    """A problem or subject has no valid check in this run; the text says which and what to do."""


def gate(
    run_dir: Path, problems: list[Problem], subjects: Iterable[str]
) -> dict[str, dict[str, str | None]]:
    """{problem id: {subject: None if it may be measured, else why not}} from a run's checks.

    Raises `NotChecked` where a pair was never checked, or its kernel or problem changed since.
    """
    rows: dict[tuple[str, str], tuple[Record, dict[str, Any]]] = {}
    for path in sorted((run_dir / "check").glob("*.json")):
        record = read(path, "check")
        for row in record["results"]:
            key = (row["problem"]["id"], row["subject"])
            if key not in rows or not row["ok"]:  # checked in two suites: right in both
                rows[key] = (record, row)
    verdicts: dict[str, dict[str, str | None]] = {}
    for problem in problems:
        verdicts[problem.id] = {}
        for subject in subjects:
            if (problem.id, subject) not in rows:
                raise NotChecked(
                    f"{subject} was not checked on {problem.id} in {run_dir}; run `attn-profiling"
                    f" check` with a suite that has it ({', '.join(problem.suites)})"
                )
            record, row = rows[problem.id, subject]
            reason = stale(record, subject) or stale_problem(
                record, row["problem"], {problem.id: problem}
            )
            if reason is not None:
                raise NotChecked(f"{run_dir}/check is stale: {reason}; run the check again")
            verdicts[problem.id][subject] = (
                None if row["ok"] else f"{row['status']}: {row['message']}"
            )
    return verdicts
