"""Is `attn_ladder.decode_hopper` right on an H100, and how fast beside `decode.launch` and FA3?

    python experiments/decode_hopper_check.py --out FILE [--seconds 90] [--parts compile,check,time]
        [--shapes b1-,d64] [--checks values,flag]

Every part runs in processes of its own that are ended when their time is over, so a kernel that
hangs costs its own check only: `compile` fills Triton's cache, `check` runs groups of checks side
by side, `time` measures the decode shapes, interleaved, with a cold L2. The file holds what was
found so far, whatever happens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "profiling")]

from attn_profiling import serving_check as base  # noqa: E402

PROCESSES = min(12, os.cpu_count() or 1)
AT_ONCE = 5  # groups of checks on the GPU
CHECK_TIMEOUT = 45.0
ROUNDS = 11
FA3_ROUNDS = 3
LENS = (0, 1, 333, 2500, 4090, 64, 4096)


def candidates(headdim: int) -> dict[str, Any]:
    """Configurations to check and time, by name; the first is the default."""
    from attn_ladder.decode_hopper import Config

    n = 8192 // headdim
    return {
        "2 ctas": Config(n, 3, 2, 256),
        "1 cta": Config(n, 6, 1, 256),
        "2, split 128": Config(n, 3, 2, 128),
        "1, split 128": Config(n, 6, 1, 128),
        "2, split 512": Config(n, 3, 2, 512),
        "2, split 64": Config(64, 384 // headdim, 2, 64),
    }


def run(cache: Any, config: Any = None, **changes: Any) -> Any:
    """(out, lse) of `decode_hopper.forward` on a `serving_check.Cache`."""
    from attn_ladder import decode_hopper

    given = {
        "bounds": cache.lens, "index": cache.arguments.get("cache_batch_idx"),
        "block_table": cache.arguments.get("block_table"), "causal": cache.case.causal,
        "config": config, **changes,
    }  # fmt: skip
    why = decode_hopper.unsupported(
        cache.q, *cache.stores, block_table=given["block_table"], capability=(9, 0)
    )
    if why is not None:
        raise base.Failed(f"unsupported: {why}")
    return decode_hopper.forward(cache.q, *cache.stores, **given)


def against_reference(case: Any, config: Any = None) -> str:
    """Result and log-sum-exp of one call; what is not stored in the cache is NaN."""
    cache = base.Cache(case, "cuda")
    k, v = cache.keys
    out, lse = run(cache, config)
    text = base.compare(
        [(out[b], lse[b], cache.q[b], k[b, :n], v[b, :n]) for b, n in enumerate(case.lens)],
        case.causal,
    )
    base.no_errors("cuda")
    return text


def value_cases() -> Iterator[tuple[str, Any, str]]:
    """(name, case, name of the configuration)."""
    heads = ((32, 8, (1, 2, 3, 4)), (8, 8, (1, 4, 16)), (16, 1, (1,)), (9, 3, (1, 2, 5)))
    i = 0
    for dtype in ("bf16", "fp16"):
        for headdim in (128, 64):
            for page in (0, 16, 64, 256):
                for name in ("1 cta", "2 ctas"):
                    if dtype == "fp16" and (page in (16, 64) or name == "1 cta"):
                        continue
                    h, hk, lengths = heads[i % 4]
                    q = lengths[i // 4 % len(lengths)]
                    case = base.Cached(
                        dtype, LENS, 4096, h, hk, headdim, page, q, causal=i % 3 != 2
                    )
                    yield f"{case.id} {name}", case, name
                    i += 1
    for q in (1, 2, 3, 4):
        for causal in (True, False):
            case = base.Cached("bf16", (0, 1, 3, 130, 4096), 4096, 32, 8, 128, 0, q, causal=causal)
            yield f"{case.id} tokens", case, "1 cta"
    rows = dict(rows=(4, 0, 2, 6, 3, 1, 5))
    yield "rows", base.Cached("bf16", LENS, 4096, 32, 8, 128, **rows), "1 cta"
    yield "transposed", base.Cached("bf16", LENS, 4096, 32, 8, 128, transposed=True), "1 cta"
    yield "long", base.Cached("bf16", (65536,), 65536, 32, 8, 128), "1 cta"
    yield "256 splits", base.Cached("bf16", (65536, 7), 65536, 16, 1, 64), "2 ctas"
    yield "1024 pages", base.Cached("bf16", (16384, 16001), 16384, 4, 4, 128, 16), "2 ctas"


def many_sequences(count: int) -> str:
    """Ragged lengths of many sequences: as `decode.launch` within rounding, some as the reference.

    A sequence alone gives the same bits as in the batch.
    """
    import torch

    from attn_ladder import decode

    lens = torch.randint(0, 700, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    case = base.Cached("bf16", tuple(lens), 704, 8, 2, 128)
    cache = base.Cache(case, "cuda")
    out, lse = run(cache)
    old, old_lse = decode.launch(
        cache.q, *cache.stores, mode=decode.CACHE, bounds=cache.lens, causal=case.causal
    )
    if not torch.allclose(out.float(), old.float(), atol=0.03, rtol=0.03):
        raise base.Failed(f"out differs by {(out.float() - old.float()).abs().max().item():.2e}")
    if not torch.allclose(lse, old_lse, atol=2e-3):
        raise base.Failed("lse differs from that of decode.launch")
    k, v = cache.keys
    for b in range(0, count, max(1, count // 24)):
        one = slice(b, b + 1)
        alone = run_alone(cache, b, max(lens[b], 1))
        base._same(alone, (out[one], lse[one]), f"between sequence {b} alone and in the batch")
    some = range(0, count, max(1, count // 40))
    return base.compare(
        [(out[b], lse[b], cache.q[b], k[b, : lens[b]], v[b, : lens[b]]) for b in some], True
    )


def run_alone(cache: Any, b: int, size: int, config: Any = None) -> Any:
    """A sequence of a cache alone, with a capacity of `size`."""
    from attn_ladder import decode_hopper

    one = slice(b, b + 1)
    k, v = (keys[one, :size] for keys in cache.keys)
    return decode_hopper.forward(
        cache.q[one], k, v, bounds=cache.lens[one].clone(), causal=cache.case.causal, config=config
    )


def invariance(case: Any, config: Any) -> str:
    """A sequence alone, with its own capacity, and in a batch: the same bits; and paged."""
    cache = base.Cache(case, "cuda")
    together = run(cache, config)
    for b, n in enumerate(case.lens):
        alone = run_alone(cache, b, max(n, 1), config)
        base._same(alone, [x[b : b + 1] for x in together], f"between sequence {b} alone and not")
    for page in (16, 64, 256):
        paged = base.Cache(dataclasses.replace(case, page=page), "cuda")
        paged.q.copy_(cache.q)
        for store, keys in zip(paged.stores, cache.keys, strict=True):
            for b, n in enumerate(case.lens):
                paged.write(store, b, 0, keys[b, :n])
        base._same(run(paged, config), together, f"between pages of {page} and none")
    for _ in range(50):
        base._same(run(cache, config), together, "between two calls")
    return "bitwise equal: alone, pages of 16, 64, 256, 50 times"


def invariance_control(case: Any) -> str:
    """The comparison of bits sees another order of sums."""
    import torch

    cache = base.Cache(case, "cuda")
    configs = candidates(case.headdim)
    results = [run(cache, configs[name]) for name in ("2 ctas", "2, split 512")]
    if all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
        raise base.Failed("another split policy gave the same bits, so equal bits show nothing")
    base._same(run(cache, configs["1 cta"]), results[0], "between rings of another depth")
    return "another split policy gives other bits, another ring does not"


def flag(paged: bool) -> str:
    """Bad values on the device: NaN for their sequence, the flag; the other one as it should be."""
    import torch

    from attn_ladder import decode_hopper
    from attn_ladder.decode import clear_errors

    generator = torch.Generator(device="cuda").manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    around = torch.full((2, 12, 64, 1, 128), float("nan"), dtype=torch.bfloat16, device="cuda")
    around[:, 4:8] = draw(2, 4, 64, 1, 128)
    k, v = around[0, 4:8], around[1, 4:8]
    q = draw(2, 1, 2, 128)
    lens, pages = [5, 9], [70, 70]
    trials: dict[str, tuple[dict[str, Any], str | None]] = {
        "nothing": (dict(bounds=lens, index=[1, 2]), None),
        "negative length": (dict(bounds=[5, -1], index=[1, 2]), "cache_seqlens"),
        "length": (dict(bounds=[5, 65], index=[1, 2]), "cache_seqlens"),
        "huge": (dict(bounds=[5, 2**31 - 1], index=[1, 2]), "cache_seqlens"),
        "row": (dict(bounds=lens, index=[1, 4]), "cache_batch_idx"),
        "negative row": (dict(bounds=lens, index=[1, -1]), "cache_batch_idx"),
        "row, alone": (dict(bounds=lens, index=[1, 2**30]), "cache_batch_idx"),
    }
    if paged:
        trials = {
            "pages": (dict(bounds=pages, block_table=[[0, 1], [2, 3]]), None),
            "page": (dict(bounds=pages, block_table=[[0, 1], [2, 4]]), "block_table"),
            "huge page": (dict(bounds=pages, block_table=[[0, 1], [2**30, 3]]), "block_table"),
            "negative page": (dict(bounds=pages, block_table=[[0, 1], [2, -7]]), "block_table"),
            "bad page not needed": (dict(bounds=[70, 64], block_table=[[0, 1], [2, -7]]), None),
        }
    clear_errors("cuda")
    for name, (values, wanted) in trials.items():
        arguments = {key: base._ints(value, "cuda") for key, value in values.items()}
        out, lse = decode_hopper.forward(q, k, v, **arguments)
        texts = clear_errors("cuda")
        if bool(out[0].isnan().any()) or bool(lse[0].isnan().any()):
            raise base.Failed(f"{name}: the good sequence gives NaN")
        for x in (out, lse):
            if bool(x[1].isnan().all()) is not (wanted is not None):
                raise base.Failed(f"{name}: NaN of the second sequence is not as expected")
        if [text.split(":")[0] for text in texts] != ([wanted] if wanted else []):
            raise base.Failed(f"{name}: the flag says {texts}")
    return f"{len(trials)} trials"


def bad_page_of_many_splits() -> str:
    """One bad page of a long sequence: NaN in that sequence only, and the counters stay zero."""
    import torch

    from attn_ladder import decode
    from attn_ladder.decode import clear_errors

    cache = base.Cache(base.Cached("bf16", (4000, 4000), 4096, 8, 2, 128, 16), "cuda")
    wanted = run(cache)
    table = cache.arguments["block_table"].clone()
    table[1, 100] = 2**20
    clear_errors("cuda")
    out, lse = run(cache, block_table=table)
    texts = clear_errors("cuda")
    if not bool(out[1].isnan().all()) or not bool(lse[1].isnan().all()) or len(texts) != 1:
        raise base.Failed(f"NaN or flag missing: {texts}")
    if not torch.equal(out[0], wanted[0][0]):
        raise base.Failed("the other sequence changed")
    if bool(decode.counters(cache.q.device, 1).any()):
        raise base.Failed("a call left counters that are not zero")
    base._same(run(cache), wanted, "after the bad page")
    return "NaN in one sequence, flag, counters zero"


def graph(case: Any) -> str:
    """A captured call, replayed with other lengths, equals the eager call."""
    import torch

    cache = base.Cache(dataclasses.replace(case, lens=(case.capacity,) * len(case.lens)), "cuda")
    lens = base._ints(case.lens, "cuda")
    run(cache, bounds=lens)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        result = [run(cache, bounds=lens) for _ in range(3)][-1]
    for step in range(4):
        lens.copy_(base._ints([min(case.capacity, n + 97 * step) for n in case.lens], "cuda"))
        captured.replay()
        base._same(run(cache, bounds=lens.clone()), result, f"between graph and eager, {step}")
    base.no_errors("cuda")
    return "4 replays with growing lengths, bitwise equal"


def streams(case: Any) -> str:
    """Two streams at once, and two inputs in turn, give what the current stream gives."""
    import torch

    caches = [base.Cache(case, "cuda", seed) for seed in (0, 1)]
    wanted = [run(cache) for cache in caches]
    torch.cuda.synchronize()
    both = [torch.cuda.Stream() for _ in caches]
    results: list[list[Any]] = [[], []]
    for _ in range(20):
        for cache, stream, kept in zip(caches, both, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(run(cache))
    torch.cuda.synchronize()
    for i, kept in enumerate(results):
        for result in kept:
            base._same(result, wanted[i], f"between stream {i} and the current one")
    for i in range(100):
        base._same(run(caches[i % 2]), wanted[i % 2], f"in call {i} of two inputs in turn")
    base.no_errors("cuda")
    return "20 calls on each of 2 streams, 100 in turn, bitwise equal"


def groups() -> dict[str, dict[str, Callable[[], str]]]:
    """Checks by group, each group a process."""
    found: dict[str, dict[str, Callable[[], str]]] = {}
    values: dict[str, Callable[[], str]] = {}
    for name, case, config in value_cases():
        values[name] = lambda case=case, config=config: against_reference(  # type: ignore[misc]
            case, candidates(case.headdim)[config]
        )
    names = list(values)
    for i in range(4):
        found[f"values {i}"] = {name: values[name] for name in names[i::4]}
    spans = base.spanning_cases(False)
    for case in spans:
        for name in ("1 cta", "2 ctas"):
            config = candidates(case.headdim)[name]
            found.setdefault(f"invariance {name}", {})[case.id] = lambda c=case, config=config: (  # type: ignore[misc]
                invariance(c, config)
            )
    ragged = base.Cached("bf16", (5, 700, 2000, 0, 4096), 4096, 32, 8, 128)
    found["flag"] = {
        "flag": lambda: flag(False),
        "flag, pages": lambda: flag(True),
        "bad page of many splits": bad_page_of_many_splits,
        "control": lambda: invariance_control(spans[0]),
    }
    found["streams"] = {
        "graph": lambda: graph(ragged),
        "graph, pages": lambda: graph(dataclasses.replace(ragged, page=64)),
        "streams": lambda: streams(ragged),
    }
    found["many"] = {f"{n} sequences": lambda n=n: many_sequences(n) for n in (129, 1024)}  # type: ignore[misc]
    return found


def builds() -> list[tuple[Any, str]]:
    """What `check` and `time` need compiled: (build, dtype)."""
    from attn_ladder.decode_hopper import build

    needed: dict[tuple[Any, str], None] = {}
    for headdim in (128, 64):
        for config in candidates(headdim).values():
            for page in (0, 16, 64, 256):
                needed[build(config, headdim, page, False, 1), "bf16"] = None
        default = next(iter(candidates(headdim).values()))
        for page in (0, 256):
            needed[build(default, headdim, page, False, 1), "fp16"] = None
        for indexed, batch in ((True, 1), (False, 1024)):
            if headdim == 128:
                for config in candidates(128).values():
                    needed[build(config, 128, 0, indexed, batch), "bf16"] = None
    return list(needed)


def compile_builds(part: int, of: int) -> None:
    """Compile a share of the builds into Triton's cache; a line of JSON for each."""
    import torch

    from attn_ladder.decode_hopper import compiled

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    torch.zeros(1, device="cuda")
    for cfg, dtype in builds()[part::of]:
        began = time.monotonic()
        row: dict[str, Any] = {"build": f"{cfg} {dtype}", "ok": True}
        try:
            kernel = compiled(cfg, dtypes[dtype], 0).compiled
            row |= {"registers": kernel.n_regs, "spills": kernel.n_spills,
                    "shared": kernel.metadata.shared}  # fmt: skip
        except Exception as error:
            row |= {"ok": False, "detail": base._error(error)}
        print(json.dumps({**row, "seconds": round(time.monotonic() - began, 2)}), flush=True)


