"""The last round of full problems dealt out in key blocks (`schedule="split"`) against whole tiles.

On an H100, from the repository root: `PYTHONPATH=kernels:profiling python experiments/tail.py`.
Checks first (fp32 reference, growing scores, 300 identical runs, two streams, a CUDA graph), then
times: rounds of single calls in random order behind a spin, cold L2, medians.
"""

import json
import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

from attn_ladder import stage5_everything as stage5
from attn_ladder.problem import read_problems
from attn_profiling.check import check_subject
from attn_profiling.inputs import Rotation, draw

ROUNDS = 40


def variants(problem):
    sizes = (
        (problem.batch, problem.seqlen_q, problem.nheads, problem.headdim),
        (problem.batch, problem.seqlen_k, problem.nheads_k, problem.headdim),
    )
    cfg, _, _ = stage5.schedule(None, *sizes, problem.causal, 132)
    return {name: replace(cfg, schedule=name) for name in ("static", "split")}


def bound_to(config):
    return lambda q, k, v, **kw: stage5.forward(q, k, v, config=config, **kw)


def check(problem, config):
    """What is wrong, or None."""
    forward = bound_to(config)
    verdict = check_subject(torch, problem, forward, 0, "cuda")
    if verdict.message:
        return verdict.message
    q, k, v = draw(torch, problem, 1, "cuda")
    first = forward(q, k, v, causal=False)
    for _ in range(300):
        again = forward(q, k, v, causal=False)
        if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
            return "two runs differ"
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for stream in streams * 10:
        with torch.cuda.stream(stream):
            found.append(forward(q, k, v, causal=False))
    torch.cuda.synchronize()
    if not all(torch.equal(o, first[0]) for o, _ in found):
        return "two streams disturb each other"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(q, k, v, causal=False)
    for _ in range(5):
        captured[0].fill_(float("nan"))
        graph.replay()
        forward(q, k, v, causal=False)
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
            calls[name](*rotation[r], causal=False)
            end.record()
            if r >= 3:
                marks[name].append((start, end))
    torch.cuda.synchronize()
    return {n: statistics.median(a.elapsed_time(b) * 1000 for a, b in m) for n, m in marks.items()}


def main():
    results = {}
    table = read_problems(Path("config/problems.tsv")).values()
    chosen = [p for p in table if p.headdim == 128 and not p.causal and {"grid"} & set(p.suites)]
    chosen += [p for p in table if p.id in ("fp16-d128-full-s2048", "fp16-d128-full-s8192")]
    ragged_q = replace(chosen[2], id="ragged-q", seqlen_q=1900, nheads_k=4)
    for problem in [*chosen, ragged_q]:
        options = variants(problem)
        wrong = check(problem, options["split"])
        calls = {name: bound_to(config) for name, config in options.items()}
        calls["split#2"] = calls["split"]
        if problem.dtype == "bf16" and problem is not ragged_q:
            try:
                from attn_ladder.peers import fa3

                calls["fa3"] = fa3.forward
            except ImportError:
                pass
        with torch.inference_mode():
            us = time(problem, calls)
        results[problem.id] = {"wrong": wrong, **us}
        shown = "  ".join(f"{n} {t:8.1f}" for n, t in us.items())
        print(
            f"{problem.id:24s} {wrong or 'right':8s} {shown}  gain {us['static'] / us['split']:.4f}",
            flush=True,
        )
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
