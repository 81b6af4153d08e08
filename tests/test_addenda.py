"""Runs that complete a recorded one are rendered beside it, and nothing crosses them."""

import json
import shutil
from pathlib import Path

import pytest
import synthetic
from typer.testing import CliRunner

from attn_profiling import addenda, host_pairs, promote, tidy, verify
from attn_profiling.cli import app
from attn_profiling.promote import NotPromoted
from attn_profiling.record import RecordError
from attn_profiling.workflow import Plan, _recorded
from paper import tables
from paper.evidence import load

NOTHING = {"check": [], "time": {"spaced": [], "sustained": []}, "host": [], "profile": []}
FIRST = {"suites": NOTHING | {"check": ["smoke"], "time": {"spaced": ["smoke"], "sustained": []}}}
MORE = {
    "suites": NOTHING
    | {
        "check": ["gate", "smoke"],
        "time": {"spaced": ["gate"], "sustained": ["smoke"]},
    }
}
BOARD = "GPU-another"


def edited(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def later(data):
    data["run"] = "later"
    data["provenance"]["gpu_uuid"] = BOARD
    data["content"]["measuring"]["sustained_bursts"] = 9


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a run, a later one of other suites)"""
    folder = tmp_path_factory.mktemp("made")
    for name, config in (("one", FIRST), ("later", MORE)):
        maker = synthetic.Maker(folder / name)
        maker.device()
        maker.check("smoke")
        if name == "one":
            maker.timing("smoke", "spaced")
        else:
            maker.check("gate")
            maker.timing("gate", "spaced")
            maker.timing("smoke", "sustained")
            for path in maker.folder.rglob("*.json"):
                edited(path, later)
        (maker.folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def runs(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "runs"))


@pytest.fixture
def recorded(runs, tmp_path):
    target = tmp_path / "measurements" / "h100-sxm-80gb"
    promote.promote(runs / "one", target)
    return target


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def refused(runs, recorded, message):
    before = tree(recorded.parent)
    with pytest.raises(NotPromoted, match=message):
        addenda.add(runs / "later", recorded)
    assert tree(recorded.parent) == before


def test_a_run_is_rendered_with_its_addendum(runs, recorded):
    alone = tidy.tidy(recorded, "replay", synthetic.PROBLEMS)
    assert addenda.add(runs / "later", recorded) == recorded / "addenda" / "later"
    both = tidy.tidy(recorded, "replay", synthetic.PROBLEMS)
    of_first = [row for row in both.metrics if row["run"] != "later"]
    assert of_first == alone.metrics
    added = {(r["suite"], r["regime"]) for r in both.speedups if r["run"] == "later"}
    assert added == {("gate", "spaced"), ("smoke", "sustained")}
    spaced = {r["run"] for r in both.speedups if (r["suite"], r["regime"]) == ("smoke", "spaced")}
    assert spaced == {"synthetic"}
    (found,) = both.provenance["addenda"]
    assert found["run"] == "later" and found["gpu_uuid"] == BOARD
    assert found["files"] == ["timing/gate.spaced.json", "timing/smoke.sustained.json"]
    assert "addenda/later/timing/gate.spaced.json" in both.provenance["states"]


def test_checks_of_an_addendum_are_not_rendered_twice(runs, recorded):
    addenda.add(runs / "later", recorded)
    rows = tidy.tidy(recorded, "replay", synthetic.PROBLEMS).metrics
    keys = [tuple(v for k, v in row.items() if k not in ("value", "run")) for row in rows]
    assert len(keys) == len(set(keys))


def test_a_check_that_failed_in_an_addendum_counts(runs, recorded):
    """Its value of what failed is the metric; what was right there stays right."""

    def first(data):
        data["run"] = "synthetic"

    def fail(data):
        for row in data["results"]:
            if row["subject"] == "stage5" and row["identical_runs"]:
                row |= {"ok": False, "status": "failed", "message": "run 449 differs"}
                row |= {"identical_runs": 448, "streams": None, "graph": None}

    def wrong(data):
        for row in data["results"]:
            if row["status"] == "failed":
                row |= {"message": "NaN", "identical_runs": None}

    def found():
        data = tidy.tidy(recorded, "replay", synthetic.PROBLEMS)
        rows = [r for r in data.metrics if (r["suite"], r["subject"]) == ("gate", "stage5")]
        names = ("identical_runs", "streams", "correct")
        least = [min(r["value"] for r in rows if r["metric"] == name) for name in names]
        return least, [i for i in data.provenance["excluded"] if i["status"] == "failed"]

    shutil.copy(runs / "later" / "check" / "gate.json", recorded / "check" / "gate.json")
    edited(recorded / "check" / "gate.json", first)
    addenda.add(runs / "later", recorded)
    assert found() == ([1000, 1, 1], [])
    there = recorded / "addenda" / "later" / "check" / "gate.json"
    assert promote.failed_checks(recorded / "addenda" / "later") == []
    edited(there, fail)
    (told, *_) = promote.failed_checks(recorded / "addenda" / "later")
    assert told.startswith("check/gate.json: stage5 on gate-") and "run 449 differs" in told
    least, failed = found()
    assert least == [448, 1, 1]
    assert [i["reason"] for i in failed] == ["run later: run 449 differs"]
    edited(there, wrong)
    assert found()[0] == [1000, 1, 0]


@pytest.mark.parametrize("before", [None, False, True])
def test_strided_views_may_be_those_of_an_addendum(runs, recorded, before):
    """Of a check that the recorded run made without; who was called on them there is its own."""

    def recorded_with(data):
        for row in data["results"]:
            row["strided"] = before if row["subject"].startswith("stage") else None

    edited(recorded / "check" / "smoke.json", recorded_with)
    addenda.add(runs / "later", recorded)
    synthetic.derive(recorded, recorded.parent / "results")
    evidence = load(recorded.parent / "results", synthetic.PROBLEMS, synthetic.CONSTRAINTS)
    rows = tidy.tidy(recorded, "replay", synthetic.PROBLEMS).metrics
    views = [r for r in rows if (r["suite"], r["metric"]) == ("smoke", "strided") and r["value"]]
    assert {r["subject"] for r in views} >= {"stage1", "stage5"}
    assert not any(r["subject"] in ("fa3", "cudnn") for r in views)
    assert {r["run"] for r in views} == {"synthetic" if before else "later"}
    assert evidence.views("stage5", ["smoke"]) == (3, 3)
    assert evidence.views("fa3", ["smoke"]) == (0, 0)
    edited(recorded / "addenda" / "later" / "check" / "smoke.json", unviewed)
    synthetic.derive(recorded, recorded.parent / "results")
    evidence = load(recorded.parent / "results", synthetic.PROBLEMS, synthetic.CONSTRAINTS)
    assert evidence.views("stage5", ["smoke"]) == ((3, 3) if before else (0, 0))
    table = tables.checks(evidence)
    cells = {row[0]: row[table.header.index("views")] for row in table.rows}
    assert cells["stage 5"] == ("10 of 10" if before else "7 of 7")  # the gate's are the addendum's
    assert cells["FA3"] == "–"


def unviewed(data):
    for row in data["results"]:
        row["strided"] = False


def test_what_was_recorded_whole_is_not_replaced(runs, recorded):
    shutil.copy(runs / "later" / "timing" / "smoke.sustained.json", recorded / "timing")
    refused(runs, recorded, "timing/smoke.sustained.json: .* has it whole")


def test_what_was_interrupted_is_replaced(runs, recorded):
    target = recorded / "timing" / "smoke.sustained.json"
    shutil.copy(runs / "later" / "timing" / "smoke.sustained.json", target)
    edited(target, lambda data: data.update(run="synthetic"))
    closed = {"commit": "c" * 40, "dirty": False, "at": "then", "provenance_of": "x"}
    edited(target, lambda data: data["provenance"].update(closed=closed))
    addenda.add(runs / "later", recorded)
    assert addenda.files(recorded, "timing")[-1].is_relative_to(recorded / "addenda")
    tables = tidy.tidy(recorded, "replay", synthetic.PROBLEMS)
    assert {r["run"] for r in tables.speedups if r["regime"] == "sustained"} == {"later"}
    assert tables.provenance["closed"] == {}
    (found,) = tables.provenance["addenda"]
    assert found["replaced"] == {"timing/smoke.sustained.json": "synthetic"}
    assert found["replaced_why"] == {"timing/smoke.sustained.json": "interrupted"}
    synthetic.derive(recorded, recorded.parent / "results")
    evidence = load(recorded.parent / "results", synthetic.PROBLEMS, synthetic.CONSTRAINTS)
    said = evidence.added("timing/smoke.sustained.json")
    assert "takes the place of that of run synthetic, which was interrupted" in said


@pytest.mark.parametrize("name", ["again", "more"])
def test_what_an_addendum_lost_another_replaces_whatever_its_name(runs, recorded, name):
    closed = {"commit": "c" * 40, "dirty": False, "at": "then", "provenance_of": "x"}
    file = "timing/smoke.sustained.json"
    edited(runs / "later" / file, lambda data: data["provenance"].update(closed=closed))
    addenda.add(runs / "later", recorded)
    fresh = Path(shutil.copytree(runs / "later", runs / name))
    shutil.rmtree(fresh / "check" / "gate", ignore_errors=True)
    for path in ("check/gate.json", "timing/gate.spaced.json"):
        (fresh / path).unlink()
    for path in fresh.rglob("*.json"):
        edited(path, lambda data: data.update(run=name))
    edited(fresh / file, lambda data: data["provenance"].pop("closed"))
    only = {"check": ["smoke"], "time": {"spaced": [], "sustained": ["smoke"]}}
    (fresh / "config.json").write_text(json.dumps({"suites": NOTHING | only}))
    addenda.add(fresh, recorded)
    assert recorded / "addenda" / name / file in addenda.files(recorded, "timing")
    tables = tidy.tidy(recorded, "replay", synthetic.PROBLEMS)
    assert {r["run"] for r in tables.speedups if r["regime"] == "sustained"} == {name}
    (found,) = [run for run in tables.provenance["addenda"] if run["run"] == name]
    assert found["replaced"] == {file: "later"} and found["replaced_why"] == {file: "interrupted"}


def test_what_was_recorded_of_another_kernel_is_replaced(runs, recorded):
    target = recorded / "timing" / "smoke.sustained.json"
    shutil.copy(runs / "later" / "timing" / "smoke.sustained.json", target)
    edited(target, lambda data: data["subjects"]["stage5"].update(kernel_hash="0" * 16))
    edited(target, lambda data: data.update(run="synthetic"))
    addenda.add(runs / "later", recorded)
    assert addenda.files(recorded, "timing")[-1].is_relative_to(recorded / "addenda")
    (found,) = tidy.tidy(recorded, "replay", synthetic.PROBLEMS).provenance["addenda"]
    assert found["replaced_why"] == {"timing/smoke.sustained.json": "kernel changed"}


def test_what_was_recorded_of_another_problem_is_replaced(runs, recorded, tmp_path):
    """As far as the table of problems is at hand."""
    target = recorded / "timing" / "smoke.sustained.json"
    shutil.copy(runs / "later" / "timing" / "smoke.sustained.json", target)
    edited(target, lambda data: data["problems"][0]["problem"].update(batch=77))
    edited(target, lambda data: data.update(run="synthetic"))
    with pytest.raises(NotPromoted, match="has it whole"):
        addenda.add(runs / "later", recorded, tmp_path / "no.tsv")
    addenda.add(runs / "later", recorded)
    (found,) = tidy.tidy(recorded, "replay", synthetic.PROBLEMS).provenance["addenda"]
    assert found["replaced_why"] == {"timing/smoke.sustained.json": "problem changed"}


def with_host(runs, recorded, suite, factor):
    """Host costs of a suite in the recorded run, where the twin of one problem is off by a factor,
    and in the later one."""
    synthetic.Maker(recorded, seed=5).host(suite)

    def off(data):
        entry = next(e for e in data["problems"] if "fa3#2" in e["samples"])
        twin = entry["samples"]["fa3#2"]
        twin["eager_host_us"] = [[factor * us for us in p] for p in twin["eager_host_us"]]

    edited(recorded / "host" / f"{suite}.json", off)
    synthetic.Maker(runs / "later", seed=6).host(suite)
    edited(runs / "later" / "host" / f"{suite}.json", later)
    edited(runs / "later" / "config.json", lambda data: data["suites"].update(host=[suite]))


def test_host_costs_whose_pairs_agree_are_not_replaced(runs, recorded):
    with_host(runs, recorded, "smoke", 1.0)
    refused(runs, recorded, "host/smoke.json: .* has it whole")


def test_host_costs_with_a_pair_that_is_off_are_replaced_as_a_whole(runs, recorded):
    with_host(runs, recorded, "smoke", 1.42)
    before = tidy.tidy(recorded, "replay", synthetic.PROBLEMS)
    assert [i["regime"] for i in before.provenance["inconclusive"]] == ["host"]
    addenda.add(runs / "later", recorded)
    both = tidy.tidy(recorded, "replay", synthetic.PROBLEMS)
    assert both.provenance["inconclusive"] == []
    assert both.provenance["addenda"][0]["replaced_why"] == {"host/smoke.json": "A/A off"}
    alone = tidy.tidy(runs / "later", "measure", synthetic.PROBLEMS)
    names = {*host_pairs.KINDS, *host_pairs.HOST_PAIRS, "first_call_ms"}
    names |= {f"aa_{kind}" for kind in host_pairs.KINDS}

    def of_host(tables):
        return [r for r in tables.metrics if r["regime"] == "-" and r["metric"] in names]

    assert of_host(both) == of_host(alone) != of_host(before)
    assert {r["run"] for r in of_host(both)} == {"later"}
    others = {r["run"] for r in both.metrics if (r["suite"], r["metric"]) == ("smoke", "correct")}
    assert others == {"synthetic"}


def test_a_verdict_says_which_run_it_is_of(runs, recorded):
    """Checks and host costs of one suite, of two runs."""
    synthetic.Maker(recorded).check("gate")
    with_host(runs, recorded, "gate", 1.42)
    addenda.add(runs / "later", recorded)
    synthetic.derive(recorded, recorded.parent / "results")
    evidence = load(recorded.parent / "results", synthetic.PROBLEMS, synthetic.CONSTRAINTS)
    of = {
        row["metric"].partition(",")[0]: row["run"]
        for row in evidence.verdicts
        if row["suite"] == "gate" and row["regime"] == "-"
    }
    assert of["host_over_fa3"] == of["eager_gain"] == "later"
    assert of["correct (min)"] == of["unit_error (max)"] == "synthetic"


def checked(recorded, subject="stage5"):
    """(rows of checks of a subject in smoke, {run: problems that are right}, what is stale)"""
    tables = tidy.tidy(recorded, "replay", synthetic.PROBLEMS)
    rows = [
        r
        for r in tables.metrics
        if (r["suite"], r["subject"], r["regime"]) == ("smoke", subject, "-")
    ]
    right = {}
    for row in rows:
        if row["metric"] == "correct":
            right.setdefault(row["run"], set()).add((row["problem"], row["value"]))
    stale = [s for s in tables.provenance["stale"] if s["file"] == "check/smoke.json"]
    return rows, right, stale


def test_a_fresh_check_stands_for_a_stale_one(runs, recorded):
    _, before, _ = checked(recorded)
    edited(
        recorded / "check" / "smoke.json",
        lambda data: data["subjects"]["stage5"].update(kernel_hash="0" * 16),
    )
    rows, _, stale = checked(recorded)
    assert rows == [] and [s["what"] for s in stale] == ["stage5"]
    where = addenda.add(runs / "later", recorded)
    rows, right, stale = checked(recorded)
    assert right == {"later": before["synthetic"]} and stale == []
    assert {r["run"] for r in rows} == {"later"}
    assert set(checked(recorded, "fa3")[1]) == {"synthetic"}
    edited(
        where / "check" / "smoke.json",
        lambda data: data["subjects"]["stage5"].update(kernel_hash="1" * 16),
    )
    rows, _, stale = checked(recorded)
    assert rows == [] and [s["what"] for s in stale] == ["stage5"]


def test_a_fresh_check_of_a_changed_problem_stands_for_the_recorded_one(runs, recorded):
    name = json.loads((recorded / "check" / "smoke.json").read_text())["results"][0]["problem"][
        "id"
    ]

    def change(data):
        for row in data["results"]:
            if row["problem"]["id"] == name:
                row["problem"]["batch"] = 77

    edited(recorded / "check" / "smoke.json", change)
    _, right, stale = checked(recorded)
    assert all(name != problem for problem, _ in right["synthetic"])
    assert [s["what"] for s in stale] == [name]
    addenda.add(runs / "later", recorded)
    _, both, stale = checked(recorded)
    assert both == {"synthetic": right["synthetic"], "later": {(name, 1.0)}} and stale == []


def test_a_fresh_check_that_failed_stands_for_a_stale_one(runs, recorded):
    def fail(data):
        for row in data["results"]:
            if row["subject"] == "stage5":
                row |= {"ok": False, "status": "failed", "message": "NaN", "identical_runs": None}

    edited(
        recorded / "check" / "smoke.json",
        lambda data: data["subjects"]["stage5"].update(kernel_hash="0" * 16),
    )
    where = addenda.add(runs / "later", recorded)
    edited(where / "check" / "smoke.json", fail)
    _, right, _ = checked(recorded)
    assert {value for _, value in right["later"]} == {0.0} and set(right) == {"later"}
    excluded = tidy.tidy(recorded, "replay", synthetic.PROBLEMS).provenance["excluded"]
    told = [e["problem"] for e in excluded if e["reason"] == "run later: NaN"]
    assert sorted(told) == sorted(problem for problem, _ in right["later"])


def test_a_check_that_two_addenda_have_is_rendered_once(runs, recorded):
    where = addenda.add(runs / "later", recorded)
    again = where.with_name("later2")
    shutil.copytree(where, again)
    shutil.rmtree(again / "timing")
    for path in again.rglob("*.json"):
        edited(path, lambda data: data.update(run="later2"))
    rows = tidy.tidy(recorded, "replay", synthetic.PROBLEMS).metrics
    keys = [tuple(v for k, v in row.items() if k not in ("value", "run")) for row in rows]
    assert len(keys) == len(set(keys))


def test_a_file_is_in_one_addendum(runs, recorded):
    addenda.add(runs / "later", recorded)
    addenda.add(runs / "later", recorded)  # again, under its own name
    (runs / "later").rename(runs / "third")
    with pytest.raises(NotPromoted, match="later has it whole"):
        addenda.add(runs / "third", recorded)


def test_the_limit_of_a_recorded_run_holds_with_its_addenda(runs, recorded, monkeypatch):
    monkeypatch.setattr(addenda, "LIMIT_BYTES", 1000)
    refused(runs, recorded, "name fewer suites")


def test_counters_are_not_added(runs, recorded):
    synthetic.Maker(runs / "later").ncu("smoke")
    edited(runs / "later" / "ncu" / "smoke.json", later)
    edited(runs / "later" / "config.json", lambda data: data["suites"].update(profile=["smoke"]))
    refused(runs, recorded, "ncu/smoke.json: only checks, timings, host costs and serving")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["content"].update(driver="1.2"), "driver='1.2', but the recorded run"),
        (lambda data: data["content"]["measuring"].update(gap_us=7), "gap_us=7, but the recorded"),
    ],
)
def test_another_machine_or_configuration_is_refused(runs, recorded, change, message):
    for path in (runs / "later").rglob("*.json"):
        if path.name != "config.json":
            edited(path, change)
    refused(runs, recorded, message)


def test_there_is_a_run_to_complete(runs, tmp_path):
    refused(runs, tmp_path / "measurements" / "nothing", "no recorded run")


def test_a_record_of_another_run_among_an_addendum_is_found(runs, recorded):
    where = addenda.add(runs / "later", recorded)
    edited(where / "timing" / "gate.spaced.json", lambda data: data.update(run="third"))
    with pytest.raises(ValueError, match="belongs to run 'third', device.json to 'later'"):
        tidy.tidy(recorded, "replay", synthetic.PROBLEMS)


def test_a_broken_addendum_is_an_error(runs, recorded):
    where = addenda.add(runs / "later", recorded)
    (where / "timing" / "gate.spaced.json").write_text("{")
    with pytest.raises(RecordError, match="not valid JSON"):
        tidy.tidy(recorded, "replay", synthetic.PROBLEMS)


def test_verify_compares_with_the_addendum(runs, recorded):
    addenda.add(runs / "later", recorded)
    claims = verify.verify(runs / "later", recorded, open_report=synthetic.open_report)
    told = {claim.claim: claim.verdict for claim in claims}
    assert told["stage5 against its peer, gate spaced"] == "PASS"
    assert told["stage5 against its peer, smoke sustained"] == "PASS"


def test_a_replay_depends_on_addenda_and_asks_for_no_more(runs, recorded):
    addenda.add(runs / "later", recorded)
    config = {**MORE, "problems": "x", "measuring": {"gap_us": 1000}}
    held, told = _recorded(config, recorded)
    assert told == ["not in the recorded run, so not rendered: check/gate.json"]
    plan = Plan(held, "replay", "x", recorded, "none", (), {}, "c", False)
    assert str(recorded / "addenda" / "later" / "timing" / "gate.spaced.json") in plan.raw_files


def test_the_command_adds(runs, recorded):
    done = CliRunner().invoke(
        app, ["promote", "--run", str(runs / "later"), "--add", "--to", str(recorded)]
    )
    assert done.exit_code == 0, done.output
    assert (recorded / "addenda" / "later" / "config.json").is_file()


def test_the_paper_says_which_run_a_file_is_from(runs, recorded, tmp_path):
    addenda.add(runs / "later", recorded)
    synthetic.derive(recorded, tmp_path / "results")
    evidence = load(tmp_path / "results", synthetic.PROBLEMS, synthetic.CONSTRAINTS)
    assert "run synthetic + later," in evidence.stamp
    said = evidence.added("timing/smoke.sustained.json")
    assert "is from run later, of another board" in said and "takes the place" not in said
    assert evidence.measuring("timing/smoke.sustained.json")["sustained_bursts"] == 9
    assert evidence.measuring("timing/smoke.spaced.json")["sustained_bursts"] != 9
    assert evidence.added("timing/smoke.spaced.json") == ""
