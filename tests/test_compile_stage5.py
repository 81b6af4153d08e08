"""Every shipped configuration of stage 5, compiled for sm_90a without a GPU.

ptxas decides much of the speed: the same source can come out with spills, with the products
serialized, or with the softmax after the wait for the product it should hide.
"""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from attn_ladder import offline
from attn_ladder.problem import Problem
from attn_profiling.predict import tiles

FACTORY = "attn_ladder.stage5_everything:offline"
LIST_CONFIGS = """
import json
from dataclasses import asdict, replace
from attn_ladder.stage5_everything import choose_config
configs = {
    choose_config(headdim, causal, seqlen, ragged)
    for headdim in (64, 128, 256) for causal in (False, True) for ragged in (False, True)
    for seqlen in (128, 512, 1024, 2048, 4096, 8192, 1 << 20)
}
configs = {replace(config, l2_bytes=0) for config in configs}  # the kernel does not know it
print(json.dumps(sorted((asdict(config) for config in configs), key=str)))
"""
ONLY_WHERE_USED = 'barriers(8, 1) if cfg.schedule == "dynamic" else tiles_smem'


def name(case):
    dtype, config = case
    words = [dtype, f"d{config['headdim']}", "causal" if config["causal"] else "full"]
    words += ["ragged"] * config["ragged"] + [f"{config['consumers']}x64", config["schedule"]]
    return "-".join(words)


def shipped():
    """(dtype, configuration) of what `choose_config` returns, and of the static order that replaces
    the counter where there are more tiles than a CTA can list. fp16 changes no order of tiles, so
    there each kernel is compiled with one order only."""
    command = [sys.executable, "-c", LIST_CONFIGS]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    configs = json.loads(printed)
    static = [{**c, "schedule": "static"} for c in configs if c["schedule"] == "dynamic"]
    one_order = {json.dumps({**c, "schedule": ""}): c for c in configs}.values()
    return [("bf16", c) for c in configs + static] + [("fp16", c) for c in one_order]


CASES = shipped()


@pytest.fixture(scope="module")
def compiled():
    arguments = [{"dtype": dtype, **config} for dtype, config in CASES]
    return dict(
        zip(map(name, CASES), offline.reports(FACTORY, arguments, timeout=900), strict=True)
    )


SPILL_LIMIT = {256: 256}  # bytes; there some values of a tile are kept in memory, outside the loops
FOREIGN = ("FSEL", "FMNMX", "SHFL", "LDL", "STL", "LDS", "STS")  # masks, maxima, local memory
TURN_ENDS, TURN_BEGINS = r"BAR\.ARV 0x[89a], 0x100", r"BAR\.SYNC\S* 0x[89a], 0x100"


def hot_loops(sass):
    """Loops that multiply and release slots of the rings; the redo only multiplies."""
    loops = offline.inner_loops(sass)
    return [b for b in loops if {"HGMMA", "ARRIVES"} <= {opcode.split(".")[0] for opcode, _ in b}]


def hidden_exp2(body, overlap):
    """exp2 of a hot loop that run while products do: the consumer's own, or those of the others,
    which have the turn."""
    if overlap == "own":
        return offline.overlapped(body)
    return offline.between(body, TURN_ENDS, TURN_BEGINS)


def faults(report, config):
    """What is wrong with a compiled kernel, in words."""
    found = []
    threads = 128 * config["consumers"] + 128  # the producer's warp makes a warpgroup
    if report.registers * threads > 65536:
        found.append(f"{report.registers} registers")
    if report.spill_bytes > SPILL_LIMIT.get(config["headdim"], 0):
        found.append(f"{report.spill_bytes} bytes spilled")
    if report.shared > offline.SHARED_LIMIT:
        found.append(f"{report.shared} bytes of shared memory")
    found += offline.serialized(report.notes)
    found += [f"{line} in an mbarrier" for line in offline.barrier_reuse(report.ptx)]
    loops = hot_loops(report.sass)
    if len(loops) != config["consumers"]:
        found.append(f"{len(loops)} hot loops")
    for body in loops:
        if (hidden := hidden_exp2(body, config["overlap"])) != config["BLOCK_N"] // 2:
            found.append(f"{hidden} exp2 under a product")
        if (run := offline.longest_run(body)) > 12:
            found.append(f"{run} exp2 in a row")
        opcodes = Counter(opcode.split(".")[0] for opcode, _ in body)
        found += [f"{opcode} in the hot loop" for opcode in FOREIGN if opcodes[opcode]]
    return found


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_shipped_configuration_compiles_as_intended(compiled, case):
    assert faults(compiled[name(case)], case[1]) == []


def test_no_two_cases_share_a_name():
    assert len({name(case) for case in CASES}) == len(CASES)


# What the checks see when something is wrong.


@pytest.fixture(params=["own", "others"])
def good(compiled, request):
    case = next(c for c in CASES if c[1]["overlap"] == request.param and c[1]["headdim"] < 256)
    return compiled[name(case)], case[1]


def change(report, **values):
    return offline.Report(**{**vars(report), **values})


def move(sass, pattern, text, before=False):
    """`sass` with lines of `text` put after (or before) each line that matches."""
    added = [f"        /*0000*/                   {line} ;" for line in text]
    lines = []
    for line in sass.splitlines():
        hit = re.search(pattern, line)
        lines += [*added, line] if hit and before else [line, *added] if hit else [line]
    return "\n".join(lines)


