"""The decoding kernels compiled without a GPU: spills, shared memory, width of the loads.

Compiling can abort the process, so this file run as a script compiles and prints a summary.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from attn_ladder.offline import inner_loops, instructions

# name: (sm, headdim, seqlen_q, append, page size, strides known to be multiples of 16 bytes)
CASES = {
    "contiguous": (90, 128, 1, False, 0, True),
    "append to pages of 16": (90, 128, 1, True, 16, True),
    "pages of 256": (90, 128, 1, False, 256, True),
    "sm_80": (80, 64, 1, False, 0, True),
    "strides unknown": (90, 64, 1, False, 0, False),
}
GROUP, NHEADS_K = 4, 8
SHARED_OF_AN_SM = 228 * 1024
# of `decode_hopper`: dtype, headdim, page size, ranged, indexed, batch, rows
HOPPER = {
    "headdim 128": ("bf16", 128, 0, False, False, 32, 4),
    "headdim 64": ("bf16", 64, 0, False, False, 32, 4),
    "ranged": ("bf16", 128, 0, True, False, 32, 4),
    "a large cache": ("bf16", 128, 0, False, False, 32, 4, None, 2**29),
    "16 rows": ("bf16", 128, 0, False, False, 32, 16),
    "a part of a batch": ("fp16", 128, 0, False, True, 512, 4),
    "pages of 16": ("bf16", 128, 16, False, False, 32, 4),
    "pages of 256": ("bf16", 128, 256, False, False, 32, 4),
    "pages of 16, headdim 64, 16 rows": ("bf16", 64, 16, False, False, 32, 16),
}
WITHOUT_SPILLS = ("headdim 128", "headdim 64", "ranged", "a large cache")
LIMIT = 2700  # instructions: where the cache is cold, 100 of them cost 0.15 us


def compile_case(sm: int, headdim: int, seqlen_q: int, append: bool, page: int, aligned: bool):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from attn_ladder import decode
    from attn_ladder.offline import assemble, read_ptxas

    config = decode.plan(seqlen_q, GROUP * NHEADS_K, NHEADS_K, headdim)
    kernel = decode.split_kernel
    names = kernel.arg_names
    values = {
        "SPLIT": True, "FUSED": True, "GROUP": GROUP, "MODE": decode.CACHE, "CAUSAL": True,
        "INDEXED": False, "APPEND": append, "PAGE_SIZE": page, "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N, "LANES": config.lanes, "HEADDIM": headdim,
        "ROWS": min(decode.COMBINED_ROWS, GROUP * seqlen_q), "CHUNK": decode.CHUNK,
    }  # fmt: skip
    types = {f"{x}_ptr": "*bf16" for x in ("q", "k", "v", "k_new", "v_new", "out")}
    types |= {f"{x}_ptr": "*fp32" for x in ("lse", "partial", "partial_lse")}
    types |= {f"{x}_ptr": "*i32" for x in ("bounds", "index", "table", "error", "counter")}
    types["qk_scale"] = "fp32"
    signature = {n: "constexpr" if n in values else types.get(n, "i32") for n in names}
    wide = [n for n in names if n.endswith("_ptr") or (aligned and n.startswith("stride"))]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(n),): value for n, value in values.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in wide},
    )
    num_stages = config.num_stages
    if page % config.BLOCK_N:
        num_stages = 2 * num_stages - 1
    options = {
        "num_warps": config.num_warps, "num_stages": num_stages,
        "maxnreg": decode.max_registers(config, headdim, page, append),
    }  # fmt: skip
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    log, sass = assemble(compiled.asm["ptx"], {90: "sm_90a", 80: "sm_80"}[sm])
    registers, spill_bytes, _ = read_ptxas(log)
    return {
        "registers": registers,
        "spill_bytes": spill_bytes,
        "shared": compiled.metadata.shared,
        "copies_128": sum("LDGSTS" in line and ".128" in line for line in sass.splitlines()),
    }


def compile_hopper(
    dtype: str, headdim: int, page: int, ranged: bool, indexed: bool, batch: int, rows: int,
    maxnreg: int | None = None, kv_bytes: int = 0,
) -> dict:  # fmt: skip
    """As `decode_launch` compiles a call, unless another limit of registers is given."""
    from triton.backends.compiler import GPUTarget

    from attn_ladder import decode_hopper, decode_launch
    from attn_ladder.offline import assemble, barrier_reuse, read_ptxas

    config = decode_launch.choose_config(headdim, kv_bytes)
    cfg = decode_launch.build(config, headdim, page, ranged, indexed, batch, rows)
    source = decode_hopper.source(cfg, dtype)
    compiled = decode_launch.compile_kernel(
        source, GPUTarget("cuda", 90, 32), maxnreg or decode_launch.REGISTERS
    )
    log, sass = assemble(compiled.asm["ptx"])
    registers, spill_bytes, _ = read_ptxas(log)
    moved = re.findall(r"setmaxnreg\.(inc|dec)\S*\s+(\d+)", compiled.asm["ptx"])
    return {
        "registers": registers,
        "spill_bytes": spill_bytes,
        "shared": compiled.metadata.shared,
        "threads": 32 * compiled.metadata.num_warps,
        "moved": sorted({f"{way} {number}" for way, number in moved}),
        "loads": 2 * cfg.parts * cfg.boxes,  # boxes of K and V of a block
        "evict_first": bool(cfg.policy),
        "reused": barrier_reuse(compiled.asm["ptx"]),
        "sass": sass,
    }


def compiled_in_a_process(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def reports() -> dict:
    return compiled_in_a_process()


@pytest.fixture(scope="module")
def hopper() -> dict:
    names = [*HOPPER, "too few registers"]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(
            lambda part: compiled_in_a_process(*part), (names[::2], names[1::2])
        )
    return first | second


@pytest.mark.parametrize("name", [name for name in CASES if name != "strides unknown"])
def test_keys_are_copied_128_bits_at_a_time_without_spills(reports, name):
    assert reports[name]["spill_bytes"] == 0
    assert reports[name]["copies_128"] >= 32


def test_pages_are_as_deep_in_flight_as_a_contiguous_cache(reports):
    # page numbers are in flight too, and a tile of one buffer would need half as much
    contiguous = reports["contiguous"]["shared"]
    assert contiguous <= reports["pages of 256"]["shared"] <= 1.05 * contiguous


def test_two_blocks_of_threads_fit_on_an_sm(reports):
    for name in ("contiguous", "append to pages of 16"):
        assert 2 * (reports[name]["shared"] + 1024) <= SHARED_OF_AN_SM
        assert 2 * 128 * reports[name]["registers"] <= 65536


def test_narrow_copies_would_be_seen(reports):
    assert reports["strides unknown"]["copies_128"] == 0


def hot_loops(sass: str) -> list[Counter]:
    """Instructions of each innermost loop that multiplies or loads by TMA, by name and without
    what follows a dot."""
    counts = [Counter(name.split(".")[0] for name, _ in body) for body in inner_loops(sass)]
    return [count for count in counts if count["HMMA"] or count["UTMALDG"]]


def faults(report: dict) -> list[str]:
    """What is wrong with a compiled `decode_hopper`, in words."""
    found = []
    loops = hot_loops(report["sass"])
    for loop in loops:
        found += [f"{name} in a hot loop" for name in ("LDL", "STL") if loop[name]]
        if loop["HMMA"]:  # K and V come from the ring, whose slots another warp fills
            found += [f"{name} beside HMMA" for name in ("LDG", "LDGSTS", "UTMALDG") if loop[name]]
    loads = sorted(loop["UTMALDG"] for loop in loops)
    if loads != [0, 0, report["loads"]]:  # blocks with a mask and without
        found.append(f"{loads} loads by TMA")
    if 2 * report["registers"] * report["threads"] > 65536:
        found.append(f"{report['registers']} registers of {report['threads']} threads")
    if 2 * (report["shared"] + 1024) > SHARED_OF_AN_SM:
        found.append(f"{report['shared']} bytes of shared memory")
    loaded = [text for name, text in instructions(report["sass"]) if name.startswith("UTMALDG")]
    with_policy = {bool(re.search(r"\], desc\[UR\d+\]$", text)) for text in loaded}
    if with_policy - {report["evict_first"]}:
        found.append(f"a load {'without an' if report['evict_first'] else 'with an'} L2 policy")
    found += [f"{line} in an mbarrier" for line in report["reused"]]
    if not {"dec 216", "inc 40"} <= set(report["moved"]):  # consumer and producer
        found.append(f"registers moved: {', '.join(report['moved'])}")
    return found


def size(report: dict) -> int:
    """Instructions of a compiled kernel."""
    return sum(name not in ("LABEL", "NOP") for name, _ in instructions(report["sass"]))


@pytest.mark.parametrize("name", HOPPER)
def test_two_persistent_blocks_fit_and_their_loops_use_no_local_memory(hopper, name):
    assert faults(hopper[name]) == []


@pytest.mark.parametrize("name", WITHOUT_SPILLS)
def test_few_rows_of_a_contiguous_cache_are_computed_without_spills(hopper, name):
    assert hopper[name]["spill_bytes"] == 0
    opcodes = {opcode.split(".")[0] for opcode, _ in instructions(hopper[name]["sass"])}
    assert not opcodes & {"LDL", "STL"}


@pytest.mark.parametrize("name", WITHOUT_SPILLS)
def test_there_is_little_code(hopper, name):
    assert 1000 < size(hopper[name]) < LIMIT


def test_more_code_would_be_seen(hopper):
    sass = hopper["headdim 128"]["sass"]
    added = (LIMIT - size({"sass": sass})) * "\n        /*0000*/                   MOV R1, R1 ;"
    assert size({"sass": sass + added}) == LIMIT
    assert size({"sass": sass + added.replace("MOV R1, R1", "NOP")}) < LIMIT  # room at the end


def test_spills_would_be_seen(hopper):
    report = hopper["too few registers"]
    assert report["spill_bytes"] > 0
    assert {"LDL in a hot loop", "STL in a hot loop"} <= set(faults(report))
    assert any(fault.startswith("registers moved") for fault in faults(report))


def planted(report: dict, line: str, after: str, **changes) -> list[str]:
    """The faults of a kernel with an instruction put after each that matches."""
    text = f"        /*0000*/                   {line} ;"
    lines = report["sass"].splitlines()
    sass = "\n".join(x + f"\n{text}" * bool(re.search(after, x)) for x in lines)
    return faults({**report, "sass": sass, **changes})


@pytest.mark.parametrize(
    ("line", "after", "found"),
    [
        ("LDL R1, [R1]", r"\bHMMA", "LDL in a hot loop"),
        ("@!P0 STL.64 [R1+0x8], R2", r"\bUTMALDG", "STL in a hot loop"),
        ("LDG.E.128 R4, desc[UR4][R2.64]", r"\bHMMA", "LDG beside HMMA"),
        ("LDGSTS.E.128 [R1], desc[UR4][R2.64]", r"\bHMMA", "LDGSTS beside HMMA"),
        ("UTMALDG.4D [UR8], [UR4], desc[UR6]", r"\bUTMALDG", "[0, 0, 8] loads by TMA"),
        ("UTMALDG.4D [UR8], [UR4]", r"\bHMMA", "a load without an L2 policy"),
    ],
)
def test_a_planted_instruction_is_seen(hopper, line, after, found):
    assert found in planted(hopper["headdim 128"], line, after)


def test_a_policy_that_is_missing_or_too_much_is_seen(hopper):
    small, large = hopper["headdim 128"], hopper["a large cache"]
    assert small["evict_first"] and not large["evict_first"]
    assert faults({**small, "evict_first": False}) == ["a load with an L2 policy"]
    assert faults({**large, "evict_first": True}) == ["a load without an L2 policy"]


def test_a_kernel_too_large_for_two_on_an_sm_is_seen(hopper):
    report = hopper["headdim 128"]
    assert faults({**report, "registers": 136}) == ["136 registers of 256 threads"]
    assert faults({**report, "shared": 113 * 1024 + 1}) == ["115713 bytes of shared memory"]
    assert faults({**report, "shared": 113 * 1024}) == []
    assert faults({**report, "sass": ""}) == ["[] loads by TMA"]


if __name__ == "__main__":
    if sys.argv[1:]:
        few = {"too few registers": (*HOPPER["headdim 128"], 80)}
        print(json.dumps({name: compile_hopper(*(HOPPER | few)[name]) for name in sys.argv[1:]}))
    else:
        print(json.dumps({name: compile_case(*case) for name, case in CASES.items()}))
