"""Stages 1 to 4 compiled for sm_90a without a GPU: registers, spills, shared memory, barriers.

Compiling can abort the process, so each stage is compiled in a process of its own, all of its
configurations at once: this file run as a script prints what became of them as JSON.
"""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from attn_ladder.offline import (
    SHARED_LIMIT,
    assemble,
    barrier_reuse,
    between,
    descriptor,
    inner_loops,
    overlapped,
    read_ptxas,
)
from attn_ladder.problem import Problem
from attn_ladder.reference import visible

KERNELS = Path(__file__).parents[1] / "kernels"
GLUON = ("stage2_signalling", "stage3_persistent", "stage4_pipeline")
HEADDIMS = (64, 128, 256)
# (headdim, dtype, causal) of each report
CASES = [(d, "bf16", causal) for d in HEADDIMS for causal in (False, True)] + [(64, "fp16", True)]
SPILLS = {"BLOCK_N": 128, "num_registers": 128}  # too few registers for headdim 128
REWAIT = "        mbarrier.wait(v_ring[1].index(slot), phase)\n        acc, p, l_i"


def compile_case(module: str, headdim: int, dtype: str, causal: bool, changes: dict) -> dict:
    """Compile one configuration in this process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    stage = importlib.import_module(f"attn_ladder.{module}")
    config = dataclasses.replace(stage.CONFIGS[headdim], **changes)
    kernel = stage.attention_kernel
    names = kernel.arg_names
    attributes: dict = {}
    if kernel.is_gluon():
        element = {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]

        def tile(rows: int) -> str:
            block = [1, rows, 1, headdim]
            return descriptor(dtype, block, gl.NVMMASharedLayout.get_default_for(block, element))

        rows = {"q_desc": 64, "k_desc": config.BLOCK_N, "v_desc": config.BLOCK_N, "out_desc": 64}
        types = {name: tile(n) for name, n in rows.items()}
        constexprs = {"CAUSAL": causal, "cfg": config}
        options = {"num_warps": 4, "maxnreg": getattr(config, "num_registers", None)}
        make = GluonASTSource
    else:
        types = {f"{x}_ptr": f"*{dtype}" for x in ("q", "k", "v", "out")}
        constexprs = {"CAUSAL": causal, "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N}
        constexprs |= {"HEADDIM": headdim, "BLOCK_D": headdim}
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        aligned = [n for n in names if n.endswith("_ptr") or n.startswith("stride")]
        attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
        make = ASTSource
    types |= {"lse_ptr": "*fp32", "qk_scale": "fp32"}
    signature = {n: "constexpr" if n in constexprs else types.get(n, "i32") for n in names}
    values = {(names.index(n),): value for n, value in constexprs.items()}
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(
        make(kernel, signature, values, attributes), target=target, options=options
    )
    log, sass = assemble(compiled.asm["ptx"])
    registers, spill_bytes, notes = read_ptxas(log)
    loops = [b for b in inner_loops(sass) if any(name.startswith("HGMMA") for name, _ in b)]
    return {
        "registers": registers,
        "spill_bytes": spill_bytes,
        "notes": notes,
        "reuse": barrier_reuse(compiled.asm["ptx"]),
        "shared": compiled.metadata.shared,
        "threads": 32 * compiled.metadata.num_warps,
        "loops": loops,
    }


def compile_in_process(module: str, cases: list, kernels: Path = KERNELS) -> list[dict]:
    environment = {**os.environ, "PYTHONPATH": str(kernels)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, __file__, module, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@cache
def compiling() -> dict[str, Future]:
    """All stages, compiled at the same time."""
    cases = {module: [(*case, {}) for case in CASES] for module in GLUON}
    cases["stage2_signalling"].append((128, "bf16", True, SPILLS))
    cases["stage1_fused"] = [(64, "bf16", True, {})]
    pool = ThreadPoolExecutor(2)
    return {m: pool.submit(compile_in_process, m, list_) for m, list_ in cases.items()}


def reports(module: str) -> dict:
    found = compiling()[module].result()
    return dict(zip([*CASES, "spills"], found, strict=False))


def shipped(module: str) -> dict:
    return {case: report for case, report in reports(module).items() if case in CASES}


def barriers(loop: list, threads: int) -> tuple[int, int]:
    """(`BAR.SYNC` that the whole CTA joins, those that fewer threads join) in a loop."""
    counts = [operands.split(",")[1:] for name, operands in loop if name.startswith("BAR.SYNC")]
    whole = sum(not count or int(count[0], 16) == threads for count in counts)
    return whole, len(counts) - whole


@pytest.mark.parametrize("module", GLUON)
def test_the_model_counts_the_instructions_of_a_step(module: str) -> None:
    from attn_profiling.predict import tiles  # this file is also a script that sees kernels/ only

    for headdim in (64, 128):
        problem = Problem("x", ("s",), "bf16", 1, 1024, 1024, 1, 1, headdim, False)
        known = tiles(module.split("_")[0], problem).instructions
        loops = shipped(module)[headdim, "bf16", False]["loops"]
        counts = [sum(name != "LABEL" for name, _ in loop) for loop in loops]
        assert min(counts) == pytest.approx(known, rel=0.02), headdim
        assert min(counts) != pytest.approx(1.1 * known, rel=0.02), headdim


@pytest.mark.parametrize("module", GLUON)
def test_every_configuration_fits(module: str) -> None:
    for case, report in shipped(module).items():
        ctas = 65536 // (report["registers"] * report["threads"])
        assert ctas >= 1, case
        assert ctas * report["shared"] <= SHARED_LIMIT, case
        assert report["notes"] == [], case
        # headdim 256 keeps some values of a query tile in memory, outside its loops
        assert report["spill_bytes"] <= (96 if case[0] == 256 else 0), case
        for loop in report["loops"]:
            assert not [x for x in loop if x[0].startswith(("LDL", "STL"))], case


@pytest.mark.parametrize("module", GLUON)
def test_two_ctas_share_an_sm_at_headdim_64_until_one_has_all_registers(module: str) -> None:
    report = reports(module)[64, "bf16", True]
    ctas = 65536 // (report["registers"] * report["threads"])
    assert ctas == (1 if module == "stage4_pipeline" else 2)


@pytest.mark.parametrize("module", GLUON)
def test_no_barrier_of_the_whole_cta_in_a_loop(module: str) -> None:
    for case, report in shipped(module).items():
        assert len(report["loops"]) == 2, case  # one of each warpgroup
        for loop in report["loops"]:
            assert barriers(loop, report["threads"])[0] == 0, case


@pytest.mark.parametrize("module", GLUON)
def test_no_data_in_the_memory_of_a_barrier(module: str) -> None:
    """The tests of stage 5 show that it is seen."""
    for case, report in shipped(module).items():
        assert report["reuse"] == [], case


def test_stage1_meets_twice_per_key_tile() -> None:
    """What stage 2 removes; also shows that the count above sees such a barrier."""
    (report,) = compiling()["stage1_fused"].result()
    assert [barriers(loop, report["threads"])[0] for loop in report["loops"]] == [2, 2]


def test_the_softmax_of_stage4_runs_under_a_product() -> None:
    for (headdim, _, causal), report in shipped("stage4_pipeline").items():
        per_thread = (64 if headdim == 256 else 128) // 2
        for loop in report["loops"]:
            hidden = overlapped(loop)
            if headdim == 64:  # under the products of the other consumer, which has the turn
                hidden = between(loop, r"BAR\.ARV", r"BAR\.SYNC")
            assert hidden >= per_thread, (headdim, causal)


def test_stage3_waits_for_each_product_before_the_softmax() -> None:
    for report in shipped("stage3_persistent").values():
        assert all(overlapped(loop) == 0 for loop in report["loops"])


def test_the_overlap_of_stage4_is_lost_without_the_second_wait(tmp_path: Path) -> None:
    """The same kernel without the branch that holds ptxas back: the overlap test would fail."""
    package = tmp_path / "attn_ladder"
    package.mkdir()
    shared = ("problem", "stage", "offline", "reference", "launch", "tiles", "warpgroup")
    for name in (f"{module}.py" for module in shared):
        (package / name).write_text((KERNELS / "attn_ladder" / name).read_text())
    (package / "__init__.py").write_text("")
    text = (KERNELS / "attn_ladder" / "stage4_pipeline.py").read_text()
    assert text.count(REWAIT) == 1
    mutant = text.replace(REWAIT, "        acc, p, l_i")
    (package / "stage4_pipeline.py").write_text(mutant)
    (report,) = compile_in_process("stage4_pipeline", [(128, "bf16", True, {})], tmp_path)
    assert all(overlapped(loop) < 64 for loop in report["loops"])


def test_spills_are_seen() -> None:
    assert reports("stage2_signalling")["spills"]["spill_bytes"] > 0


@pytest.mark.parametrize("module", GLUON)
def test_bad_configurations_are_named(module: str) -> None:
    config = importlib.import_module(f"attn_ladder.{module}").Config
    with pytest.raises(ValueError, match="BLOCK_N=96 must be 64 or 128"):
        config(BLOCK_N=96)
    few = 0 if module == "stage4_pipeline" else 1  # one tile that is loaded and computed on at once
    with pytest.raises(ValueError, match=f"num_buffers={few} must be at least {few + 1}"):
        config(num_buffers=few)


@pytest.mark.parametrize("module", GLUON)
def test_what_cannot_run_is_said(module: str) -> None:
    from attn_ladder.problem import Problem

    unsupported = importlib.import_module(f"attn_ladder.{module}").unsupported
    fields = dict(id="x", suites=("smoke",), dtype="bf16", batch=1, seqlen_q=8, seqlen_k=8)
    fields |= dict(nheads=1, nheads_k=1, causal=True)
    assert unsupported(Problem(**fields, headdim=64), (9, 0)) is None
    assert "8.0" in unsupported(Problem(**fields, headdim=64), (8, 0))
    assert "headdim=96" in unsupported(Problem(**fields, headdim=96), (9, 0))
    assert "page_size=16" in unsupported(Problem(**fields, headdim=64, page_size=16), (9, 0))


def as_python(module: str, first: str, **scope: object) -> dict:
    """Device functions of scalars, from `first` up to what loads or counts, as plain Python."""
    text = (KERNELS / "attn_ladder" / f"{module}.py").read_text()
    end = re.search(r"@gluon.jit\ndef (load|producer|num_tiles)", text)
    assert end is not None
    source = text[text.index(f"def {first}(") : end.start()]
    source = source.replace("@gluon.jit", "").replace(".to(gl.int32)", "")
    exec(source, scope)
    return scope


@pytest.mark.parametrize("num_ctas", [132, 264])
@pytest.mark.parametrize(("seqlen", "num_heads"), [(512, 1024), (2048, 256), (8192, 64), (300, 9)])
def test_the_lists_of_tiles_cover_every_tile_once(
    seqlen: int, num_heads: int, num_ctas: int
) -> None:
    """Every query tile is on one list, and all lists are nearly equal work."""
    num_m = -(-seqlen // 128)
    num_ctas = min(num_ctas, num_m * num_heads)
    seen, work = [], []
    for cta in range(num_ctas):
        gl = SimpleNamespace(constexpr=None)
        gl.num_programs = lambda axis: num_ctas
        gl.program_id = lambda axis, cta=cta: cta
        lists = as_python("tiles", "list_length", gl=gl)
        length = lists["list_length"](num_m * num_heads)
        entries = [lists["list_entry"](i, num_m, num_heads, 44) for i in range(length)]
        seen += entries
        work.append(sum(tile_m + 2 for _, tile_m in entries))
    assert sorted(seen) == [(h, m) for h in range(num_heads) for m in range(num_m)]
    if num_heads >= 256:
        assert max(work) <= 1.05 * sum(work) / len(work)


@pytest.mark.parametrize("module", GLUON)
@pytest.mark.parametrize("causal", [False, True])
def test_key_tiles_against_the_mask(module: str, causal: bool) -> None:
    """All that a query tile sees is in its key tiles, and those called whole need no mask."""
    gl = SimpleNamespace(constexpr=None)
    key_tiles = as_python(module, "key_tiles", gl=gl, BLOCK_M=128)["key_tiles"]
    sizes = [(1, 1), (1, 700), (128, 128), (300, 413), (413, 300), (129, 64), (257, 1025)]
    for seqlen_q, seqlen_k in sizes:
        mask = visible(seqlen_q, seqlen_k, causal, "cpu")
        for tile_m in range(-(-seqlen_q // 128)):
            rows = mask[tile_m * 128 : tile_m * 128 + 128]
            num_n, num_whole = key_tiles(tile_m, seqlen_q, seqlen_k, causal, 64)
            keys = rows.any(0).nonzero()
            needed = int(keys.max()) // 64 + 1 if len(keys) else 0
            assert num_n == (max(1, needed) if module == "stage4_pipeline" else needed)
            assert num_whole <= num_n
            assert rows[:, : num_whole * 64].all()
            if num_n:  # one tile more could not be called whole
                rest = rows[:, num_whole * 64 : num_whole * 64 + 64]
                full_tile = len(rows) == 128 and rest.shape[1] == 64
                assert not (full_tile and rest.all())


if __name__ == "__main__":
    print(json.dumps([compile_case(sys.argv[1], *case) for case in json.loads(sys.argv[2])]))
