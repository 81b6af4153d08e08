"""Candidates for stage 5 that have not run on a GPU, against its recorded configurations and FA3.

- headdim 128: three consumers with 64-key blocks, so that two compute while one is between tiles;
- headdim 256, causal: pairs with two buffers (recorded), the counter with more heads together.

On an H100, from the repository root:
`PYTHONPATH=kernels:profiling python experiments/consumers.py [FILE]`.
Checks first (fp32 reference, growing scores, 40 identical runs, two streams, a CUDA graph), each in
a process of its own that is killed after 60 s, then times: rounds of single calls in random order
behind a spin, cold L2, medians; `#2` is an A/A twin.
"""

import json
import random
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from attn_ladder import stage5_everything as stage5
from attn_ladder.problem import read_problems
from attn_profiling.check import check_subject
from attn_profiling.inputs import Rotation, draw

ROUNDS = 16


def candidates(problem):
    """{name: configuration}; the first is the recorded one."""
    recorded = stage5.choose_config(problem.headdim, problem.causal, problem.seqlen_k)
    if problem.headdim == 256:
        counter = replace(recorded, schedule="dynamic")
        more = {f"counter {n}M": replace(counter, l2_bytes=n << 20) for n in (32, 64, 128, 256)}
        return {"recorded": recorded, **(more if problem.causal else {})}
    three = dict(consumers=3, BLOCK_N=64, q_in_registers=False)
    order = "dynamic" if problem.causal else "static"
    sizes = (8, 16, 32) if problem.causal and problem.seqlen_k <= 2048 else (32,)
    found = {"recorded": recorded}
    for overlap in ("own", "others"):
        for buffers, direct in ((3, False), (4, True), (5, True)):
            config = stage5.Config(
                128, problem.causal, num_buffers=buffers, direct_store=direct, overlap=overlap,
                schedule=order, **three,
            )
            for size in sizes if (buffers, direct) == (3, False) else sizes[-1:]:
                name = f"{overlap} {buffers}{' direct' if direct else ''} {size}M"
                found[name] = replace(config, l2_bytes=size << 20)
    return found


def bound_to(config):
    return lambda q, k, v, **kw: stage5.forward(q, k, v, config=config, **kw)


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
    table = read_problems(Path("config/problems.tsv"))
    wanted = [p for p in table.values() if p.headdim in (128, 256)]
    grid = [p for p in wanted if {"grid", "grid256"} & set(p.suites)]
    return {p.id: p for p in grid if p.headdim == 128 or p.causal}


def main():
    problems = chosen()
    if sys.argv[1:2] == ["--check"]:
        problem = problems[sys.argv[2]]
        print(check(problem, candidates(problem)[sys.argv[3]]) or "right")
        return
    from attn_ladder.peers import fa3

    kinds = {}  # what is checked once, on the shortest problems of its kind that use it
    for problem in problems.values():
        for name, config in candidates(problem).items():
            kinds.setdefault(replace(config, l2_bytes=0), (problem, name))
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(kinds, pool.map(lambda k: checked(*kinds[k]), kinds), strict=True))
    for config, wrong in found.items():
        if wrong:
            print("WRONG", config, wrong, flush=True)
    results = {}
    for problem in problems.values():
        options = candidates(problem)
        good = {n: c for n, c in options.items() if not found[replace(c, l2_bytes=0)]}
        calls = {name: bound_to(config) for name, config in good.items()}
        first = next(iter(options))
        calls[f"{first}#2"], calls["fa3"] = bound_to(options[first]), fa3.forward
        with torch.inference_mode():
            us = time(problem, calls)
        results[problem.id] = us
        shown = "  ".join(f"{n} {t:.1f} ({us['fa3'] / t:.3f})" for n, t in us.items())
        print(f"{problem.id:24s} {shown}", flush=True)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
