"""The step `serving`: what users call, as part of a run.

`decode` checks decoding and ragged prefill, then times one query token on a KV cache beside FA3's
best configuration, in fresh processes; `model` has a Llama-architecture model run on these kernels
through transformers. The work is that of `serving_check` and `serving_model`, which also run alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from attn_ladder.problem import Problem
from attn_profiling.launches import MeasureError
from attn_profiling.partial import Partial
from attn_profiling.record import Record, content_key, problem_fields, write, write_text
from attn_profiling.session import Session
from attn_profiling.settings import Settings
from attn_profiling.workers import Reporter, Worker, WorkerDied

CHECK_S = 200.0  # of all checks; one that has begun ends
MODEL_S = 400.0
SILENCE_S = 240.0
TRY_ROUNDS = 5  # for each configuration of FA3
FINALISTS, FINAL_ROUNDS = 3, 20  # of these, those timed again, and how often
SEQUENCES = 4  # of a batch that are compared before it is timed
OURS, PEER = "decode", "fa3"
SAMPLES = ("samples", "clean")  # behind a flush that writes, behind one that reads
PEER_BEHIND = {"samples": PEER, "clean": f"{PEER}, clean L2"}  # its name where it is left out
SERIES = ("gpu_us", "sum_us", "event_us", "dry")
LOST = ("illegal memory access", "unspecified launch failure")
NO_MODEL = "not measured: no model named (config key `model`)"


# -- in a worker


def sampled(batch: int) -> list[int]:
    """The sequences of a batch that are compared with the reference: first, last, between."""
    last = batch - 1
    return sorted({round(i * last / max(1, SEQUENCES - 1)) for i in range(SEQUENCES)})


def wrong(out: Any, q: Any, k: Any, v: Any) -> str | None:
    """What is wrong with (batch, 1, nheads, headdim) by the rule of the gate, on a sample of the
    batch; None where it is right."""
    import torch

    from attn_ladder.reference import attention_reference, error_bound

    references, lows, outs = [], [], []
    for b in sampled(q.shape[0]):
        one = [x[b : b + 1] for x in (q, k, v)]
        references.append(attention_reference(*one, causal=True)[0])
        lows.append(attention_reference(*one, causal=True, upcast=False)[0])
        outs.append(out[b : b + 1].float())
    reference, found = torch.cat(references), torch.cat(outs)
    bound, own = error_bound(reference, torch.cat(lows))
    if not bool(found.isfinite().all()):
        return "wrong: out holds NaN or infinity"
    error = (found - reference).abs().max().item()
    if error <= bound:
        return None
    return f"wrong: error {error:.2e}, bound {bound:.2e}, PyTorch's {own:.2e}"


def measure(
    timers: Mapping[str, Any],
    pool: Any,
    module: Any,
    entry: Mapping[str, Any],
    rounds: int,
    seed: int,
) -> dict[str, Any]:
    """Samples of one shape: ours and the peer, each twice, and ours with pages; the former also
    with a clean L2. `timers`: one for each of `SAMPLES`.

    The peer's configuration is chosen behind each flush where the entry names none. What gives a
    wrong result, or none, is left out with the reason.
    """
    import torch

    from attn_profiling import serving_check as sc

    shape = sc.Shape(**entry["shape"])
    q, k, v = pool.inputs(shape, 0)
    left_out: dict[str, str] = {}

    def good(name: str, call: Callable[[int], Any], keys: Any = k, values: Any = v) -> bool:
        try:
            out = call(0)
            out = out[0] if isinstance(out, tuple) else out
            said = wrong(out, q, keys, values)
        except Exception as error:
            if sc._broken(error):
                raise
            said = sc._error(error)
        if said is not None:
            left_out[name] = said
        return said is None

    calls: dict[str, dict[str, Callable[[int], Any]]] = {kind: {} for kind in SAMPLES}
    ours = sc.ours(pool, shape)
    if good(OURS, ours):
        for kind in SAMPLES:
            calls[kind] |= {OURS: ours, f"{OURS}#2": ours}
    for page in entry["pages"]:
        paged = sc.ours(pool, shape, page)
        table = sc.page_table(shape, page).to(k.device)
        size = (-1, page, shape.nheads_k, shape.headdim)
        stored = [x.reshape(size)[table.long()].reshape(x.shape) for x in (k, v)]
        if good(f"p{page}", paged, *stored):
            calls["samples"][f"p{page}"] = paged
        del stored
    chosen, tried = dict(entry["chosen"] or {}), dict[str, list[dict[str, Any]]]()
    if isinstance(module, Exception):
        left_out[PEER] = sc._error(module)
    else:
        for kind, name in PEER_BEHIND.items():
            if not entry["chosen"]:
                chosen[kind], tried[kind] = choose(timers[kind], pool, module, shape)
            if chosen[kind] is None:
                left_out[name] = "none of its configurations runs"
                continue
            peer = sc.fa3(module, pool, shape, chosen[kind])
            if good(name, peer):
                calls[kind] |= {PEER: peer, f"{PEER}#2": peer}
    torch.cuda.empty_cache()
    taken = {
        kind: {
            name: {
                **{key: found[key] for key in ("gpu_us", "sum_us", "event_us")},
                "clock_mhz": found["clock_mhz"],
                "dry": found["dry"],
                "kernels": count(kernel for kernel, _ in found["kernels"]),
            }
            for name, found in timers[kind].measure(calls[kind], rounds, seed).items()
        }
        for kind in SAMPLES
    }
    return {**taken, "chosen": chosen or None, "tried": tried, "left_out": left_out}


def count(names: Any) -> dict[str, int]:
    """How often each name comes."""
    found: dict[str, int] = {}
    for name in names:
        found[name] = found.get(name, 0) + 1
    return found


def choose(
    timer: Any, pool: Any, module: Any, shape: Any
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The peer's fastest configuration of those that run, and all that were tried.

    The fastest few are timed again, longer, before one is chosen.
    """
    from attn_profiling import serving_check as sc

    configs, errors, candidates = sc.fa3_configs(shape), dict[str, str](), {}
    for name, knobs in configs.items():
        try:
            candidates[name] = sc.fa3(module, pool, shape, knobs)
        except Exception as error:
            errors[name] = sc._error(error)
    found = timer.measure(sc.runnable(candidates, errors), TRY_ROUNDS)
    first = sorted(found, key=lambda name: found[name]["median_us"])[:FINALISTS]
    again = timer.measure({n: candidates[n] for n in first}, FINAL_ROUNDS) if first else {}
    us = {name: row["median_us"] for name, row in found.items()}
    final = {name: row["median_us"] for name, row in again.items()}
    tried = [
        {
            "config": knobs,
            "gpu_us": final.get(name, us.get(name)),
            "final": name in final,
            "message": errors.get(name),
        }
        for name, knobs in configs.items()
    ]
    best = min(final, key=final.__getitem__, default=None)
    return (None if best is None else configs[best]), tried