def run_group(name: str) -> None:
    """The checks of a group; a line of JSON before and after each."""
    with base.poisoned():
        for check, function in groups()[name].items():
            print(json.dumps({"began": f"{name}: {check}"}), flush=True)
            began = time.monotonic()
            row: dict[str, Any] = {"name": f"{name}: {check}", "ok": True}
            try:
                row["detail"] = function()
            except Exception as error:
                row |= {"ok": False, "detail": base._error(error)}
            row["seconds"] = round(time.monotonic() - began, 2)
            print(json.dumps(row), flush=True)
            if not row["ok"] and base._broken(Exception(row["detail"])):
                return


def subject(
    pool: Any, shape: Any, page: int = 0, config: Any = None, old: bool = False
) -> Callable[[int], Any]:
    """A call of `decode_hopper.forward`, or of `decode.launch`; pages are in random order."""
    from attn_ladder import decode, decode_hopper

    lens = base._ints([shape.length] * shape.batch, "cuda")
    pages = base.page_table(shape, page).to("cuda") if page else None
    size = (-1, page or shape.length, shape.nheads_k, shape.headdim)

    def call(i: int) -> Any:
        q, k, v = pool.inputs(shape, i)
        k, v = k.view(size), v.view(size)
        if old:
            return decode.launch(q, k, v, mode=decode.CACHE, bounds=lens, block_table=pages)
        return decode_hopper.forward(q, k, v, bounds=lens, block_table=pages, config=config)

    return call


