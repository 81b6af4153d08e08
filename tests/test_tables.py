"""Tables, figures, report, notebook and the README's headline table, from a synthetic run."""

import ast
import csv
import json
import re
import shutil
from dataclasses import replace
from functools import cache

import matplotlib.pyplot as plt
import pytest
import synthetic
from typer.testing import CliRunner

from attn_ladder import stage
from attn_profiling import environment, metrics, record, verdict
from paper import figures, notebook, numbers, report, tables
from paper.evidence import Value, interval, load, number

RUNNER = CliRunner()
RESULTS = [
    "--problems", str(synthetic.PROBLEMS), "--constraints", str(synthetic.CONSTRAINTS),
]  # fmt: skip


@pytest.fixture(autouse=True)
def closed():
    """Figures that a test leaves open are closed after it."""
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def evidence():
    results = synthetic.shared() / "results"
    return load(results, synthetic.PROBLEMS, synthetic.CONSTRAINTS)


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """What is derived from a run that holds one small suite only."""
    folder = tmp_path_factory.mktemp("smoke")
    maker = synthetic.Maker(folder / "raw")
    maker.device()
    maker.check("smoke")
    maker.timing("smoke", "spaced")
    synthetic.derive(folder / "raw", folder / "results")
    return load(folder / "results", synthetic.PROBLEMS, synthetic.CONSTRAINTS)


@pytest.fixture(scope="module")
def stale(tmp_path_factory):
    """What is derived from a complete run when every kernel has changed since."""
    folder = tmp_path_factory.mktemp("stale")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "stale", lambda data, subject: "its kernel changed")
        synthetic.derive(synthetic.shared() / "measurements" / "h100-sxm-80gb", folder / "results")
    return load(folder / "results", synthetic.PROBLEMS, synthetic.CONSTRAINTS)


def without(folder, drop):
    """What is derived from the complete run, less the rows of its tables that `drop` names."""
    shutil.copytree(synthetic.shared() / "results", folder, dirs_exist_ok=True)
    for name in ("metrics", "speedups"):
        with (folder / f"{name}.csv").open(newline="") as handle:
            rows = list(csv.DictReader(handle))
        with (folder / f"{name}.csv").open("w", newline="") as handle:
            writer = csv.DictWriter(handle, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for row in rows if not drop(row))
    files = [folder / name for name in ("metrics.csv", "speedups.csv", "provenance.json")]
    judged = verdict.verdicts(*files, synthetic.CONSTRAINTS)
    record.write_text(folder / "verdicts.csv", judged)
    return load(folder, synthetic.PROBLEMS, synthetic.CONSTRAINTS)


def is_counter(row):
    """Whether a row of metrics.csv is a counter of the grid or the gate."""
    return row["suite"] in ("grid", "gate") and row.get("metric") in metrics.BY_ID


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """A run that was profiled on `profile` and the controls only."""
    return without(tmp_path_factory.mktemp("older"), is_counter)


