"""Decoding over a KV cache and ragged prefill under Triton's interpreter, on the CPU.

The interpreter and the compiler cannot share a process, and the interpreter computes bf16 wrongly,
so this file, run as a script, computes all cases in fp16 and fp32 and prints what came out as JSON.
"""

import json
import os
import subprocess
import sys

import pytest

# dtype, stored keys of each sequence, capacity, seqlen_q, seqlen_new, nheads, nheads_k, headdim,
# causal, page size, rows of the cache
CASES = {
    "ragged": ("fp16", [0, 1, 333, 640], 640, 1, 0, 4, 2, 64, True, 0, None),
    "grouped": ("fp16", [70, 257], 300, 1, 0, 9, 3, 64, True, 0, None),
    "one key head": ("fp32", [400], 512, 1, 0, 16, 1, 64, True, 0, None),
    "every head its keys, headdim 128": ("fp16", [129], 130, 1, 0, 2, 2, 128, True, 0, None),
    "append one": ("fp16", [0, 64, 199], 200, 1, 1, 4, 2, 64, True, 0, None),
    "append several, see them in turn": ("fp32", [60, 0], 140, 5, 70, 4, 1, 128, True, 0, None),
    "more queries than keys": ("fp32", [3], 64, 9, 0, 2, 1, 64, True, 0, None),
    "several tokens, not causal": ("fp16", [100, 17], 128, 3, 2, 4, 2, 64, False, 0, None),
    "rows of the cache": ("fp32", [90, 20, 5], 96, 1, 2, 2, 1, 64, True, 0, [4, 0, 2]),
    "pages of 16": ("fp16", [0, 70, 250], 256, 1, 3, 4, 2, 64, True, 16, None),
    "pages of 64": ("fp16", [63, 130], 256, 2, 1, 4, 2, 64, True, 64, None),
    "pages of 256": ("fp16", [255, 300], 512, 1, 2, 2, 1, 128, True, 256, None),
}
# lengths of queries, lengths of keys, nheads, nheads_k, headdim, causal
RAGGED = {
    "prefill": ([1, 70, 130], [1, 70, 130], 2, 1, 64, True),
    "unequal": ([5, 1, 40], [100, 0, 20], 3, 3, 64, True),
    "not causal": ([33, 2], [7, 300], 2, 2, 128, False),
    "long beside few queries": ([1, 3], [600, 129], 2, 2, 64, True),
}


LANES = ("grouped", "append several, see them in turn", "pages of 16", "more queries than keys")