def compile_old() -> None:
    """Compile what `time` needs of `decode.launch`."""
    import torch

    from attn_ladder.decode import error_flag

    error_flag("cuda")
    shapes = {(s.nheads // s.nheads_k, s.headdim, s.nheads_k == 1): s for s in base.DECODE}
    pool = base.Pool(list(shapes.values()))
    tasks = [
        lambda s=s, page=page: subject(pool, s, page, old=True)(0)  # type: ignore[misc]
        for s in shapes.values()
        for page in (0, 256)
    ]
    errors = base.in_parallel(tasks)
    torch.cuda.synchronize()
    print(json.dumps({"build": "decode.launch", "ok": not errors, "detail": str(errors)[:500],
                      "spills": 0}))  # fmt: skip


def time_shapes(wanted: list[str], seconds: float) -> None:
    """A line of JSON for each shape: microseconds of each subject."""
    import torch

    began = time.monotonic()
    shapes = [s for s in base.DECODE if not wanted or any(text in s.id for text in wanted)]
    timer, pool, module = base.Timer(), base.Pool(shapes), base.fa3_function("fa3_fwd_interface")
    errors: dict[str, str] = {}
    if isinstance(module, Exception):
        errors["fa3"] = base._error(module)
    print(json.dumps({"copy": base.copy_bytes_per_s(timer), "gpu": torch.cuda.get_device_name(),
                      "errors": errors}), flush=True)  # fmt: skip

    for shape in shapes:
        if time.monotonic() - began > seconds:
            print(json.dumps({"stopped": shape.id}), flush=True)
            return
        errors = {}
        row: dict[str, Any] = {"shape": shape.id, "kv_bytes": shape.kv_bytes, "errors": errors}
        try:
            configs = candidates(shape.headdim)
            calls = {"old": subject(pool, shape, old=True)}
            for name, config in configs.items():
                calls[name] = subject(pool, shape, config=config)
            if shape.length >= 256:
                calls["old, pages of 256"] = subject(pool, shape, 256, old=True)
                calls["pages of 256"] = subject(pool, shape, 256, configs["2 ctas"])
            if shape.length == 2048:
                calls["pages of 16"] = subject(pool, shape, 16, configs["2 ctas"])
            if not isinstance(module, Exception):
                tried = {}
                for name, knobs in base.fa3_configs(shape).items():
                    try:
                        tried[name] = base.fa3(module, pool, shape, knobs)
                    except Exception as error:
                        errors[f"fa3 {name}"] = base._error(error)
                tried = base.runnable(tried, errors)
                us = {name: found["median_us"]
                      for name, found in timer.measure(tried, FA3_ROUNDS).items()}  # fmt: skip
                row["fa3_best"] = min(us, key=us.__getitem__)
                calls["fa3"] = calls["fa3 again"] = tried[row["fa3_best"]]
            calls = base.runnable(calls, errors)
            found = timer.measure(calls, ROUNDS)
            row["us"] = {name: round(found[name]["median_us"], 2) for name in calls}
        except Exception as error:
            row["error"] = base._error(error)
            if base._broken(error):
                print(json.dumps(row), flush=True)
                return
        print(json.dumps(row), flush=True)


def child(arguments: list[str], timeout: float) -> tuple[list[dict[str, Any]], str | None]:
    """Rows that this script prints when run with these arguments, and what went wrong."""
    began = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wrong = None
    try:
        out, error = began.communicate(timeout=timeout)
        if began.returncode:
            wrong = f"exit {began.returncode}: {error[-1500:]}"
    except subprocess.TimeoutExpired:
        began.kill()
        try:
            out, error = began.communicate(timeout=10)
        except subprocess.TimeoutExpired:  # its kernel does not end
            out, error = "", ""
        wrong = f"ended after {timeout:g} s"
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")], wrong


def table(data: dict[str, Any]) -> str:
    """The short report."""
    lines = []
    for row in data["builds"]:
        if not row["ok"] or row["spills"]:
            lines.append(f"BUILD {row}")
    good = sum(row["ok"] for row in data["checks"])
    lines.append(f"builds: {len(data['builds'])}; checks: {good} right of {len(data['checks'])}")
    lines += [f"  WRONG {r['name']}: {r['detail'][:400]}" for r in data["checks"] if not r["ok"]]
    lines += [f"  {text}" for text in data["wrong"]]
    rows = [row for row in data["time"] if "us" in row]
    lines += [f"{row['shape']}: {row['error']}" for row in data["time"] if "error" in row]
    subjects = list(dict.fromkeys(name for row in rows for name in row["us"]))
    if rows:
        lines.append(f"{'shape':22} {'MB':>5} " + " ".join(f"{name[:12]:>12}" for name in subjects))
        lines += [
            f"{row['shape']:22} {row['kv_bytes'] / 1e6:5.0f} "
            + " ".join(f"{row['us'].get(name, float('nan')):12.2f}" for name in subjects)
            for row in rows
        ]
    for small in (True, False):
        group = [r for r in rows if (r["kv_bytes"] < 64 * 2**20) is small and "fa3" in r["us"]]
        for name in subjects:
            ratios = [r["us"]["fa3"] / r["us"][name] for r in group if name in r["us"]]
            if ratios and "fa3" not in name and "pages" not in name:
                lines.append(
                    f"{'< 64 MB' if small else 'larger '} FA3/{name}: median "
                    f"{statistics.median(ratios):.3f}, least {min(ratios):.3f} ({len(ratios)})"
                )
    for row in rows:
        if row["errors"]:
            lines.append(f"{row['shape']}: errors {str(row['errors'])[:400]}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--parts", default="compile,check,time")
    parser.add_argument("--shapes", default="")
    parser.add_argument("--checks", default="", help="groups that begin with one of these")
    parser.add_argument("--worker", nargs="+", help="what a process of this script does")
    options = parser.parse_args()
    if options.worker:
        kind, *rest = options.worker
        if kind == "compile":
            compile_builds(int(rest[0]), int(rest[1]))
        elif kind == "old":
            compile_old()
        elif kind == "check":
            run_group(rest[0])
        else:
            time_shapes([text for text in rest[1].split(",") if text], float(rest[0]))
        return 0
    if options.out is None:
        parser.error("--out is needed")
    began = time.monotonic()
    data: dict[str, Any] = {"builds": [], "checks": [], "time": [], "wrong": []}

    def write() -> None:
        data["elapsed_s"] = round(time.monotonic() - began, 1)
        options.out.write_text(json.dumps(data, indent=1))

    parts = options.parts.split(",")
    if "compile" in parts:
        with ThreadPoolExecutor(PROCESSES + 1) as pool:
            shares = [["--worker", "compile", str(i), str(PROCESSES)] for i in range(PROCESSES)]
            shares.append(["--worker", "old"])
            for rows, wrong in pool.map(lambda share: child(share, 120.0), shares):
                data["builds"] += rows
                data["wrong"] += [f"compile: {wrong}"] if wrong else []
        print(f"compiled after {time.monotonic() - began:.1f} s", flush=True)
        write()
    if "check" in parts:
        wanted = tuple(text for text in options.checks.split(",") if text)
        names = [name for name in groups() if not wanted or name.startswith(wanted)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            done = pool.map(lambda name: child(["--worker", "check", name], CHECK_TIMEOUT), names)
            for name, (rows, wrong) in zip(names, done, strict=True):
                finished = [row for row in rows if "name" in row]
                data["checks"] += finished
                started = [row["began"] for row in rows if "began" in row]
                if wrong:
                    last = started[-1] if len(started) > len(finished) else name
                    data["checks"].append({"name": last, "ok": False, "detail": wrong})
                write()
        print(f"checked after {time.monotonic() - began:.1f} s", flush=True)
    if "time" in parts:
        left = max(15.0, options.seconds - (time.monotonic() - began))
        rows, wrong = child(["--worker", "time", str(left), options.shapes], left + 30)
        data["time"] += rows
        data["wrong"] += [f"time: {wrong}"] if wrong else []
    write()
    print(table(data))
    print(f"{data['elapsed_s']} s")
    return int(bool(data["wrong"]) or not all(row["ok"] for row in data["checks"]))


if __name__ == "__main__":
    sys.exit(main())