def test_spills_are_seen(good):
    report, config = good
    log = "Used 168 registers\n 8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads"
    registers, spill_bytes, notes = offline.read_ptxas(log)
    assert (registers, spill_bytes, notes) == (168, 12, ())
    assert faults(change(report, spill_bytes=spill_bytes), config) == ["12 bytes spilled"]


def test_too_many_registers_and_too_much_shared_memory_are_seen(good):
    report, config = good
    assert faults(change(report, registers=200), config) == ["200 registers"]
    assert faults(change(report, shared=232449), config) == ["232449 bytes of shared memory"]


def test_a_spill_in_the_hot_loop_is_seen_where_others_are_let_pass(compiled):
    case = next(c for c in CASES if c[1]["headdim"] == 256)
    report, config = compiled[name(case)], case[1]
    assert faults(change(report, spill_bytes=257), config) == ["257 bytes spilled"]
    sass = move(report.sass, "ARRIVES.LDGSTSBAR", ["LDL R1, [R1]"])
    assert "LDL in the hot loop" in faults(change(report, sass=sass), config)


def test_o_at_headdim_256_is_written_in_whole_sectors_without_shared_memory(compiled):
    for case in CASES:
        opcodes = Counter(opcode for opcode, _ in offline.instructions(compiled[name(case)].sass))
        wide = 4 * 32 if case[1]["headdim"] == 256 else 0  # two consumers, each with its redo
        assert opcodes["STG.E.64"] == wide, name(case)
        assert opcodes["STG.E.U16"] == 0, name(case)


def test_serialized_products_are_seen(good):
    report, config = good
    note = "(C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert faults(change(report, notes=(*report.notes, note)), config) == [note]


@pytest.mark.parametrize("schedule", ["static", "pairs"])
def test_data_in_the_memory_of_barriers_that_nothing_uses_is_seen(tmp_path, monkeypatch, schedule):
    """With the counter's barriers in an order without a counter, the flags are reduced in them."""
    package = tmp_path / "attn_ladder"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(offline.__file__).parent, package, ignore=skip)
    stage = package / "stage5_everything.py"
    text = stage.read_text()
    assert text.count(ONLY_WHERE_USED) == 1
    stage.write_text(text.replace(ONLY_WHERE_USED, "barriers(8, 1)"))
    monkeypatch.setattr(offline, "__file__", str(package / "offline.py"))  # what the child imports
    dtype, config = next(c for c in CASES if c[1]["schedule"] == schedule)
    found = faults(offline.report(FACTORY, {"dtype": dtype, **config}), config)
    assert found and all(fault.endswith("in an mbarrier") for fault in found)
    for access in ("st.shared", "ld.shared"):
        assert any(access in fault for fault in found)


def test_softmax_after_the_wait_or_within_the_turn_is_seen(good):
    report, config = good
    if config["overlap"] == "own":
        early_wait = move(report.sass, "DEPBAR.LE gsb0, 0x1 ;", ["WARPGROUP.DEPBAR.LE gsb0, 0x0"])
        assert "0 exp2 under a product" in faults(change(report, sass=early_wait), config)
    else:
        exp2 = r"MUFU.EX2"
        late = [line for line in report.sass.splitlines() if not re.search(exp2, line)]
        within = move("\n".join(late), r"WARPGROUP.ARRIVE", ["MUFU.EX2 R1, R1"] * 8)
        assert "0 exp2 under a product" in faults(change(report, sass=within), config)


def test_a_mask_and_bunched_exp2_in_the_loop_are_seen(good):
    report, config = good
    planted = ["FSEL R1, R1, -INF , P0"] + ["MUFU.EX2 R1, R1"] * 13
    sass = move(report.sass, "ARRIVES.LDGSTSBAR", planted)
    found = faults(change(report, sass=sass), config)
    assert "FSEL in the hot loop" in found and "13 exp2 in a row" in found


def test_a_lost_loop_is_seen(good):
    report, config = good
    assert faults(change(report, sass=""), config) == ["0 hot loops"]


def test_a_loop_without_turns_is_an_error():
    with pytest.raises(ValueError, match="loop of 1 instructions"):
        offline.between([("MUFU.EX2", "R1, R1")], TURN_ENDS, TURN_BEGINS)


def test_a_configuration_that_does_not_exist_is_an_error():
    with pytest.raises(RuntimeError, match="headdim=80"):
        offline.report(FACTORY, {"headdim": 80, "causal": False})


def test_the_model_counts_the_instructions_of_a_step(compiled):
    for case in CASES:
        config = case[1]
        if config["ragged"] or config["headdim"] == 256:  # which the model does not cover
            continue
        seqlen, headdim = 4096, config["headdim"]
        problem = Problem("x", ("s",), "bf16", 1, seqlen, seqlen, 1, 1, headdim, config["causal"])
        known = tiles("stage5", problem).instructions
        loops = hot_loops(compiled[name(case)].sass)
        fewest = min(sum(opcode != "LABEL" for opcode, _ in body) for body in loops)
        assert fewest == pytest.approx(known, rel=0.02), name(case)
        assert fewest != pytest.approx(1.1 * known, rel=0.02), name(case)