def work(part: str) -> None:
    """The worker: `checks`, or `time` with a message for each shape."""
    reporter = Reporter()
    import torch

    from attn_profiling import serving_check as sc

    request = reporter.request()
    if part == "checks":

        class Told(sc.Report):
            def add(self, part: str, row: dict[str, Any]) -> None:
                super().add(part, row)
                reporter.send(check=row)

        report = Told(None, CHECK_S)
        sc.compile_checks("cuda")
        reporter.send(begin="checks")
        sc.run_checks(report, "cuda", False)
        reporter.send(stopped=report.data["stopped"])
        return
    shapes = [sc.Shape(**entry["shape"]) for entry in request["entries"]]
    timers = {"samples": sc.Timer(), "clean": sc.Timer(clean=True)}
    pool = sc.Pool(shapes, request["dtype"])
    module = sc.fa3_function(request["fa3_module"])
    sc.warm(pool, shapes, True, False)
    copy = sc.copy_bytes_per_s(timers["samples"])
    torch.cuda.empty_cache()
    for entry in request["entries"]:
        reporter.send(begin=entry["id"])
        broken = False
        try:
            result = measure(timers, pool, module, entry, request["rounds"], request["seed"])
        except Exception as error:
            broken = sc._broken(error)
            said = {OURS: sc._error(error)}
            empty: dict[str, Any] = {kind: {} for kind in SAMPLES}
            result = {**empty, "chosen": None, "tried": {}, "left_out": said}
        reporter.send(result={**result, "copy_bytes_per_s": copy})
        if broken:  # nothing more runs in this process; another one goes on
            return


# -- in the command