def cases(wrong: bool, lanes: int = 1) -> dict:
    """Every case against the reference; `wrong` plants a length that is too short by one, `lanes`
    deals the keys to so many groups of warps."""
    import dataclasses

    import torch

    from attn_ladder import attention_varlen, attention_with_kvcache, decode
    from attn_ladder.reference import attention_reference, error_bound

    nan = float("nan")
    empty = torch.empty
    torch.empty = lambda *a, **k: (lambda x: x.fill_(nan) if x.is_floating_point() else x)(
        empty(*a, **k)
    )

    def agrees(out, lse, q, k, v, causal):
        ref, ref_lse = attention_reference(q[None], k[None], v[None], causal=causal)
        low, _ = attention_reference(q[None], k[None], v[None], causal=causal, upcast=False)
        bound = error_bound(ref, low)[0] + (1e-4 if q.dtype == torch.float32 else 0.0)
        finite = torch.isfinite(ref_lse)
        right = torch.equal(torch.isfinite(lse[None]), finite)
        right = right and torch.allclose(lse[None][finite], ref_lse[finite], atol=2e-3)
        return bool((out - ref[0]).abs().max().item() <= bound and right)

    done = {}
    chosen = {"grouped": CASES["grouped"]}.items() if wrong else CASES.items()
    if lanes > 1:
        chosen = [(name, CASES[name]) for name in LANES]
        plan = decode.plan
        decode.plan = lambda *a: dataclasses.replace(plan(*a), lanes=lanes)
    for name, (dtype, lens, capacity, sq, new, h, hk, d, causal, page, rows) in chosen:
        torch.manual_seed(0)
        kind = {"fp16": torch.float16, "fp32": torch.float32}[dtype]
        make = lambda *shape, kind=kind: torch.randn(*shape).to(kind)
        batch = len(lens)
        q, ks, vs = (
            make(batch, sq, h, d),
            make(batch, capacity, hk, d),
            make(batch, capacity, hk, d),
        )
        k_new, v_new = (make(batch, new, hk, d), make(batch, new, hk, d)) if new else (None, None)
        arguments = {}
        if page:
            count = batch * capacity // page
            table = torch.randperm(count + 3)[:count].view(batch, -1)
            k_cache = torch.full((count + 3, page, hk, d), nan, dtype=kind)
            v_cache = k_cache.clone()
            arguments["block_table"] = table.to(torch.int32)
        else:
            table = torch.tensor(rows or range(batch))[:, None]
            k_cache = torch.full((5 if rows else batch, capacity, hk, d), nan, dtype=kind)
            v_cache = k_cache.clone()
            if rows:
                arguments["cache_batch_idx"] = torch.tensor(rows, dtype=torch.int32)
        size = page or capacity
        for b, n in enumerate(lens):  # only what is stored is no NaN
            for j in range(n):
                k_cache[table[b, j // size], j % size] = ks[b, j]
                v_cache[table[b, j // size], j % size] = vs[b, j]
        k_want, v_want = k_cache.clone(), v_cache.clone()
        for b, n in enumerate(lens if new else []):
            for j in range(new):
                k_want[table[b, (n + j) // size], (n + j) % size] = ks[b, n + j] = k_new[b, j]
                v_want[table[b, (n + j) // size], (n + j) % size] = vs[b, n + j] = v_new[b, j]
        out, lse = attention_with_kvcache(
            q, k_cache, v_cache, k=k_new, v=v_new, causal=causal, return_lse=True, **arguments,
            cache_seqlens=torch.tensor([max(0, n - wrong) for n in lens], dtype=torch.int32),
        )  # fmt: skip
        good = [
            agrees(out[b], lse[b], q[b], ks[b, : n + new], vs[b, : n + new], causal)
            for b, n in enumerate(lens)
        ]
        stored = torch.equal(k_cache.nan_to_num(9.0), k_want.nan_to_num(9.0))
        stored = stored and torch.equal(v_cache.nan_to_num(9.0), v_want.nan_to_num(9.0))
        done[name] = all(good) and stored

    for name, (lens_q, lens_k, h, hk, d, causal) in {} if wrong or lanes > 1 else RAGGED.items():
        torch.manual_seed(0)
        q, k = torch.randn(sum(lens_q), h, d), torch.randn(sum(lens_k), hk, d)
        v = torch.randn(sum(lens_k), hk, d)
        cu = [torch.tensor([0, *x], dtype=torch.int32).cumsum(0).to(torch.int32)
              for x in (lens_q, lens_k)]  # fmt: skip
        out, lse = attention_varlen(
            q, k, v, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1], max_seqlen_q=max(lens_q),
            max_seqlen_k=max(lens_k), causal=causal, return_lse=True,
        )  # fmt: skip
        good = True
        for b in range(len(lens_q)):
            qs, ks = slice(*cu[0][b : b + 2].tolist()), slice(*cu[1][b : b + 2].tolist())
            if lens_k[b] == 0:
                good &= bool((out[qs] == 0).all()) and bool((lse[:, qs] == -torch.inf).all())
            else:
                good &= agrees(out[qs], lse[:, qs], q[qs], k[ks], v[ks], causal)
        done[name] = good
    return done


def invariance() -> dict:
    """A sequence alone, in a batch, paged and padded on the left: the same bits?"""
    import dataclasses

    import torch

    from attn_ladder.decode import CACHE, RANGE, launch, plan

    torch.manual_seed(0)
    lens, capacity = [1100, 64, 333], 1152
    q, k = torch.randn(3, 1, 4, 64), torch.randn(3, capacity, 2, 64)
    v = torch.randn(3, capacity, 2, 64)
    ints = lambda x: torch.tensor(x, dtype=torch.int32)
    together = launch(q, k, v, mode=CACHE, bounds=ints(lens))
    pages = launch(
        q, k.view(54, 64, 2, 64), v.view(54, 64, 2, 64), mode=CACHE, bounds=ints(lens),
        block_table=torch.arange(54, dtype=torch.int32).view(3, 18),
    )  # fmt: skip
    padded = [torch.zeros_like(k), torch.zeros_like(v)]
    bounds = [[capacity - n, capacity, capacity - 1] for n in lens]
    for b, n in enumerate(lens):
        padded[0][b, capacity - n :], padded[1][b, capacity - n :] = k[b, :n], v[b, :n]
    left = launch(q, *padded, mode=RANGE, bounds=ints(bounds))
    config = dataclasses.replace(plan(1, 4, 2, 64), max_splits=2)
    other = launch(q, k, v, mode=CACHE, bounds=ints(lens), config=config)
    alone = True
    for b, n in enumerate(lens):
        one = slice(b, b + 1)
        part = launch(q[one], k[one, :n], v[one, :n], mode=CACHE, bounds=ints([n]))
        alone &= all(torch.equal(x[0], y[b]) for x, y in zip(part, together, strict=True))
    equal = lambda a: all(torch.equal(x, y) for x, y in zip(a, together, strict=True))
    return {
        "splits": -(-lens[0] // plan(1, 4, 2, 64).min_split),
        "alone": bool(alone),
        "pages": equal(pages),
        "left padding": equal(left),
        "another policy": equal(other),
        "close": torch.allclose(other[0], together[0], atol=1e-5),
    }


def combine() -> dict:
    """The combine in the last CTA of a tile, and what shows that it counts right."""
    import dataclasses

    import torch

    from attn_ladder import decode
    from attn_ladder.decode import CACHE, clear_errors, counters, launch, plan

    torch.manual_seed(0)
    ints = lambda x: torch.tensor(x, dtype=torch.int32)
    nan = float("nan")
    empty = torch.empty
    torch.empty = lambda *a, **k: (lambda x: x.fill_(nan) if x.is_floating_point() else x)(
        empty(*a, **k)
    )
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    # 21 splits, so more than a chunk of them; one split; no key
    lens, capacity, h, hk = [1300, 64, 0], 1344, 6, 2
    config = dataclasses.replace(plan(1, h, hk, 64), max_splits=32, min_split=64)
    q, k = torch.randn(3, 1, h, 64), torch.randn(3, capacity, hk, 64)
    v = torch.randn(3, capacity, hk, 64)
    call = lambda **changes: launch(
        q, k, v, **{"mode": CACHE, "bounds": ints(lens), "config": config, **changes}
    )
    fused = call()
    counter = counters(q.device, 1)
    done = {"splits": [-(-n // 64) for n in lens], "zeroed": not bool(counter.any())}
    launches = []
    kernel = decode.combine_kernel
    spy = type("Spy", (), {"__getitem__": lambda _, grid: lambda *a, **n: (
        launches.append(grid), kernel[grid](*a, **n))})()  # fmt: skip
    decode.combine_kernel = spy
    done["again"] = same(call(), fused) and not launches
    large = call(config=dataclasses.replace(config, BLOCK_M=32))
    done["separate"] = len(launches) == 1
    done["close"] = all(torch.allclose(x, y, atol=1e-5) for x, y in zip(large, fused, strict=True))
    one = call(config=dataclasses.replace(config, max_splits=1))
    done["as one split"] = all(
        torch.allclose(x, y, atol=1e-5) for x, y in zip(one, fused, strict=True)
    )
    counter.fill_(1)  # the CTA before the last one combines
    wrong = call()
    counter.zero_()
    done["wrong count"] = [bool(x.isnan().any()) for x in wrong[0]]
    counter.fill_(2**20)  # nobody does
    wrong = call()
    counter.zero_()
    done["no count"] = [bool(x.isnan().all()) for x in wrong[0]]
    # more counters than the pool holds: those of the call
    pool, decode.POOL_COUNTERS, decode._POOLS = decode._POOLS, 4, {}
    done["pool used up"] = same(call(), fused) and decode._POOLS[q.device][2] == [0]
    decode._POOLS = pool
    # one bad page of one split
    table = torch.arange(63, dtype=torch.int32).view(3, 21)
    paged = lambda table: call(k=k.view(63, 64, hk, 64), v=v.view(63, 64, hk, 64),
                               block_table=table)  # fmt: skip
    call = lambda k=k, v=v, **changes: launch(
        q, k, v, mode=CACHE, bounds=ints(lens), config=config, **changes
    )
    done["paged"] = same(paged(table), fused)
    # a capacity that would be split otherwise than the length, and unused pages that are bad
    two = dataclasses.replace(config, max_splits=2)
    wide = torch.cat([table, torch.full((3, 21), -1, dtype=torch.int32)], 1)
    views = [x.view(63, 64, hk, 64) for x in (k, v)]
    done["paged, larger capacity"] = same(
        launch(q, *views, mode=CACHE, bounds=ints(lens), config=two, block_table=wide),
        launch(q, k, v, mode=CACHE, bounds=ints(lens), config=two),
    )
    done["no flag"] = not clear_errors(q.device)
    table[0, 7] = 63
    bad = paged(table)
    done["poison"] = [bool(bad[0][0].isnan().all()), bool(bad[1][0].isnan().all()),
                      same([x[1:] for x in bad], [x[1:] for x in fused]),
                      [text.split(":")[0] for text in clear_errors(q.device)]]  # fmt: skip
    done["zeroed after it"] = not bool(counter.any())
    return done


def errors() -> dict:
    """Bad values that reach the device: NaN for their sequence, the flag, nothing else touched."""
    import torch

    from attn_ladder.decode import CACHE, RANGE, VARLEN, clear_errors, launch

    torch.manual_seed(0)
    ints = lambda x: torch.tensor(x, dtype=torch.int32)
    around = torch.full((2, 12, 16, 1, 64), float("nan"))  # pages 4 to 7 are the cache
    around[:, 4:8] = torch.randn(2, 4, 16, 1, 64)
    k, v = around[0, 4:8], around[1, 4:8]
    q, new = torch.randn(2, 1, 2, 64), torch.randn(2, 1, 1, 64)
    huge = 2**31 - 1
    trials = {
        "nothing wrong": dict(bounds=ints([5, 9])),
        "negative length": dict(bounds=ints([5, -1])),
        "length beyond the capacity": dict(bounds=ints([5, 16])),
        "huge length": dict(bounds=ints([5, huge])),
        "row": dict(bounds=ints([5, 9]), index=ints([1, 4])),
        "negative row": dict(bounds=ints([5, 9]), index=ints([1, -1])),
        "page": dict(bounds=ints([20, 20]), block_table=ints([[0, 1], [2, 4]])),
        "negative page": dict(bounds=ints([20, 20]), block_table=ints([[0, 1], [-1, 3]])),
    }
    done = {}
    for name, arguments in trials.items():
        before = around.clone()
        out, lse = launch(q, k, v, mode=CACHE, k_new=new, v_new=new, **arguments)
        nan = [bool(x.isnan().all()) for x in out], [bool(x.isnan().all()) for x in lse]
        any_nan = bool(out[0].isnan().any())
        guard = torch.cat([around[:, :4], around[:, 8:]], 1)
        written = (
            (around != before)[:, 4:8].flatten(2).any(2).sum().item()
        )  # pages written, K and V
        done[name] = [nan[0][1], nan[1][1], any_nan, bool(guard.isnan().all()), written,
                      clear_errors(q.device)]  # fmt: skip
        around.copy_(before)
    rows = torch.randn(8, 1, 64)
    for name, cu_q, cu_k in (
        ("varlen, nothing wrong", [0, 1, 2], [0, 3, 8]),
        ("varlen, keys end outside", [0, 1, 2], [0, 3, 9]),
        ("varlen, keys decrease", [0, 1, 2], [0, 3, 1]),
        ("varlen, queries end outside", [0, 1, huge], [0, 3, 8]),
    ):
        out, _ = launch(
            q[:, 0], rows, rows, mode=VARLEN, bounds=ints(cu_k), index=ints(cu_q), max_seqlen_q=1
        )
        done[name] = [bool(out[0].isfinite().all()), clear_errors(q.device)]
    for name, bounds in (
        ("range, nothing wrong", [0, 16, 15]),
        ("range, a mask with holes", [-1, 7, 15]),
        ("range beyond the keys", [0, 17, 15]),
    ):
        out, _ = launch(q[:1], k[:1], v[:1], mode=RANGE, bounds=ints([bounds]))
        done[name] = [bool(out.isnan().all()), clear_errors(q.device)]
    return done


# lengths, capacity, seqlen_new, page size, rows of the cache, page of the table that is bad
APPENDS = {
    "one key": ([0, 5, 95], 96, 1, 0, None, None),
    "over blocks of 16": ([0, 5, 31, 56], 96, 40, 0, None, None),
    "a whole cache": ([0], 96, 96, 0, None, None),
    "rows of the cache": ([7, 60, 16], 96, 20, 0, [4, 0, 2], None),
    "pages of 16": ([0, 15, 16, 40], 64, 24, 16, None, None),
    "pages of 64": ([60, 0, 100], 128, 28, 64, None, None),
    "bad lengths": ([-1, 57, 5, 2**31 - 1, -(2**31)], 96, 40, 0, None, None),
    "bad rows": ([3, 9, 20, 1], 96, 20, 0, [5, 2, -1, 2**31 - 1], None),
    "a page that does not exist": ([0, 10, 16], 64, 40, 16, None, (1, 2, 20)),
    "a negative page": ([0, 10, 16], 64, 40, 16, None, (2, 1, -1)),
    "a bad page before": ([0, 20, 16], 64, 30, 16, None, (1, 0, 20)),
    "a bad page behind": ([0, 20, 16], 64, 20, 16, None, (0, 3, 99)),
}
FAULTS = ("blocks", "lengths", "values")
FAULTY = ("over blocks of 16", "pages of 16", "a page that does not exist")


def append(fault: str = "") -> dict:
    """`decode.append` of every case: as `launch` appends, as a loop does, nothing else touched, and
    what is flagged; `fault` plants one in a few, which are compared with the loop only."""
    import torch

    from attn_ladder import decode

    ints = lambda x: torch.tensor(x, dtype=torch.int32)
    kernel = decode.append_kernel
    if fault == "blocks":  # one program too few for each sequence
        decode.append_kernel = type("Short", (), {"__getitem__": lambda _, grid: lambda *a, **n: (
            kernel[(grid[0], grid[1] - 1)](*a, **n))})()  # fmt: skip
    done = {}
    for name in FAULTY if fault else APPENDS:
        lens, capacity, new, page, rows, bad = APPENDS[name]
        torch.manual_seed(0)
        batch, hk, d = len(lens), 2, 64
        size = page or capacity
        number = 20 if page else 5 if rows else batch
        # the cache lies within rows, keys and heads that are not its own
        around = torch.full((2, number + 2, size + 1, hk + 1, d), float("nan"), dtype=torch.float16)
        inside = (slice(None), slice(1, -1), slice(0, size), slice(0, hk))
        around[inside] = torch.randn(2, number, size, hk, d).half()
        k_new, v_new = torch.randn(2, batch, new + 3, hk, d).half()[:, :, 3:]
        where = {}
        table = torch.tensor([r if 0 <= r < number else 0 for r in rows or range(batch)])[:, None]
        if page:
            table = torch.randperm(number)[: batch * capacity // page].view(batch, -1)
            if bad is not None:
                table[bad[0], bad[1]] = bad[2]
            where["block_table"] = table.to(torch.int32)
        elif rows:
            where["index"] = ints(rows)
        want, launched = around.clone(), around.clone()
        for b, n in enumerate(lens):
            if not 0 <= n <= capacity - new or (rows and not 0 <= rows[b] < number):
                continue
            for j in range(new):
                place = int(table[b, (n + j) // size])
                if 0 <= place < number:
                    want[0, 1 + place, (n + j) % size, :hk] = k_new[b, j]
                    want[1, 1 + place, (n + j) % size, :hk] = v_new[b, j]
        if not fault:
            decode.launch(
                torch.randn(batch, 1, hk, d).half(), *launched[inside], mode=decode.CACHE,
                bounds=ints(lens), k_new=k_new, v_new=v_new, **where,
            )  # fmt: skip
        texts = [decode.clear_errors("cpu")]
        late = [n + (fault == "lengths") for n in lens]
        if fault == "values":
            v_new = k_new
        decode.append(*around[inside], k_new, v_new, bounds=ints(late), **where)
        texts.append(decode.clear_errors("cpu"))
        bits = lambda x: x.view(torch.int16)
        done[name] = [
            torch.equal(bits(around), bits(launched)), torch.equal(bits(around), bits(want)),
            [[text.split(":")[0] for text in said] for said in texts],
        ]  # fmt: skip
    decode.append_kernel = kernel
    return done


def run(what: str) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, what],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def outcome() -> dict:
    return run("cases")


@pytest.fixture(scope="module")
def flagged() -> dict:
    return run("errors")


@pytest.mark.parametrize("name", [*CASES, *RAGGED])
def test_matches_the_reference(outcome, name):
    assert outcome[name]


def test_keys_dealt_to_warps_match_the_reference():
    done = run("lanes")
    assert set(done) == set(LANES) and all(done.values()), done


def test_a_length_too_short_by_one_is_caught():
    assert not any(run("wrong").values())


def test_a_sequence_has_the_same_bits_alone_and_in_a_batch():
    done = run("invariance")
    assert done["splits"] > 8  # the lengths span splits
    assert done["alone"] and done["pages"] and done["left padding"]
    assert not done["another policy"]  # so the comparison sees a difference of rounding
    assert done["close"]


def test_the_last_block_of_threads_combines_the_splits():
    done = run("combine")
    assert done["splits"] == [21, 1, 0]
    assert done["zeroed"] and done["again"] and done["paged"]
    assert done["separate"]  # a tile of more rows has a kernel for it
    assert done["close"] and done["as one split"]
    # a count that is wrong is seen, and where there is one split nothing is counted
    assert done["wrong count"] == done["no count"] == [True, False, False]
    assert done["pool used up"]
    assert done["paged, larger capacity"] and done["no flag"]
    assert done["poison"] == [True, True, True, ["block_table"]] and done["zeroed after it"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("negative length", "cache_seqlens"),
        ("length beyond the capacity", "cache_seqlens"),
        ("huge length", "cache_seqlens"),
        ("row", "cache_batch_idx"),
        ("negative row", "cache_batch_idx"),
        ("page", "block_table"),
        ("negative page", "block_table"),
    ],
)
def test_a_bad_value_on_the_device_gives_nan_and_sets_the_flag(flagged, name, message):
    out_nan, lse_nan, other_nan, guarded, written, texts = flagged[name]
    assert out_nan and lse_nan and not other_nan
    assert guarded  # nothing around the cache was written
    assert written <= 4  # at most the page of the good sequence and that of the bad one, K and V
    assert len(texts) == 1 and texts[0].startswith(message)


def test_good_values_set_no_flag(flagged):
    assert flagged["nothing wrong"] == [False, False, False, True, 4, []]
    assert flagged["varlen, nothing wrong"] == [True, []]
    assert flagged["range, nothing wrong"] == [False, []]


@pytest.mark.parametrize("name", ["keys end outside", "keys decrease", "queries end outside"])
def test_bad_bounds_of_ragged_sequences_leave_the_others_right(flagged, name):
    good, texts = flagged[f"varlen, {name}"]
    assert good and texts[0].startswith("cu_seqlens")


@pytest.mark.parametrize("name", ["range, a mask with holes", "range beyond the keys"])
def test_a_bad_range_gives_nan(flagged, name):
    nan, texts = flagged[name]
    assert nan and texts[0].startswith("key_range")


def test_ragged_keys_are_not_split_though_a_cache_of_them_would_be():
    """Else the case would pass with all splits but the first left out."""
    from attn_ladder.decode import plan

    lens_q, lens_k, h, hk, d, _ = RAGGED["long beside few queries"]
    config = plan(max(lens_q), h, hk, d)
    assert config.max_splits > 1 and max(lens_k) > config.min_split


APPEND_FLAGS = {  # by `launch`, which reads all keys, and by `append`
    "bad lengths": [["cache_seqlens"], []],
    "bad rows": [["cache_batch_idx"], []],
    "a page that does not exist": [["block_table"], ["block_table"]],
    "a negative page": [["block_table"], ["block_table"]],
    "a bad page before": [["block_table"], []],
}


@pytest.fixture(scope="module")
def appended() -> dict:
    return run("append")


@pytest.mark.parametrize("name", APPENDS)
def test_new_keys_are_appended_as_the_attention_does_and_nothing_else_is_touched(appended, name):
    as_launch, as_loop, flags = appended[name]
    assert as_launch and as_loop
    assert flags == APPEND_FLAGS.get(name, [[], []])


def test_keys_appended_wrongly_would_be_seen():
    done = run("append wrongly")
    assert set(done) == set(FAULTS)
    for fault, found in done.items():
        assert set(found) == set(FAULTY)
        assert not any(as_loop for _, as_loop, _ in found.values()), fault


def test_counters_are_shared_by_a_stream_and_owned_by_a_captured_launch(monkeypatch):
    import torch

    from attn_ladder import decode

    monkeypatch.setattr(decode, "_POOLS", {})
    monkeypatch.setattr(decode, "POOL_COUNTERS", 2 * 4096 + 3 * 32)
    take = lambda *a: decode.take_counters(torch.device("cpu"), *a)
    assert take(8, 1, True) is None  # no pool is created under capture
    first, second = take(8, 1, False), take(8, 2, False)
    captured = [take(10, 1, True) for _ in range(2)]  # on a stream that has a slice
    places = [(x.storage_offset(), x.storage_offset() + x.numel())
              for x in (first, second, *captured)]  # fmt: skip
    assert all(a[1] <= b[0] for a, b in zip(places, places[1:], strict=False))
    assert all(first % 32 == 0 for first, _ in places)  # else a capture would compile anew
    assert take(4096, 1, False).data_ptr() == first.data_ptr()
    assert take(4097, 1, False) is None and take(4096, 1, False).data_ptr() == first.data_ptr()
    assert take(10, 1, True) is not None  # what is left of the pool
    assert take(1, 3, True) is None


if __name__ == "__main__":
    what = sys.argv[1]
    if what in ("cases", "wrong", "lanes"):
        print(json.dumps(cases(what == "wrong", 4 if what == "lanes" else 1)))
    elif what == "append wrongly":
        print(json.dumps({fault: append(fault) for fault in FAULTS}))
    else:
        run_it = {
            "invariance": invariance, "errors": errors, "combine": combine, "append": append
        }[what]  # fmt: skip
        print(json.dumps(run_it()))
