"""Candidates for stage 5 at headdim 128 that have not run on a GPU, beside its recorded configurations
and FA3: the first block of a tile in two halves of 64 keys (stage5_halves.py, next to this file), so
that half of its softmax runs under half of its product.

On an H100, from the repository root:
`PYTHONPATH=kernels:profiling:experiments python experiments/halves.py [FILE]`.
Checks first (fp32 reference, growing scores, 40 identical runs, two streams, a CUDA graph; also at
128, 256 and 384 keys), each in a process of its own that is killed after 60 s, then times: rounds of
single calls in random order behind a spin, cold L2, medians; `#2` is an A/A twin.
"""

import json
import random
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import stage5_halves
import torch

from attn_ladder import stage5_everything as stage5
from attn_ladder.problem import read_problems
from attn_profiling.check import check_subject
from attn_profiling.inputs import Rotation, draw

ROUNDS = 16


def candidates(problem):
    """{name: (module, configuration)}; the first is the recorded one."""
    recorded = stage5.choose_config(128, problem.causal, problem.seqlen_k)
    fields = {name: getattr(recorded, name) for name in recorded.__dataclass_fields__}
    found = {"recorded": (stage5, recorded)}
    for name, change in {"halves": {}, "halves, Q in smem": {"q_in_registers": False}}.items():
        config = stage5_halves.Config(**{**fields, **change, "first_halves": True})
        if all(config != known for _, known in found.values()):
            found[name] = (stage5_halves, config)
    return found


def bound_to(candidate):
    module, config = candidate
    return lambda q, k, v, **kw: module.forward(q, k, v, config=config, **kw)


def check(problem, config):
    """What is wrong, or None."""
    forward = bound_to(config)
    verdict = check_subject(torch, problem, forward, 0, "cuda")
    if verdict.message:
        return verdict.message
    q, k, v = draw(torch, problem, 1, "cuda")
    first = forward(q, k, v, causal=problem.causal)
    for _ in range(40):
        again = forward(q, k, v, causal=problem.causal)
        if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
            return "two runs differ"
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for stream in streams * 10:
        with torch.cuda.stream(stream):
            found.append(forward(q, k, v, causal=problem.causal))
    torch.cuda.synchronize()
    if not all(torch.equal(o, first[0]) for o, _ in found):
        return "two streams disturb each other"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(q, k, v, causal=problem.causal)
    for _ in range(5):
        captured[0].fill_(float("nan"))
        graph.replay()
        forward(q, k, v, causal=problem.causal)
        torch.cuda.synchronize()
        if not torch.equal(captured[0], first[0]):
            return "a graph replay differs"
    return None


def time(problem, calls):
    flush = torch.ones(25_000_000, dtype=torch.int32, device="cuda")
    rotation = Rotation(torch, problem, ROUNDS + 3, 0, "cuda")
    marks = {name: [] for name in calls}
    for r in range(ROUNDS + 3):
        for name in random.Random(r).sample(list(calls), len(calls)):
            flush.bitwise_not_()
            torch.cuda._sleep(1_900_000)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[name](*rotation[r], causal=problem.causal)
            end.record()
            if r >= 3:
                marks[name].append((start, end))
    torch.cuda.synchronize()
    return {n: statistics.median(a.elapsed_time(b) * 1000 for a, b in m) for n, m in marks.items()}


def checked(problem, name):
    """What is wrong with a candidate, found in a process of its own, or None."""
    words = [sys.executable, __file__, "--check", problem.id, name]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "hung"
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]]
    return None if lines[-1] == "right" else lines[-1]


def chosen():
    """The problems of the grid at headdim 128, and short ones that are only checked."""
    table = read_problems(Path("config/problems.tsv")).values()
    grid = {p.id: p for p in table if p.headdim == 128 and "grid" in p.suites}
    short = {}
    for p in (grid["grid-d128-full-s512"], grid["grid-d128-causal-s512"], grid["grid-d128-causal-s4096"]):
        for n in (128, 256, 384):
            short[f"{p.id}-{n}"] = replace(p, id=f"{p.id}-{n}", batch=2, nheads=4, nheads_k=2,
                                           seqlen_q=n, seqlen_k=n)  # fmt: skip
    return grid, short


def main():
    grid, short = chosen()
    if sys.argv[1:2] == ["--check"]:
        base, name = sys.argv[2:4]
        options = candidates(grid["-".join(base.split("-")[:4])])
        print(check({**grid, **short}[base], options[name]) or "right")
        return
    from attn_ladder.peers import fa3

    asked = [(p, n) for p in [*short.values(), *grid.values()]
             for n in candidates(grid["-".join(p.id.split("-")[:4])])
             if n != "recorded" and p.seqlen_k in (128, 256, 384, 512, 2048, 4096)]  # fmt: skip
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda a: checked(*a), asked))
    bad = {(p.causal, n) for (p, n), wrong in zip(asked, found, strict=True) if wrong}
    for (p, n), wrong in zip(asked, found, strict=True):
        if wrong:
            print("WRONG", p.id, n, wrong, flush=True)
    print(len(asked), "checks,", sum(map(bool, found)), "wrong", flush=True)
    results = {}
    for problem in grid.values():
        good = {n: c for n, c in candidates(problem).items() if (problem.causal, n) not in bad}
        calls = {name: bound_to(candidate) for name, candidate in good.items()}
        calls["recorded#2"], calls["fa3"] = calls["recorded"], fa3.forward
        with torch.inference_mode():
            us = time(problem, calls)
        results[problem.id] = us
        shown = "  ".join(f"{n} {t:.1f} ({us['fa3'] / t:.3f})" for n, t in us.items())
        print(f"{problem.id:24s} {shown}", flush=True)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
