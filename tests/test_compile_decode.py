"""The decoding kernels compiled without a GPU: spills, shared memory, width of the loads.

Compiling can abort the process, so this file run as a script compiles and prints a summary.
"""

import json
import os
import subprocess
import sys

import pytest

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


@pytest.fixture(scope="module")
def reports() -> dict:
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


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


if __name__ == "__main__":
    print(json.dumps({name: compile_case(*case) for name, case in CASES.items()}))
