"""Variants are the top stage with one function replaced, and the stage stays as it is."""

import itertools
import re
import struct
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from attn_ladder import stage5_everything
from attn_ladder.offline import (
    SHARED_LIMIT,
    barrier_reuse,
    inner_loops,
    instructions,
    overlapped,
    report,
    reports,
    serialized,
)
from attn_ladder.problem import Problem
from attn_ladder.stage import kernel_hash, load, subjects
from attn_ladder.variants import (
    _dosed,
    fast_exp,
    four_producers,
    mask_all,
    no_persistent,
    no_ping_pong,
    no_warp_specialization,
    other_turn,
)
from attn_ladder.variants._copied import copied
from attn_profiling.tidy import zero_doses

GATE = (None, (16, 2048, 16, 64), (16, 2048, 16, 64), True, 132)


def hot_loop(kernel: str) -> Counter:
    """Instructions of the longest loop with products, at headdim 128, full."""
    compiled = report(kernel, {"headdim": 128, "causal": False})
    assert compiled.spill_bytes == 0 and not barrier_reuse(compiled.ptx)
    loops = [Counter(name for name, _ in loop) for loop in inner_loops(compiled.sass)]
    return max(loops, key=lambda loop: loop["MUFU.EX2"])


def test_a_quarter_of_the_exponentials_leaves_the_mufu() -> None:
    assert hot_loop("attn_ladder.stage5_everything:offline")["MUFU.EX2"] == 64
    assert hot_loop("attn_ladder.variants.fast_exp:offline")["MUFU.EX2"] == 48


def test_the_polynomial_is_exact_enough() -> None:
    """In fp32, as the assembly computes it; the last constant off by 1 % is seen."""
    products = "".join(x for x in fast_exp.POLYNOMIAL.splitlines() if x.startswith("fma"))
    hexadecimal = re.findall("0f([0-9A-F]{8})", products)
    constants = [struct.unpack(">f", bytes.fromhex(c))[0] for c in hexadecimal]
    f = np.linspace(-0.5, 0.5, 10001, dtype=np.float32)

    def error(c: list[float]) -> float:
        p = f * np.float32(c[0]) + np.float32(c[1])
        p = p * f + np.float32(c[2])
        p = p * f + np.float32(c[3])
        return float(np.abs(p / np.exp2(f.astype(np.float64)) - 1).max())

    assert error(constants) < 1e-4
    assert error([*constants[:3], constants[3] * 1.01]) > 1e-4


def test_scores_far_above_the_reference_stay_above_the_guard() -> None:
    """Beyond 2^128 the exponent would wrap around; without the clamp it does."""
    constants = re.findall("0f([0-9A-Fa-f]{8})", fast_exp.POLYNOMIAL)
    values = [struct.unpack(">f", bytes.fromhex(c))[0] for c in constants]
    (upper,) = re.findall(r"min\.ftz\.f32 x, x, 0f([0-9A-F]{8});", fast_exp.POLYNOMIAL)
    top = struct.unpack(">f", bytes.fromhex(upper))[0]

    def power(x: float, limit: float) -> float:
        x = np.float32(min(x, limit))
        n = np.float32(x + np.float32(12582912.0)) - np.float32(12582912.0)
        p = np.float32(np.exp2(np.float64(x - n)) * values[-1])
        bits = (int(p.view(np.uint32)) + (int(n) << 23)) & 0xFFFFFFFF
        return float(np.uint32(bits).view(np.float32))

    for x in (127.0, 128.0, 129.0, 140.0, 300.0, 1e6):
        assert power(x, top) > 2.0**120
    assert power(140.0, np.inf) < 1.0


def test_one_cta_per_tile() -> None:
    cfg, shape, grid = no_persistent.schedule(*GATE)
    assert grid == shape.num_m * shape.num_heads == 16 * 256
    assert cfg.schedule == "static"
    assert stage5_everything.schedule(*GATE)[2] == 132


def test_no_turns() -> None:
    assert not no_ping_pong._stage.schedule(*GATE)[0].ping_pong
    assert stage5_everything.schedule(*GATE)[0].ping_pong