@pytest.fixture(scope="module")
def no_fa4(tmp_path_factory):
    """A run of a machine that FA4 was not installed on."""
    return without(
        tmp_path_factory.mktemp("no_fa4"), lambda row: "fa4" in (row["subject"], row.get("peer"))
    )


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A run of the suite of headdim 256, on which two peers and two stages run."""
    folder = tmp_path_factory.mktemp("wide")
    problems = folder / "problems.tsv"
    text = synthetic.PROBLEMS.read_text()
    if "\tgrid256" not in text:
        for causal in (0, 1):
            for seqlen in figures.SEQLENS:
                name = f"grid256-{'causal' if causal else 'full'}-s{seqlen}"
                cells = (name, "grid256", "bf16", 16384 // seqlen, seqlen, seqlen, 8, 8, 256)
                text += "\t".join(map(str, (*cells, causal, 0))) + "\n"
    problems.write_text(text)
    runs = lambda problem, suite: ["stage1", "stage5", "cudnn", "fa3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "PROBLEMS", problems)
        patch.setattr(synthetic, "names", runs)
        maker = synthetic.Maker(folder / "raw")
        maker.device()
        maker.check("grid256")
        maker.timing("grid256", "spaced")
        synthetic.derive(folder / "raw", folder / "results")
    return load(folder / "results", problems, synthetic.CONSTRAINTS)


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_is_stamped_and_whole(evidence, name):
    table = tables.TABLES[name](evidence)
    assert table.rows and all(len(row) == len(table.header) for row in table.rows)
    text = tables.latex(table, evidence.stamp)
    assert "tier replay, device h100-sxm-80gb, run synthetic, commit 555555555555" in text
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
    for line in body.splitlines():
        if line.endswith(r"\\") and "multicolumn" not in line:
            assert len(re.findall(r"(?<!\\)&", line)) == len(table.header) - 1, line


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_table_of_what_was_not_measured_still_renders(empty, name):
    table = tables.TABLES[name](empty)
    assert all(len(row) == len(table.header) for row in table.rows)
    assert "nan" not in tables.latex(table, empty.stamp).lower()


def test_where_all_is_stale_the_paper_says_so_and_renders(stale, tmp_path, monkeypatch):
    assert stale.provenance["stale"] and not stale.subjects
    for build in tables.TABLES.values():
        tables.latex(build(stale), stale.stamp)
    rows = {row[0]: row for row in tables.ladder(stale).rows}
    assert rows["stage 5"][2:4] == ["stale", "–"] and rows["FA3"][2] == "stale"
    assert "| stage 5 | branching | stale | – |" in tables.headline(stale)
    assert "or its record is stale" in tables.stages(stale)
    gone = {row[0]: row[1:] for row in tables.left_out(stale).rows}
    assert gone["timing/grid.spaced"][0].startswith("stage 1, stage 2, ")
    assert gone["timing/grid.spaced"][1] == "stale, from commit 555555555555"
    for draw in figures.FIGURES.values():
        figures.save(draw(stale), tmp_path / "figure.pdf")
    monkeypatch.setattr(report, "svg", lambda *_: "")
    assert "results are stale" in report.render(stale)


def test_the_top_of_the_ladder_is_never_another_stage(stale, evidence):
    assert stale.top == evidence.top == "stage5"


def test_which_fa3_says_what_is_known_of_the_build(evidence, monkeypatch):
    def peer(name):
        return next(row for row in tables.which_fa3(evidence).rows if row[1] == name)

    assert "is not a known one" in tables.which_fa3(evidence).note
    assert peer("fa3-fwd")[3] == "wheel abababababababab, not that of the lock"
    locked = environment.hashes("cuda")["fa3-fwd"]
    subjects = evidence.provenance["subjects"]
    monkeypatch.setitem(subjects["fa3"], "wheel_sha256", locked[1])
    assert peer("fa3-fwd")[3] == f"wheel {locked[1][:16]}, as locked"
    assert "59df2f9b" in tables.which_fa3(evidence).note
    monkeypatch.setitem(subjects["fa3"], "wheel_sha256", None)
    monkeypatch.setitem(subjects["fa3"], "record_sha256", "c" * 64)
    assert peer("fa3-fwd")[3] == "files cccccccccccccccc"


def test_the_knobs_of_fa3_that_were_kept_are_named(evidence, monkeypatch):
    def kept():
        return tables.which_fa3(evidence).rows[-1][2]

    assert kept() == "the default on 31 of 31 problems of grid and gate"
    row = {"suite": "gate", "problem": "gate-b1", "regime": "spaced", "subject": "fa3"}
    monkeypatch.setitem(evidence.provenance, "chosen", [{**row, "config": {"num_splits": 2}}])
    assert kept() == "the default on 30 of 31 problems of grid and gate, num_splits=2 on 1"


def test_fa3_here_stands_beside_fa3_as_published(evidence, empty):
    rows = {row[0]: row[2] for row in tables.which_fa3(evidence).rows}
    found = rows["FA3 here over FA3 as published, spaced"]
    assert re.fullmatch(r"[01]\.\d\d \([01]\.\d\d to [12]\.\d\d, 23 problems\)", found)
    rows = {row[0]: row[2] for row in tables.which_fa3(empty).rows}
    assert rows["FA3 here over FA3 as published, spaced"] == "not measured"


def test_every_stage_stands_on_the_grid(evidence):
    rows = tables.grid_stages(evidence).rows
    assert len(rows) == 26 and rows[-2][1] == "median"
    assert rows[-2][3].startswith("0.450 [") and rows[-2][-1].startswith("1.160 [")


def test_another_environment_than_the_locks_is_listed(evidence, monkeypatch):
    pinned = environment.pins("cuda")
    recorded = {"python": "3.12.3", "torch": f"{pinned['torch']}+cu130", "numpy": pinned["numpy"]}
    monkeypatch.setitem(evidence.provenance, "packages", recorded)
    assert tables.locks(evidence).rows == [["all that measuring imports", "as locked", ""]]
    monkeypatch.setitem(recorded, "numpy", "2.5.2")
    assert tables.locks(evidence).rows == [["numpy", "2.5.2", pinned["numpy"]]]
    assert "Python of the run: 3.12.3" in tables.locks(evidence).note
    monkeypatch.setitem(recorded, "certifi", "1")
    assert len(tables.locks(evidence).rows) == 1
    assert tables.locks(evidence).note.endswith("and different too: certifi.")


def test_a_device_without_known_peaks_has_no_model(evidence, monkeypatch):
    assert tables.roofline(evidence).rows
    monkeypatch.setitem(evidence.provenance, "device", "some-other-gpu")
    assert tables.roofline(evidence).rows == []
    assert {row[6] for row in tables.ladder(evidence).rows} == {"–"}
    assert len(tables.criteria(evidence).rows) > 5


def test_latex_is_escaped():
    assert tables.escape("a_b & 50 % {x} \\y ≥ 2") == (
        r"a\_b \& 50 \% \{x\} \textbackslash{}y $\geq$ 2"
    )


def test_numbers_as_text():
    assert interval(Value(1.234, 1.2, 1.26)) == "1.234 [1.200, 1.260]"
    assert interval(Value(1.234), 2) == "1.23" and interval(None) == "–"
    assert number(Value(12.6)) == "13" and number(None) == "–"
    assert interval(Value(0.02, -0.003, 0.04), 2) == "0.02 [0.00, 0.04]"


def test_the_grid_has_every_problem_and_marks_the_inconclusive_one(evidence):
    table = tables.grid(evidence)
    assert len(table.rows) == 24 + 3
    marked = [row for row in table.rows if row[2].endswith("†")]
    assert [row[:3] for row in marked] == [["64", "causal", "16384†"]]


def test_headdim_256_has_a_table_of_who_ran_there(wide, empty):
    table = tables.TABLES["grid256"](wide)
    assert list(table.header) == [
        "d", "mask", "seqlen", "FA3", "cuDNN", "stage 5", "over FA3", "over cuDNN",
    ]  # fmt: skip
    assert len(table.rows) == 12 + 3 and {row[0] for row in table.rows[:12]} == {"256"}
    assert table.rows[12][1] == "median" and table.rows[12][6].startswith("1.160 [")
    assert tables.TABLES["checks"](wide).header[3] == "grid256"
    found = numbers.numbers(wide)
    assert (found[r"\WideMeasured"], found[r"\WideProblems"]) == ("1", "12")
    assert tables.TABLES["grid256"](empty).is_empty
    assert "grid256" not in tables.TABLES["checks"](empty).header
    found = numbers.numbers(empty)
    assert (found[r"\WideMeasured"], found[r"\WideProblems"]) == ("0", "0")
    assert found[r"\TopOverFaThreeWideMedian"] == numbers.MISSING


def test_fp16_stands_beside_bf16(evidence, empty, tmp_path):
    table = tables.TABLES["grid_fp16"](evidence)
    assert table.header[-1] == "time / bf16"
    ratios = [float(row[-1]) for row in table.rows[:24] if row[-1] != "–"]
    assert len(ratios) == 23  # the bf16 problem whose A/A pair was off has none
    rows = {row[1]: row[-1] for row in table.rows[24:]}
    assert rows["most"] == f"{max(ratios):.3f}" and rows["median"] == "1.000"

    with_rise = without(tmp_path, lambda row: False)
    key = ("grid_fp16", "fp16-d64-full-s512", "stage5", "over_bf16", "spaced")
    with_rise._metrics[key]["value"] = 1.05
    assert tables.TABLES["grid_fp16"](with_rise).rows[-1][-1] == "1.050"
    assert numbers.numbers(with_rise)[r"\HalfOverBfMost"] == "1.050"
    last = [row[-1] for row in tables.TABLES["grid_fp16"](empty).rows]
    assert set(last) == {"–", ""}
    assert numbers.numbers(empty)[r"\HalfBesideBfMeasured"] == "0"


def test_fa4_is_a_peer_where_it_was_measured(evidence, no_fa4, tmp_path):
    def labels(draw, of):
        return {line.get_label() for axes in draw(of).axes for line in axes.lines}

    for draw in (figures.grid, figures.ratio):
        assert "FA4" in labels(draw, evidence)
        assert "FA4" not in labels(draw, no_fa4) and "cuDNN" in labels(draw, no_fa4)
    assert {"FA4", "over FA4"} <= set(tables.grid(evidence).header)
    assert not {"FA4", "over FA4"} & set(tables.grid(no_fa4).header)
    assert numbers.numbers(evidence)[r"\FaFourMeasured"] == "1"
    assert numbers.numbers(no_fa4)[r"\FaFourMeasured"] == "0"
    for build in tables.TABLES.values():
        tables.latex(build(no_fa4), no_fa4.stamp)
    assert "FA4" not in tables.headline(no_fa4)


def test_each_constraint_has_a_row_for_each_suite_that_it_is_judged_in(evidence, older):
    rows = tables.constraints(evidence).rows
    branching = [row for row in rows if rows.index(row) < 3]
    assert [row[0] for row in branching] == ["branching", "", ""]
    assert [row[2] for row in branching] == ["grid/causal", "grid/full", "gate"]
    assert all(row[3] != "–" for row in rows)
    assert tables.NOT_JUDGED not in {row[-1] for row in rows}

    rows = tables.constraints(older).rows
    stand_ins = [row for row in rows if row[2] == "profile"]
    assert len(stand_ins) == 3 and {row[-1] for row in stand_ins} == {tables.NOT_JUDGED}
    assert all("[" in row[3] for row in stand_ins)


def test_the_ladder_says_whether_gates_are_met(evidence):
    rows = {row[0]: row for row in tables.ladder(evidence).rows}
    assert rows["stage 2"][4:6] == ["0.58", "yes"]
    assert rows["stage 1"][4:6] == ["", ""] and "FA3" in rows


def test_every_stage_has_its_paragraph(evidence):
    text = tables.stages(evidence)
    for name in evidence.of_kind("stage"):
        assert rf"\paragraph{{Stage {name[5:]}: " in text
    assert text.count("Measured on the gate problem") == len(evidence.of_kind("stage"))


def test_the_workflow_lists_all_tables_and_figures():
    text = (synthetic.ROOT / "paper" / "paper.smk").read_text()
    listed = re.findall(r'name="([a-z0-9_ "\n]+)"\.split\(\)', text)
    found = [set(re.sub(r'["\n]', " ", names).split()) for names in listed]
    assert found == [set(tables.TABLES) | {"stages"}, set(figures.FIGURES)]


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figures_are_the_same_bytes_twice(evidence, tmp_path, name):
    for suffix in ("pdf", "svg"):
        paths = [tmp_path / f"{n}.{suffix}" for n in (1, 2)]
        for path in paths:
            figures.save(figures.FIGURES[name](evidence), path)
        first, second = (path.read_bytes() for path in paths)
        assert first == second and len(first) > 2000


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figures_of_what_was_not_measured(empty, tmp_path, name):
    figures.save(figures.FIGURES[name](empty), tmp_path / "figure.pdf")


WITNESSES = {
    "branching": "inactive_threads",
    "sync": "samples_cta_barrier",
    "memory": "stall_memory",
}


def claims(axes):
    """The heights at which something claimed is drawn."""
    return [line.get_ydata()[0] for line in axes.lines if line.get_label() == figures.CLAIM]


def curves(axes):
    """The lines of a panel that show a subject."""
    return [line for line in axes.lines if line.get_label() != figures.CLAIM]


@pytest.mark.parametrize("name", WITNESSES)
def test_a_witness_is_drawn_over_the_grid_and_the_gate_beside_what_is_claimed(
    evidence, name, monkeypatch
):
    def hypothesis(h):
        return h.constraint == name and h.witness.get("metric") == WITNESSES[name]

    known = evidence.constraints.hypotheses
    threshold = next(h.threshold for h in known if hypothesis(h))
    figure = figures.FIGURES[name](evidence)
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert legend == {"FA3", "cuDNN", figures.CLAIM, *(f"stage {n}" for n in range(1, 6))}
    *grid, gate = figure.axes[:5]
    for axes, ticks, count in (*((a, figures.SEQLENS, 6) for a in grid), (gate, [1, 2, 64], 7)):
        assert claims(axes) == [threshold]
        assert {line.get_label() for line in curves(axes)} == legend - {figures.CLAIM}
        assert all(len(line.get_xdata()) == count for line in curves(axes))
        assert axes.get_xscale() == "log" and axes.xaxis.get_transform().base == 2
        assert set(ticks) <= set(axes.get_xticks())
    colors = {line.get_color() for line in curves(gate)}
    markers = {line.get_marker() for line in curves(gate)}
    assert len(colors) == len(markers) == 7

    in_gate = [replace(h, suites=("gate",)) if hypothesis(h) else h for h in known]
    monkeypatch.setattr(
        evidence, "constraints", replace(evidence.constraints, hypotheses=tuple(in_gate))
    )
    *grid, gate = figures.FIGURES[name](evidence).axes[:5]
    assert claims(gate) == [threshold] and not any(claims(axes) for axes in grid)


@pytest.mark.parametrize("name", WITNESSES)
def test_a_run_without_counters_of_the_grid_shows_those_of_the_suite_profile(
    evidence, older, empty, name
):
    for found, style, counts in ((evidence, "-", [6, 6, 6, 6, 7]), (older, "None", [2] * 4 + [1])):
        panels = figures.FIGURES[name](found).axes[:5]
        fa3 = [next(line for line in curves(a) if line.get_label() == "FA3") for a in panels]
        assert [len(line.get_xdata()) for line in fa3] == counts
        assert {line.get_linestyle() for line in fa3} == {style}
    assert "profile" not in figures.note(evidence, name)
    assert "8 of the 24 problems of the grid and 1 of the 7" in figures.note(older, name)
    assert "has only those of the suite profile for the grid and the gate" in figures.note(
        older, name
    )
    assert figures.note(empty, name) == "No counters were read in this run."
    assert figures.note(older, "grid") == ""


def test_the_gain_of_a_stage_is_drawn_against_batch(evidence):
    above = figures.launch(evidence).subfigs[0].axes
    assert [claims(axes) for axes in above] == [[40], [40], [1.67], []]
    assert {line.get_label() for line in curves(above[2])} == {f"stage {n}" for n in (2, 3, 4, 5)}
    below = figures.launch(evidence).subfigs[1].axes
    assert [claims(axes) for axes in below] == [[9]] * 5


def test_the_report_is_self_contained(evidence, monkeypatch):
    monkeypatch.setattr(report, "svg", cache(report.svg))  # their bytes have a test of their own
    text = report.render(evidence)
    assert text.index(evidence.stamp) < text.index("<table>")
    assert not re.findall(r'(?:src|href)="(?!#)', text.replace('xlink:href="#', ""))
    assert "@import" not in text and "<script" not in text
    assert text.count("<svg") == len(figures.FIGURES)
    ids = re.findall(r'id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert text == report.render(evidence)
    names = {name for _, in_tables, _ in report.SECTIONS for name in in_tables}
    assert names == set(tables.TABLES)


def test_the_report_warns_of_stale_results(evidence, monkeypatch):
    monkeypatch.setattr(report, "svg", lambda *_: "")
    assert "results are stale" not in report.render(evidence)
    stale = {
        "suite": "gate",
        "file": "check/gate.json",
        "what": "stage1",
        "commit": "c" * 40,
        "reason": "changed",
    }
    evidence.provenance["stale"].append(stale)
    try:
        assert "1 results are stale" in report.render(evidence)
    finally:
        evidence.provenance["stale"].clear()


def readme(tmp_path, option):
    path = tmp_path / "README.md"
    where = ["--results", str(synthetic.shared() / "results"), *RESULTS, "--readme", str(path)]
    return path, RUNNER.invoke(tables.app, ["readme", option, *where])


def test_the_headline_table_is_written_and_checked(tmp_path):
    (tmp_path / "README.md").write_text(f"# x\n\n{tables.BEGIN}\nold\n{tables.END}\n\nrest\n")
    path, checked = readme(tmp_path, "--check")
    assert checked.exit_code == 1 and "out of date" in str(checked.exception)
    path, written = readme(tmp_path, "--write")
    assert written.exit_code == 0, written.output
    text = path.read_text()
    assert "| stage 2 | sync |" in text and text.endswith("\n\nrest\n") and "\nold\n" not in text
    assert readme(tmp_path, "--check")[1].exit_code == 0


def test_a_readme_without_markers_is_an_error(tmp_path):
    (tmp_path / "README.md").write_text("# x\n")
    _, run = readme(tmp_path, "--write")
    assert run.exit_code == 1 and tables.BEGIN in str(run.exception)


def test_the_notebook_is_stripped_and_runs(tmp_path):
    source = synthetic.ROOT / "notebooks" / "explore.ipynb"
    cells = json.loads(source.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)
    (tmp_path / "config").mkdir()
    shutil.copy(synthetic.PROBLEMS, tmp_path / "config")
    shutil.copytree(synthetic.shared() / "results", tmp_path / "results")
    shutil.copy(source, tmp_path / "explore.ipynb")
    written = []
    for n in (1, 2):
        out = tmp_path / f"out{n}.ipynb"
        notebook.execute(tmp_path / "explore.ipynb", out, tmp_path)
        written.append(out.read_bytes())
    outputs = [c["outputs"] for c in json.loads(written[0])["cells"] if c["cell_type"] == "code"]
    assert sum(bool(o) for o in outputs) >= 5
    assert written[0] == written[1]


def test_a_notebook_that_fails_is_an_error(tmp_path):
    source = json.loads((synthetic.ROOT / "notebooks" / "explore.ipynb").read_text())
    (tmp_path / "explore.ipynb").write_text(json.dumps(source))
    with pytest.raises(Exception, match="StopIteration"):
        notebook.execute(tmp_path / "explore.ipynb", tmp_path / "out.ipynb", tmp_path)
    assert not (tmp_path / "out.ipynb").exists()


def test_a_record_that_was_closed_says_so_and_what_it_lost(evidence, monkeypatch):
    assert evidence.closed("ncu/control.json") == ""
    made = {"commit": "abcdef0123456789", "dirty": False}
    made["provenance_of"] = "timing/control.spaced.json"
    monkeypatch.setitem(evidence.provenance, "closed", {"ncu/control.json": made})
    lost = {"kind": "ncu", "suite": "control", "problem": "control-d64-s1024"}
    lost |= {"subject": "control_sync.64", "reason": "interrupted before it was profiled"}
    lost["status"] = "left out"
    elsewhere = {**lost, "suite": "grid", "subject": "fa3"}
    monkeypatch.setitem(evidence.provenance, "excluded", [lost, elsewhere])
    said = evidence.closed("ncu/control.json")
    assert "by commit abcdef012345, with" in said and "timing/control.spaced.json" in said
    dirty = {"ncu/control.json": {**made, "dirty": True}}
    monkeypatch.setitem(evidence.provenance, "closed", dirty)
    assert "abcdef012345 with local changes, with" in evidence.closed("ncu/control.json")
    assert said.endswith("Lost: control sync.64, control-d64-s1024.")
    assert "FA3" not in said and evidence.closed("host/gate.json") == ""
    assert "abcdef012345" in numbers.numbers(evidence)[numbers.macro("controls closed")]


def test_a_record_that_was_replaced_says_why(evidence, monkeypatch):
    run = {"run": "r8", "gpu_uuid": "other", "commit": "c" * 40, "files": ["host/gate.json"]}
    for why, said in (
        ("interrupted", ", which was interrupted."),
        ("kernel changed", ", of a kernel that has changed since."),
        ("A/A off", ", whose A/A pairs were off."),
        ("without fp32 logits", ", whose ties were not compared with fp32 logits."),
        (None, "run first."),
    ):
        run |= {"replaced": {"host/gate.json": "first"}, "replaced_why": {"host/gate.json": why}}
        monkeypatch.setitem(evidence.provenance, "addenda", [run])
        assert evidence.added("host/gate.json").endswith(said)
    run |= {"replaced": {}, "replaced_why": {}}
    assert evidence.added("host/gate.json").endswith("(commit cccccccccccc).")


def test_a_failed_check_is_named_where_its_numbers_stand(evidence, monkeypatch):
    assert "Failed, which" not in tables.checks(evidence).note
    assert "was not timed there" not in tables.of_sustained(evidence)
    item = {"problem": "grid-d64-full-s512", "subject": "stage5", "reason": "run 449 differs"}
    failed = {**item, "kind": "check", "suite": "grid", "regime": None, "status": "failed"}
    lost = {**item, "kind": "timing", "suite": "grid", "regime": "sustained", "status": "left out"}
    monkeypatch.setitem(evidence.provenance, "excluded", [failed, lost])
    assert "stage 5 on grid-d64-full-s512 (run 449 differs)" in tables.checks(evidence).note
    assert "not timed there on grid-d64-full-s512" in tables.of_sustained(evidence)
    assert "run 449 differs" in numbers.numbers(evidence)[numbers.macro("failed checks")]
    monkeypatch.setitem(evidence.provenance, "excluded", [{**lost, "regime": "spaced"}])
    assert "was not timed there" not in tables.of_sustained(evidence)


def test_a_problem_without_a_ratio_is_not_conclusive(evidence, monkeypatch):
    agreed, every = evidence.agreed("grid", "spaced")
    gone = "grid-d128-full-s4096"
    assert evidence.conclusive("grid", gone)
    kept = {k: v for k, v in evidence._speedups.items() if k[1:3] != (gone, evidence.top)}
    monkeypatch.setattr(evidence, "_speedups", kept)
    assert evidence.agreed("grid", "spaced") == (agreed - 1, every)


@pytest.fixture
def changed(evidence, monkeypatch):
    """Writes a value of the metrics for one test: suite, problem, subject, metric, regime, value;
    an empty subject is whichever has it."""
    kept = dict(evidence._metrics)
    monkeypatch.setattr(evidence, "_metrics", kept)

    def put(*key, value):
        suite, problem, subject, metric, regime = key
        for found in list(kept):
            if found[:2] == (suite, problem) and found[3:] == (metric, regime):
                if subject in ("", found[2]):
                    kept[found] = {"value": value}

    return put


def test_sustained_numbers_say_how_many_problems_are_conclusive(evidence, changed):
    def shown():
        rows = {row[1]: row[-1] for row in tables.grid(evidence).rows[24:]}
        suites = {row[0]: row[1] for row in tables.criteria(evidence).rows}
        of_median = next(suites[c] for c in suites if c.startswith("Back to back") and "1.08" in c)
        of_one = next(suites[claim] for claim in suites if "630 TFLOPS" in claim)
        return rows["median"], rows["least"], rows["least to 1024"], of_median, of_one

    *cells, to_1024, of_median, of_one = shown()
    assert all(cell.endswith(" (24 of 24)") for cell in cells) and "of" not in to_1024
    assert (of_median, of_one) == ("grid", "grid")
    for problem in ("grid-d64-full-s512", "grid-d128-full-s8192"):
        changed("grid", problem, "", "conclusive", "sustained", value=0.0)
    *cells, to_1024, of_median, of_one = shown()
    assert all(cell.endswith(" (22 of 24)") for cell in cells) and "of" not in to_1024
    assert (of_median, of_one) == ("grid, 22 of 24 conclusive", "grid")
    assert numbers.numbers(evidence)[r"\ConclusiveSustained"] == "22"


def test_the_dagger_tells_of_attempts_that_were_made(evidence, empty, changed):
    problem = "grid-d64-causal-s16384"
    assert "off in each of 3 attempts" in evidence.off("grid", "spaced")
    assert evidence.off("gate", "spaced") == "" and "†" not in tables.grid(empty).note
    assert evidence.attempts("grid", "spaced") == "1 to 3" and not empty.attempts("grid", "spaced")
    changed("grid", problem, "", "attempts", "spaced", value=1.0)
    assert "off in the one attempt that was made" in evidence.off("grid", "spaced")
    assert "the one attempt that was made" in tables.grid_stages(evidence).note
    assert numbers.numbers(evidence)[r"\AttemptsSpaced"] == "1"
    assert numbers.numbers(empty)[r"\AttemptsSpaced"] == numbers.MISSING


def test_where_the_sustained_suite_was_closed_its_tables_say_so(evidence, monkeypatch):
    names = ("grid", "which_fa3", "published", "criteria", "regimes")
    said = "timing/grid.sustained.json was interrupted for good"
    assert not any(said in tables.TABLES[name](evidence).note for name in names)
    made = {"commit": "abcdef0123456789", "dirty": False}
    made["provenance_of"] = "timing/grid.spaced.json"
    monkeypatch.setitem(evidence.provenance, "closed", {tables.SUSTAINED: made})
    assert all(said in tables.TABLES[name](evidence).note for name in names)
    assert said not in tables.host(evidence).note
    assert said in numbers.numbers(evidence)[r"\SustainedRecord"]


def test_each_stage_stands_beside_the_roofline(evidence, changed):
    def shares():
        table = tables.roofline(evidence)
        return dict(zip(table.header, table.rows[0], strict=True))

    before = shares()
    assert {"FA3 %", "1 %", "2 %", "3 %", "4 %", "5 %"} <= set(before)
    least = evidence.roofline(evidence.problems["grid-d64-full-s512"], "stage1")
    found = evidence.metric("grid", "grid-d64-full-s512", "stage1", "gpu_us", "spaced")
    assert before["1 %"] == f"{100 * least.overlapped_us / found.value:.0f}"
    changed(
        "grid", "grid-d64-full-s512", "stage1", "gpu_us", "spaced", value=2 * least.overlapped_us
    )
    assert shares() == {**before, "1 %": "50"} and before["1 %"] != "50"


def test_the_model_is_at_the_clock_that_a_kernel_runs_at(evidence, changed, monkeypatch):
    problem = evidence.problems["grid-d128-full-s8192"]

    def mhz(*regime):
        return evidence.roofline(problem, "stage5", *regime).clock_mhz

    read = evidence.anywhere(problem, "stage5", "profiled_clock").value
    assert mhz() == read
    for suite in problem.suites:  # what NVML reads between launches is of no subject
        changed(suite, problem.id, "", "clock_mhz", "spaced", value=1980.0)
    assert mhz() == read and mhz("sustained") == 1750.0
    kept = {k: v for k, v in evidence._metrics.items() if k[3] != "profiled_clock"}
    monkeypatch.setattr(evidence, "_metrics", kept)
    boost = 1830.0  # the synthetic launches have no clock before them
    assert 0.77 * boost < mhz() < 0.79 * boost


def test_clocks_are_the_profiled_ones_and_the_one_between_launches(evidence, empty, changed):
    problem = "grid-d64-full-s512"
    for suite in evidence.problems[problem].suites:
        for subject, value in (("fa3", 1700.0), ("stage5", 1600.0)):
            changed(suite, problem, subject, "profiled_clock", "-", value=value)
    table = tables.regimes(evidence)
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert row["between launches MHz"] == "1750" and row["FA3 profiled MHz"] == "1700"
    assert row["stage 5 profiled MHz"] == "1600" and "mJ/call" in table.header
    assert len(tables.regimes(empty).header) == 6 and "mJ" not in "".join(
        tables.regimes(empty).header
    )


def test_columns_of_what_was_not_measured_are_left_out(evidence, empty):
    assert tables.grid(evidence).header[-1] == "sustained"
    assert "sustained / published" in tables.published(evidence).header
    for table in (tables.grid(empty), tables.published(empty)):
        assert not any("sustained" in head for head in table.header)
        assert all(len(row) == len(table.header) for row in table.rows)


def test_shares_are_cut_where_they_are_printed(evidence, changed):
    row = {"metric": "launch_share, gate-b32", "effect": "13.57", "ci_low": "-5.5",
           "ci_high": "129.2", "threshold": "40"}  # fmt: skip
    assert tables._verdict_cells(row) == ["13.6", "[0.0, 100.0]"]
    row |= {"metric": "speedup over fa3, (median)", "threshold": "1.15"}
    assert tables._verdict_cells(row) == ["13.570", "[-5.500, 129.200]"]
    assert tables._found(["", "", "1.152", "[1.150, 1.154]"]) == "1.152 [1.150, 1.154]"
    assert tables._found(["", "", "94.0", "[94.0, 94.0]"]) == "94.0"
    changed("gate", "gate-b32", "fa3", "launch_share", "-", value=-3.0)
    assert evidence.metric("gate", "gate-b32", "fa3", "launch_share").value == 0
    changed("gate", "gate-b32", "fa3", "eager_latency_us", "-", value=-3.0)
    assert evidence.metric("gate", "gate-b32", "fa3", "eager_latency_us").value == -3


def test_the_dagger_of_decoding_is_explained_where_there_is_one(evidence, changed):
    assert "†" not in tables.in_use.decode(evidence).note
    problem = evidence.suite("decode")[0]
    changed("decode", problem.id, "", "conclusive", "spaced", value=0.0)
    table = tables.in_use.decode(evidence)
    assert "† the A/A pair" in table.note and table.rows[0][3].endswith("†")
    assert tables.in_use._megabytes(400_000) == "0.4"
    assert tables.in_use._megabytes(134_217_728) == "134"


def test_criteria_have_the_ceilings_that_the_model_gives(evidence, monkeypatch):
    def ceiling(part):
        return next(row[5] for row in tables.criteria(evidence).rows if part in row[0])

    problem = evidence.problems["grid-d64-full-s16384"]
    least = evidence.roofline(problem, "stage5").overlapped_us
    assert ceiling("630 TFLOPS") == f"{problem.convention_flops / least / 1e6:.0f}"
    found = evidence.roofline(evidence.problems["grid-d128-full-s8192"], "stage5")
    assert ceiling("97 % busy") == f"{100 * found.tensor_us / found.overlapped_us:.1f}"
    assert float(ceiling("97 % busy")) < 100
    assert ceiling("longer than in bf16") == "1.00"
    assert {ceiling("energy"), ceiling("costs the host"), ceiling("a fifth of the GPU")} == {"–"}
    monkeypatch.setitem(evidence.provenance, "device", "some-other-gpu")
    assert ceiling("630 TFLOPS") == ceiling("97 % busy") == "–"


def test_what_is_foretold_is_in_the_words_of_the_stages():
    def says(name, words):
        text = ast.get_docstring(ast.parse(stage.subject(name).path.read_text()))
        return words in " ".join(text.split())

    assert all(says(claim.stage, claim.words) for claim in tables.FORETOLD)
    assert not says("stage3", "idle SM cycles, to below 5 %")
    assert {claim.stage for claim in tables.FORETOLD} == {f"stage{n}" for n in (2, 3, 4, 5)}


def test_what_was_foretold_is_found_or_not(evidence, empty, changed):
    def found(words, on="the gate problem"):
        told = ""
        for row in tables.foretold(evidence).rows:
            told = row[1] or told
            if words in told and row[3] == on:
                return row[4:]

    for value, said in ((7.0, "no"), (2.9, "yes")):
        changed("gate", "gate-b16", "stage3", "idle_sm_cycles", "-", value=value)
        assert found("idle SM cycles")[1:] == [f"{value:.1f}", said]
    pairs = {"stage3": 59.0, "stage4": 81.0}
    for name, value in pairs.items():
        changed("grid", "grid-d128-full-s8192", name, "tensor_pipe", "-", value=value)
    where = "d 128, full, 8192"
    assert found("from below 60 % to above 80 %", where) == ["59.0", "81.0", "yes"]
    changed("grid", "grid-d128-full-s8192", "stage3", "tensor_pipe", "-", value=61.0)
    assert found("from below 60 % to above 80 %", where) == ["61.0", "81.0", "no"]
    before, after, true = found("seqlen 512 by 10 to 20 %", "the grid, 512")
    assert before == "100.0" and after.startswith("77.") and true == "on 0 of 4"  # 22 % less
    assert found("no masked instruction")[-1] == "–"  # no counter decides
    assert all(row[4:] == ["–", "–", "–"] for row in tables.foretold(empty).rows)


def test_the_first_call_of_a_process_is_told_apart(evidence, empty, changed):
    said = tables.host(evidence).note
    assert "210 ms for stage 1, the first Triton kernel of the process" in said
    assert "210 ms for stage 5, called later" in said
    changed("gate", "gate-b1", "stage5", "first_call_ms", "-", value=38.0)
    assert "38 ms for stage 5, called later" in tables.host(evidence).note
    assert tables.first_calls(empty) == ""


def test_the_headline_has_the_other_witnesses_that_are_supported(evidence, monkeypatch):
    text = tables.headline(evidence)
    assert "- sync: Named barriers, which part of a CTA waits at" in text
    assert "- sync: A CTA-wide barrier of FA3 holds a warp" not in text
    rows = [dict(row) for row in evidence.verdicts]
    for row in rows:
        row["verdict"] = "SUPPORTED (post hoc)" if row["metric"] == "predicated_off" else "REFUTED"
    monkeypatch.setattr(evidence, "verdicts", rows)
    text = tables.headline(evidence)
    assert "- branching: In FA3 at least 5 % of the threads" in text
    assert "in grid (post hoc);" in text and "- sync: Named" not in text
    for row in rows:
        row["verdict"] = "REFUTED"
    assert "No other witness supports a claim about FA3." in tables.headline(evidence)


def test_a_borrowed_control_is_shown_as_such(evidence, monkeypatch):
    rows = [dict(row) for row in evidence.verdicts]
    for row in rows:
        row["control"] = "borrowed: passed"
    monkeypatch.setattr(evidence, "verdicts", rows)
    table = tables.verdicts(evidence)
    assert {row[7] for row in table.rows} == {"borrowed: passed"} and "Borrowed: " in table.note
    assert "borrowed: passed" in tables.latex(table, "stamp")


def test_a_stale_replication_names_its_run(evidence, monkeypatch):
    row = {
        "run": "r1", "gpu_uuid": "a", "recorded_run": "r2", "recorded_gpu_uuid": "b",
        "suite": "gate", "regime": "spaced", "subject": "stage3", "recorded": "0.9",
        "fresh": "0.9", "change": "", "most_change": "", "tolerance": "0.025",
        "verdict": "AMBIGUOUS",
        "note": "its kernel has changed since; the two runs are of different kernels; median of 7"
        " problems",
    }  # fmt: skip
    monkeypatch.setattr(evidence, "replications", [row])
    table = tables.replication(evidence)
    assert table.rows == [["gate", "spaced", "stage 3", "7", "0.9", "–†", "–"]]
    assert "the kernel of run r1 has changed since (1)" in table.note
    stale = {"file": "timing/gate.spaced.json", "what": "stage3"}
    monkeypatch.setitem(evidence.provenance, "stale", [stale])
    assert "the kernel of run r2 has changed since (1)" in tables.replication(evidence).note
    row["note"] = "median of 7 problems; not measured or inconclusive: gate-b1"
    assert "not measured or inconclusive: gate-b1 (1)" in tables.replication(evidence).note


def test_a_ratio_has_one_row_and_a_column_for_each_run(evidence, monkeypatch):
    row = {
        "run": "r10", "gpu_uuid": "a", "recorded_run": "r2", "recorded_gpu_uuid": "b",
        "suite": "gate", "regime": "spaced", "subject": "stage3", "recorded": "0.900",
        "fresh": "0.9", "change": "-0.001", "low": "-0.002", "high": "0.001",
        "most_change": "0.003", "most_problem": "gate-b1", "tolerance": "0.025",
        "verdict": "PASS", "note": "median of 7 problems",
    }  # fmt: skip
    other = row | {"run": "r9", "verdict": "FAIL", "most_change": "-0.05", "change": "0.04",
                   "low": "0.03", "high": "0.05", "note": "median of 6 problems"}  # fmt: skip
    alone = row | {"suite": "alone", "recorded": "1.100"}
    monkeypatch.setattr(evidence, "replications", [row, alone, other])
    table = tables.replication(evidence)
    assert table.header[5:] == ["r9, %", "r10, %", "most, %"] and table.rules == {1}
    assert table.rows[0][4:7] == ["1.100", "", "-0.10 [-0.20, 0.10]"]
    assert table.rows[1][3:5] == ["6/7", "0.900"]  # in the order of the runs
    failed, passed, most = table.rows[1][5:]
    assert failed == "4.00 [3.00, 5.00] FAIL" and passed == "-0.10 [-0.20, 0.10]"
    assert most == "-5.00 (gate-b1, r9)" and "FAIL (1)" in table.note