@dataclass
class Unit:
    """A shape with its paged twins, measured together; `problem` is the contiguous one."""

    problem: Problem
    paged: list[Problem]
    chosen: dict[str, dict[str, Any] | None] | None = None  # of the peer, by `SAMPLES`
    tried: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    attempts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def request(self) -> dict[str, Any]:
        """What the worker is told."""
        p = self.problem
        names = ("batch", "nheads", "nheads_k", "headdim")
        shape = {**{name: getattr(p, name) for name in names}, "length": p.seqlen_k}
        pages = [twin.page_size for twin in self.paged]
        return {"id": p.id, "shape": shape, "pages": pages, "chosen": self.chosen}

    @property
    def is_lost(self) -> bool:
        """Whether measuring again is of no use: wrong, or it takes the GPU from its process."""
        why = self.left_out.get(OURS, "")
        return why.startswith("wrong") or any(text in why for text in LOST)

    @property
    def is_settled(self) -> bool:
        """Whether an attempt's A/A pairs agree, and one's behind the flush that only reads."""
        return any(a["ok"] for a in self.attempts) and any(
            a["clean_ok"] or not a["clean_aa_ratios"] for a in self.attempts
        )

    def note(self, result: Mapping[str, Any]) -> None:
        """Carry what a process chose, and what it left out, to the others."""
        if self.chosen is None:
            self.chosen = result["chosen"]
        self.tried = self.tried or result["tried"]
        for name, why in result["left_out"].items():
            self.left_out.setdefault(name, why)

    def rows(self) -> list[dict[str, Any]]:
        """The problems as they stand in the record."""
        names = {name: name for name in (OURS, *PEER_BEHIND.values())}
        found = [self._row(self.problem, names, "")]
        return found + [self._row(p, {f"p{p.page_size}": OURS}, p.id) for p in self.paged]

    def _row(self, problem: Problem, names: Mapping[str, str], paged: str) -> dict[str, Any]:
        attempts = []
        for attempt in self.attempts:
            kept = {
                names[name.split("#")[0]] + name[len(name.split("#")[0]) :]: samples
                for name, samples in attempt["samples"].items()
                if name.split("#")[0] in names
            }
            row = {**attempt, "samples": kept}
            if paged:
                row |= {"clean": {}, "aa_ratios": {}, "clean_aa_ratios": {}, "clean_ok": False}
            attempts.append(row)
        left_out = {names[n]: why for n, why in self.left_out.items() if n in names}
        chosen = {} if paged or not self.chosen else self.chosen
        tried = {} if paged else self.tried
        return {
            "problem": problem_fields(problem),
            "status": "ok" if any(a["ok"] for a in self.attempts) else "inconclusive",
            "chosen": _of_peer(chosen, "samples"),
            "clean_chosen": _of_peer(chosen, "clean"),
            "tried": _of_peer(tried, "samples"),
            "clean_tried": _of_peer(tried, "clean"),
            "left_out": left_out,
            "attempts": attempts,
        }