def test_one_thing_differs() -> None:
    """In every kind of problem of the grid; the stage itself runs none of these."""
    for headdim, causal, seqlen in itertools.product((64, 128), (False, True), (512, 4096, 16384)):
        size = (16384 // seqlen, seqlen, 2048 // headdim, headdim)
        top, *rest = stage5_everything.schedule(None, size, size, causal, 132)
        for variant, change in (
            (mask_all, {"mask_all": True}),
            (four_producers, {"producer_warps": 4}),
            (other_turn, {"overlap": "others" if headdim == 128 else "own"}),
        ):
            assert variant._stage.schedule(None, size, size, causal, 132) == (
                replace(top, **change),
                *rest,
            )
            assert replace(top, **change) != top


@pytest.mark.parametrize("changed", [{"mask_all": True}, {"producer_warps": 4}], ids=str)
def test_a_changed_configuration_spills_nothing(changed: dict) -> None:
    kernel = "attn_ladder.stage5_everything:offline"
    compiled = report(kernel, {"headdim": 128, "causal": True, "q_in_registers": False, **changed})
    assert compiled.spill_bytes == 0 and not barrier_reuse(compiled.ptx)
    masks = [sum(name.startswith("FSEL") for name, _ in b) for b in inner_loops(compiled.sass)]
    assert (sum(n >= 64 for n in masks) >= 2) is ("mask_all" in changed)


SINGLE_ROLE = [
    dict(dtype=dtype, headdim=headdim, causal=causal, seqlen=seqlen)
    for dtype, seqlen in (("bf16", 512), ("bf16", 4096), ("fp16", 4096))
    for headdim, causal in itertools.product((64, 128), (False, True))
]


def test_without_a_producer_the_first_warpgroup_loads_under_its_products() -> None:
    kernel = "attn_ladder.variants.no_warp_specialization:offline"
    for case, compiled in zip(SINGLE_ROLE, reports(kernel, SINGLE_ROLE), strict=True):
        three = not case["causal"] and case["headdim"] == 64 and case["seqlen"] == 4096
        warpgroups = 3 if three else 2
        assert compiled.spill_bytes == 0 and not serialized(compiled.notes), case
        assert compiled.shared <= SHARED_LIMIT and not barrier_reuse(compiled.ptx), case
        loops = [loop for loop in inner_loops(compiled.sass) if overlapped(loop)]
        assert [overlapped(loop) for loop in loops] == [64] * warpgroups, case
        copies = [sum(name.startswith("UTMALDG") for name, _ in loop) for loop in loops]
        assert sorted(copies) == [0] * (warpgroups - 1) + [2], case
        assert not any(name.startswith("FSEL") for loop in loops for name, _ in loop), case


def test_without_a_producer_there_are_no_turns_and_no_counter() -> None:
    for headdim, causal, seqlen in itertools.product((64, 128), (False, True), (512, 4096, 16384)):
        size = (16384 // seqlen, seqlen, 2048 // headdim, headdim)
        top, _, _ = stage5_everything.schedule(None, size, size, causal, 132)
        cfg, shape, grid = no_warp_specialization.schedule(None, size, size, causal, 132)
        assert (cfg.ping_pong, cfg.cross_tile, cfg.overlap) == (False, False, "own")
        assert cfg.schedule == ("pairs" if causal else "static")
        assert cfg.consumers == (2 if causal else top.consumers)
        assert grid == min(132, shape.num_m * shape.num_heads // (2 if causal else 1))
        assert cfg.num_buffers == top.num_buffers and cfg.BLOCK_N == top.BLOCK_N
    odd = (1, 384, 8, 128)
    assert no_warp_specialization.schedule(None, odd, odd, True, 132)[0].schedule == "static"


def test_without_a_producer_ragged_problems_are_refused() -> None:
    whole = Problem("p", ("variant",), "bf16", 1, 256, 512, 4, 2, 64, True)
    assert no_warp_specialization.unsupported(whole, (9, 0)) is None
    for changed in ({"seqlen_k": 500}, {"seqlen_q": 250}, {"seqlen_q": 640}, {"headdim": 256}):
        assert no_warp_specialization.unsupported(replace(whole, **changed), (9, 0))
        size = {"seqlen_q": 256, "seqlen_k": 512, "headdim": 64, **changed}
        q, k = ((1, size[name], 4, size["headdim"]) for name in ("seqlen_q", "seqlen_k"))
        with pytest.raises(ValueError, match="see `unsupported`"):
            no_warp_specialization.schedule(None, q, k, True, 132)
    assert no_warp_specialization.unsupported(whole, (10, 0))


def test_what_is_replaced_is_used_by_the_copy_alone() -> None:
    original = stage5_everything.schedule
    copy = copied(stage5_everything, "test", schedule=len)
    assert copy.runner.schedule("abc") == 3
    assert stage5_everything.schedule is original


def test_a_name_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="defines no exp3"):
        copied(stage5_everything, "test", exp3=len)


def test_variants_are_subjects_whose_hash_follows_the_stage() -> None:
    names = [name for name, found in subjects().items() if found.kind == "variant"]
    assert len(names) == 7
    assert all(subjects()[name].of == "stage5" for name in names)
    assert len({kernel_hash(name) for name in (*names, "stage5")}) == 8


# -- controls

DOSED = "attn_ladder.variants._dosed:offline"


def planted(reports, what) -> list[int]:
    return [sum(bool(re.match(what, name)) for name, _ in instructions(r.sass)) for r in reports]


def test_a_dose_of_barriers_and_of_loads_is_in_the_machine_code() -> None:
    doses = {name: [subjects()[n].dose for n in subjects() if n.startswith(f"control_{name}.")]
             for name in ("sync", "memory")}  # fmt: skip
    assert all(found == sorted(found) and found[0] == 0 for found in doses.values())
    for name, what in (("sync", "BAR.SYNC"), ("memory", "LDG.E.STRONG.SYS")):
        none, *dosed = reports(DOSED, [{name: dose} for dose in doses[name]])
        assert not any(barrier_reuse(compiled.ptx) for compiled in (none, *dosed))
        (least,) = planted([none], what)
        assert [n - least for n in planted(dosed, what)] == doses[name][1:]


def test_a_dose_of_divergence_is_a_loop_that_lanes_leave_at_different_times() -> None:
    """A warp goes round it with fewer and fewer lanes; ptxas neither drops nor predicates it."""
    none, *dosed = reports(DOSED, [{"branching": dose} for dose in (0, 1, 4)])
    assert not planted([none], "BSSY")[0]
    assert planted(dosed, "BSSY") == planted(dosed, "BSYNC") == [1, 1]
    for compiled in dosed:
        rounds = [loop for loop in inner_loops(compiled.sass) if 3 < len(loop) < 8]
        (loop,) = rounds
        assert any(name.startswith("ISETP") for name, _ in loop) and loop[-1][0] == "BRA"


def test_the_planted_launches_do_nothing() -> None:
    empty = report("attn_ladder.variants._dosed:offline_empty", {})
    names = {name for name, _ in instructions(empty.sass)} - {"LABEL"}
    assert names <= {"EXIT", "BRA", "NOP", "LDC"}


def test_without_a_dose_all_controls_run_the_same_kernel(monkeypatch) -> None:
    """So the kernels without a dose are an A/A comparison; a dose is not."""
    ran: list[tuple] = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: ran.append((self.name, grid, kwargs))

    for name in ("dosed_kernel", "empty_kernel"):
        monkeypatch.setattr(_dosed, name, Recorder(name))
    q = torch.zeros(2, 128, 4, 64)
    calls = {}
    for name, subject in subjects().items():
        if subject.kind == "control":
            ran.clear()
            load(name).forward(q, q, q)
            calls[name] = list(ran)
    undosed = [calls[name] for name in zero_doses().values()]
    assert len(undosed) == 4 and all(call == undosed[0] for call in undosed)
    assert sum(call == undosed[0] for call in calls.values()) == 4
    assert [len(calls[f"control_launch.{n}"]) for n in (1, 4, 16)] == [1, 4, 16]
