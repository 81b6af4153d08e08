"""config/problems.tsv is the grid that was asked for, and a bad row says what is wrong with it."""

from pathlib import Path

import pytest

from attn_ladder.problem import Problem, read_problems, select

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "config" / "problems.tsv"
HEADER = TABLE.read_text().splitlines()[0]
GOOD = "a\tgrid\tbf16\t2\t512\t512\t4\t2\t64\t1\t0"


@pytest.fixture(scope="module")
def problems() -> dict[str, Problem]:
    return read_problems(TABLE)


GRIDS = [("grid", "bf16", (64, 128)), ("grid_fp16", "fp16", (64, 128)), ("grid256", "bf16", (256,))]


@pytest.mark.parametrize(("suite", "dtype", "headdims"), GRIDS)
def test_the_grid_of_the_fa3_paper(problems, suite, dtype, headdims):
    found = {(p.headdim, p.causal, p.seqlen_q) for p in select(problems, suite)}
    lengths = (512, 1024, 2048, 4096, 8192, 16384)
    assert found == {(d, c, s) for d in headdims for c in (False, True) for s in lengths}
    for p in select(problems, suite):
        assert p.dtype == dtype
        assert p.batch * p.seqlen_q == 16384
        assert p.nheads * p.headdim == 2048
        assert (p.seqlen_k, p.nheads_k, p.page_size) == (p.seqlen_q, p.nheads, 0)
    assert len(select(problems, suite)) == 12 * len(headdims)


def test_the_gate_problem_at_every_batch(problems):
    gate = select(problems, "gate")
    assert [p.batch for p in gate] == [1, 2, 4, 8, 16, 32, 64]
    shapes = {(p.dtype, p.seqlen_q, p.seqlen_k, p.nheads, p.headdim, p.causal) for p in gate}
    assert shapes == {("bf16", 2048, 2048, 16, 64, True)}


def test_enough_problems_are_profiled(problems):
    profiled = select(problems, "profile")
    assert len(profiled) >= 8
    assert {(p.headdim, p.causal) for p in profiled if "grid" in p.suites} == {
        (64, False), (64, True), (128, False), (128, True),
    }  # fmt: skip
    assert any("gate" in p.suites for p in profiled)


def test_decoding_has_the_shapes_of_the_script_alone_and_in_pages(problems):
    from attn_profiling.serving_check import DECODE

    for page in (0, 256):
        suite = [p for p in select(problems, "decode") if p.page_size == page]
        found = [(p.batch, p.nheads, p.nheads_k, p.headdim, p.seqlen_k) for p in suite]
        wanted = [(s.batch, s.nheads, s.nheads_k, s.headdim, s.length) for s in DECODE]
        assert found == wanted and len(found) == 23
        assert {(p.dtype, p.seqlen_q, p.causal) for p in suite} == {("bf16", 1, True)}
    few = select(problems, "smoke_decode")
    assert {p.page_size for p in few} == {0, 256} and all("decode" in p.suites for p in few)


def test_smoke_problems_are_tiny(problems):
    assert all(p.flops < 1e10 for p in select(problems, "smoke"))
    assert any(p.seqlen_q != p.seqlen_k for p in select(problems, "smoke"))


def test_odd_problems_are_of_every_kind(problems):
    odd = select(problems, "odd")
    assert {(p.headdim, p.causal) for p in odd} == {
        (d, c) for d in (64, 128, 256) for c in (True, False)
    }  # fmt: skip
    assert {p.dtype for p in odd} == {"bf16", "fp16"}
    assert any(p.seqlen_q == 1 for p in odd) and any(p.seqlen_k == 1 for p in odd)
    assert any(p.nheads // p.nheads_k not in (1, 2, 4, 8) for p in odd)
    assert any(p.seqlen_q % 64 and p.seqlen_k % 64 and p.seqlen_q > 128 for p in odd)
    assert any(p.causal and p.seqlen_q > p.seqlen_k for p in odd), "rows that see no key"


def test_a_good_row_is_read(tmp_path):
    table = tmp_path / "problems.tsv"
    table.write_text(f"{HEADER}\n{GOOD}\n")
    assert read_problems(table)["a"].nheads_k == 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (GOOD.replace("\t512\t512", "\t512"), "expected 11 tab-separated fields"),
        (GOOD + "\t7", "expected 11 tab-separated fields"),
        (GOOD.replace("bf16", "fp32"), "dtype='fp32' must be one of bf16, fp16"),
        (GOOD.replace("\t2\t512", "\ttwo\t512"), "batch='two' must be an integer"),
        (GOOD.replace("\t2\t512", "\t0\t512"), "batch=0 must be at least 1"),
        (GOOD.replace("\t4\t2\t", "\t4\t3\t"), "nheads=4 must be a multiple of nheads_k=3"),
        (GOOD.replace("\t1\t0", "\tyes\t0"), "causal='yes' must be 0 or 1"),
        (GOOD.replace("\t1\t0", "\t1\t-1"), "page_size=-1 must be 0"),
        (GOOD.replace("grid", ""), "suites is empty"),
        (GOOD.replace("a\t", "A b\t", 1), "id='A b' must be lower-case"),
        (f"{GOOD}\n{GOOD}", "id='a' is used twice"),
    ],
)
def test_a_bad_row_names_file_line_and_field(tmp_path, row, said):
    table = tmp_path / "problems.tsv"
    table.write_text(f"{HEADER}\n{row}\n")
    with pytest.raises(ValueError, match="problems.tsv:[23]: ") as error:
        read_problems(table)
    assert said in str(error.value)


def test_a_wrong_header_and_an_empty_table(tmp_path):
    table = tmp_path / "problems.tsv"
    table.write_text(f"{HEADER.replace('batch', 'B')}\n{GOOD}\n")
    with pytest.raises(ValueError, match="columns are"):
        read_problems(table)
    table.write_text(f"{HEADER}\n")
    with pytest.raises(ValueError, match="no problems"):
        read_problems(table)


def test_an_unknown_suite_lists_the_known_ones(problems):
    with pytest.raises(ValueError, match="known suites: .*gate, grid"):
        select(problems, "gird")


def brute_force_pairs(p: Problem) -> int:
    offset = p.seqlen_k - p.seqlen_q
    if not p.causal:
        return p.seqlen_q * p.seqlen_k
    return sum(max(0, min(p.seqlen_k, row + offset + 1)) for row in range(p.seqlen_q))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (7, 7), (5, 9), (9, 5), (1, 6), (6, 1)])
def test_visible_pairs_are_counted_exactly(seqlen_q, seqlen_k, causal):
    p = Problem("p", ("s",), "bf16", 1, seqlen_q, seqlen_k, 1, 1, 64, causal)
    assert p.visible_pairs == brute_force_pairs(p)