def _of_peer(found: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {} if found.get(kind) is None else {PEER: found[kind]}


def units(problems: list[Problem]) -> list[Unit]:
    """The shapes of a suite, each with its paged twins."""

    def shape(p: Problem) -> Problem:
        return replace(p, id="x", suites=("x",), page_size=0)

    found = {shape(p): Unit(p, []) for p in problems if not p.page_size}
    for p in problems:
        if p.page_size:
            found[shape(p)].paged.append(p)
    return list(found.values())


def merge(attempt: int, results: list[dict[str, Any]], tolerance: float) -> dict[str, Any]:
    """One attempt from what its processes measured; a subject stays if every one measured it."""
    samples, clean = (_merged([r[kind] for r in results]) for kind in SAMPLES)
    ratios, twins = _pairs(samples), _pairs(clean)
    said = [
        f"the A/A pair of {name} differs by {abs(ratio - 1):.2%}, more than {tolerance:.2%}"
        for name, ratio in ratios.items()
        if abs(ratio - 1) > tolerance
    ]
    if OURS not in samples:
        said.append(f"{OURS} was not measured in every process")
    off = [
        f"the A/A pair of {name} behind the flush that reads differs by {abs(ratio - 1):.2%}"
        for name, ratio in twins.items()
        if abs(ratio - 1) > tolerance
    ]
    return {
        "attempt": attempt,
        "aa_ratios": ratios,
        "ok": not said,
        "message": "; ".join(said + off) or None,
        "copy_bytes_per_s": [r["copy_bytes_per_s"] for r in results],
        "samples": samples,
        "clean": clean,
        "clean_aa_ratios": twins,
        "clean_ok": bool(twins) and not off,
    }


def _merged(taken: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples of the subjects that every process measured, a list for each process."""
    return {
        name: {
            **{key: [t[name][key] for t in taken] for key in SERIES},
            "clock_mhz": [[t[name]["clock_mhz"]] for t in taken],
            "kernels": taken[0][name]["kernels"],
        }
        for name in taken[0]
        if all(name in t for t in taken)
    }


def _pairs(samples: Mapping[str, Any]) -> dict[str, float]:
    """The ratio of the two medians of what was measured twice."""
    ratios = {}
    for name in (OURS, PEER):
        if f"{name}#2" in samples:
            medians = [
                statistics.median(us for process in samples[n]["gpu_us"] for us in process)
                for n in (f"{name}#2", name)
            ]
            ratios[name] = round(medians[0] / medians[1], 5)
    return ratios


def run(settings: Settings, suite: str, out: Path) -> Record:
    """Check and time a suite of decoding and write the record. Goes on where it was stopped."""
    from attn_profiling.progress import console, progress

    measuring = settings.measuring
    problems = settings.suite(suite)
    dtypes = sorted({p.dtype for p in problems})
    if len(dtypes) > 1:
        raise ValueError(f"{suite=} holds {' and '.join(dtypes)}; a suite of decoding has one")
    session = Session(settings, [OURS, PEER])
    hashes = {name: entry["kernel_hash"] for name, entry in session.subjects.items()}
    planned = units(problems)
    pages = {u.problem.id: ",".join(str(p.page_size) for p in u.paged) for u in planned}

    def key(p: Problem) -> str:
        return content_key(session.content, problem_fields(p), {**hashes, "pages": pages[p.id]})

    folder = out.parent / ".partial"
    store = Partial(folder / suite, key)
    log = folder / f"{suite}.log"
    checks, stopped = _checks(session, folder / f"{suite}.checks.json", hashes, log)
    pending = planned
    for attempt in range(1, measuring.max_attempts + 1):
        results: dict[str, list[dict[str, Any]]] = {u.problem.id: [] for u in pending}
        title = f"decode {suite}" + (f", attempt {attempt}" if attempt > 1 else "")
        with progress(title, len(pending) * measuring.processes) as tell:
            for process in range(measuring.processes):
                todo = []
                for unit in pending:
                    found = store.get(attempt, process, unit.problem)
                    if found is None:
                        todo.append(unit)
                    else:
                        _keep(unit, found, results, tell)
                while todo:
                    request = {
                        "entries": [unit.request for unit in todo],
                        "dtype": dtypes[0],
                        "rounds": measuring.rounds,
                        "seed": measuring.seed + 1000 * attempt + process,
                        "fa3_module": settings.fa3_module,
                    }
                    by_id = {unit.problem.id: unit for unit in todo}
                    for name, found in _measured(session, request, log):
                        unit = by_id.pop(name)
                        store.put(attempt, process, unit.problem, found)
                        _keep(unit, found, results, tell)
                    if len(by_id) == len(todo):
                        raise MeasureError(f"{suite}: a process measured nothing; see {log}")
                    todo = list(by_id.values())
        for unit in pending:
            merged = merge(attempt, results[unit.problem.id], measuring.aa_tolerance)
            unit.attempts.append(merged)
            if OURS in merged["samples"]:  # what failed before has worked in every process
                unit.left_out.pop(OURS, None)
            if merged["message"]:
                text = f"{unit.problem.id}, attempt {attempt}: {merged['message']}"
                console.print(text, highlight=False, soft_wrap=True)
        pending = [u for u in pending if not u.is_settled and not u.is_lost]
        if not pending:
            break
    rows = {row["problem"]["id"]: row for unit in planned for row in unit.rows()}
    data = {
        **session.header("decode", suite),
        "checks": checks,
        "checks_stopped": stopped,
        "problems": [rows[p.id] for p in problems],
    }
    write(out, data, "decode")
    store.clear()
    return data


def _keep(
    unit: Unit,
    found: dict[str, Any],
    results: dict[str, list[dict[str, Any]]],
    tell: Callable[[str], None],
) -> None:
    unit.note(found)
    results[unit.problem.id].append(found)
    tell(unit.problem.id)


def _messages(session: Session, part: str, request: Mapping[str, Any], log: Path) -> Any:
    """Messages of one worker. Raises `MeasureError` where it dies."""
    worker = Worker("serving", [part], log, session.environment)
    current = part
    try:
        worker.begin(request)
        for message in worker.messages(SILENCE_S):
            current = message.get("begin", current)
            yield current, message
    except WorkerDied as error:
        raise MeasureError(
            f"{current}: {error}\nWhat was measured before it is kept; the same command goes on"
            " from there"
        ) from None
    finally:
        worker.close()


def _measured(session: Session, request: Mapping[str, Any], log: Path) -> Any:
    for name, message in _messages(session, "time", request, log):
        if "result" in message:
            yield name, message["result"]


def _checks(
    session: Session, kept: Path, hashes: Mapping[str, str], log: Path
) -> tuple[list[dict[str, Any]], str | None]:
    """The checks and why some are missing; kept, since they take minutes."""
    key = content_key(session.content, {}, hashes)
    if kept.is_file():
        found = json.loads(kept.read_text())
        if found["key"] == key:
            return found["checks"], found["stopped"]
    checks: list[dict[str, Any]] = []
    stopped = None
    for _, message in _messages(session, "checks", {}, log):
        if "check" in message:
            checks.append(message["check"])
        stopped = message.get("stopped", stopped)
    write_text(kept, json.dumps({"key": key, "checks": checks, "stopped": stopped}))
    return checks, stopped


# -- the model


def _model_record(session: Session, **found: Any) -> Record:
    empty: dict[str, Any] = {
        "reason": None, "model": None, "software": {}, "dtype": None, "token_agreement": [],
        "memory": None, "speed": [], "errors": {},
    }  # fmt: skip
    return {**session.header("model", None), **empty, **found}


def run_model(settings: Settings, out: Path) -> Record:
    """Have the named model run, and write the record; without one the record says so."""
    session = Session(settings, ["transformers", PEER])
    if settings.model is None:
        data = _model_record(session, reason=NO_MODEL)
    else:
        data = _measure_model(session, settings.model, out.parent / ".partial")
    write(out, data, "model")
    return data


def _measure_model(session: Session, model: Path, folder: Path) -> Record:
    if not model.is_file():
        raise ValueError(
            f"model={str(model)!r} is no file here; it must be in the folder of the checkout, or"
            " null to measure none"
        )
    software = {}
    for name in ("transformers", "gguf", "accelerate"):
        try:
            software[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise ValueError(
                f"model={str(model)!r} needs the package {name}, which is not installed:"
                " make measure LOCK=cuda installs it, or model=null measures none"
            ) from None
    folder.mkdir(parents=True, exist_ok=True)
    found_file, log = folder / "model.found.json", folder / "model.log"
    found_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "attn_profiling.serving_model", "--model", str(model)]
    command += ["--out", str(found_file), "--seconds", f"{MODEL_S:g}"]
    with log.open("w") as handle:
        done = subprocess.run(
            command,
            env={**os.environ, **session.environment},
            stdout=handle,
            stderr=subprocess.STDOUT,
        )
    if not found_file.is_file():
        end = "\n  ".join(log.read_text(errors="replace").splitlines()[-8:])
        raise MeasureError(
            f"model {model}: exit status {done.returncode} and nothing found; the end of {log}:"
            f"\n  {end}"
        )
    found = json.loads(found_file.read_text())
    errors = {name: found[name] for name in ("stopped", "fa3", "error") if found.get(name)}
    if done.returncode not in (0, 1):
        errors.setdefault("error", f"ended with exit status {done.returncode}; see {log}")
    with model.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return _model_record(
        session,
        model={"file": model.name, "sha256": digest, "bytes": model.stat().st_size},
        software=software,
        dtype=found.get("dtype"),
        token_agreement=found["token_agreement"],
        memory=found.get("memory"),
        speed=[_speed(row) for row in found["speed"]],
        errors=errors,
    )


def _speed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of speed as it stands in the record: samples, not what follows from them."""
    kept = {name: value for name, value in row.items() if name != "tokens_per_s"}
    return {**kept, "seconds": [kept["seconds"]]} if "seconds" in kept else kept


def summary(data: Record) -> list[str]:
    """What was found, a line each."""
    if data["schema"].split("/")[1] == "model":
        if data["reason"]:
            return [data["reason"]]
        rows = [r for r in data["token_agreement"] if r.get("implementation") != "sdpa"]
        same = sum(row.get("same", False) for row in rows)
        ties = sum(row.get("tie", False) for row in rows)
        lines = [f"tokens: {same} of {len(rows)} prompts the same, {ties} ties"]
        return lines + [f"{name}: {text}" for name, text in data["errors"].items()]
    failed = [row for row in data["checks"] if not row["ok"]]
    lines = [f"checks: {len(data['checks']) - len(failed)} right, {len(failed)} wrong"]
    lines += [f"WRONG {row['name']}: {row['detail'][:300]}" for row in failed]
    for row in data["problems"]:
        samples = row["attempts"][-1]["samples"]
        us = {
            name: statistics.median(us for process in taken["gpu_us"] for us in process)
            for name, taken in samples.items()
            if "#" not in name
        }
        shown = ", ".join(f"{name} {value:.2f} µs" for name, value in us.items())
        if OURS in us and PEER in us:
            shown += f" ({us[PEER] / us[OURS]:.3f})"
        left = "".join(f"; {name}: {why[:200]}" for name, why in row["left_out"].items())
        lines.append(f"{row['problem']['id']}: {row['status']}: {shown}{left}")
    return lines
