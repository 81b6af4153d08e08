"""Another run beside the recorded one: kept whole or not at all, and compared anew."""

import json

import pytest
import synthetic
from typer.testing import CliRunner

from attn_profiling import replication
from attn_profiling.cli import app
from attn_profiling.record import write_text
from attn_profiling.replication import NotKept
from attn_profiling.tidy import csv_text
from paper import numbers, tables
from paper.evidence import load


def edited(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def everywhere(run, change):
    for path in run.rglob("*.json"):
        edited(path, change)


def written(folder, seed, run="synthetic"):
    maker = synthetic.Maker(folder, seed)
    maker.device()
    maker.check("smoke")
    maker.timing("gate", "spaced")
    everywhere(folder, lambda data: data.update(run=run))
    return folder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return written(tmp_path_factory.mktemp("recorded"), 1)


@pytest.fixture
def fresh(tmp_path):
    return written(tmp_path / "runs" / "again", 2, "again")


def slow(data):
    for row in data["problems"]:
        sample = row["attempts"][-1]["samples"]["stage1"]
        sample["gpu_us"] = [[us * 1.05 for us in process] for process in sample["gpu_us"]]


def test_a_kept_run_repeats_the_ratios(recorded, fresh, tmp_path):
    home = tmp_path / "replications"
    replication.keep(fresh, home / "again")
    assert {path.name for path in home.rglob("*.json")} == {
        "device.json", "smoke.json", "gate.spaced.json"
    }  # fmt: skip
    rows = replication.compare(recorded, home)
    assert {row["subject"] for row in rows} >= {"stage1", "stage5", "cudnn"}
    assert {row["verdict"] for row in rows} == {"PASS"}
    assert {(row["suite"], row["regime"]) for row in rows} == {("gate", "spaced")}


def test_a_slow_down_of_five_percent_in_a_kept_run_is_told(recorded, fresh, tmp_path):
    edited(fresh / "timing" / "gate.spaced.json", slow)
    replication.keep(fresh, tmp_path / "replications" / "again")
    rows = {r["subject"]: r for r in replication.compare(recorded, tmp_path / "replications")}
    assert rows["stage1"]["verdict"] == "FAIL" and rows["stage5"]["verdict"] == "PASS"
    assert rows["stage1"]["change"] == pytest.approx(1 / 1.05 - 1, abs=0.005)


def told(recorded, tmp_path, subject="stage1"):
    rows = {r["subject"]: r for r in replication.compare(recorded, tmp_path / "replications")}
    return (rows[subject]["verdict"], rows[subject]["note"]) if rows else None


def test_a_run_does_not_repeat_itself_nor_one_of_another_gpu(recorded, fresh, tmp_path):
    target = tmp_path / "replications" / "again"
    replication.keep(fresh, target)
    assert told(recorded, tmp_path) is not None
    everywhere(target, lambda data: data.update(run="synthetic"))
    assert told(recorded, tmp_path) is None
    everywhere(target, lambda data: data.update(run="again"))
    everywhere(target, lambda data: data["content"].update(gpu="NVIDIA H200"))
    assert told(recorded, tmp_path) is None


def test_what_was_measured_in_another_way_or_of_another_kernel_is_no_pass(
    recorded, fresh, tmp_path, monkeypatch
):
    replication.keep(fresh, tmp_path / "replications" / "again")
    assert told(recorded, tmp_path)[0] == "PASS"
    with monkeypatch.context() as patched:
        patched.setattr(replication, "stale", lambda record, subject: subject == "stage1")
        assert told(recorded, tmp_path)[0] == "AMBIGUOUS"
        assert told(recorded, tmp_path)[1].startswith("its kernel has changed since; median of")
        assert told(recorded, tmp_path, "stage5")[0] == "PASS"
    path = tmp_path / "replications" / "again" / "timing" / "gate.spaced.json"
    edited(path, lambda data: data["content"]["measuring"].update(sustained_ms=9))
    assert told(recorded, tmp_path)[0] == "PASS"  # it is of spaced launches
    edited(path, lambda data: data["content"]["measuring"].update(gap_us=9))
    assert told(recorded, tmp_path)[1].startswith("measured in another way; median of")


def test_what_cannot_be_kept_leaves_what_was_kept(recorded, fresh, tmp_path):
    target = tmp_path / "replications" / "again"
    replication.keep(fresh, target)
    before = (target / "timing" / "gate.spaced.json").read_bytes()

    def other_board(data):
        data["provenance"]["gpu_uuid"] = "GPU-other"

    edited(fresh / "check" / "smoke.json", other_board)
    with pytest.raises(NotKept, match="records of 2 boards"):
        replication.keep(fresh, target)
    (fresh / "check" / "smoke.json").write_text("{")
    with pytest.raises(NotKept, match=r"smoke\.json"):
        replication.keep(fresh, target)
    (fresh / "check" / "smoke.json").unlink()
    (fresh / "timing" / "gate.spaced.json").unlink()
    with pytest.raises(NotKept, match="no times were measured"):
        replication.keep(fresh, target)
    assert (target / "timing" / "gate.spaced.json").read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == ["again"]


def test_the_paper_shows_the_repeated_ratios(recorded, fresh, tmp_path):
    edited(fresh / "timing" / "gate.spaced.json", slow)
    replication.keep(fresh, tmp_path / "replications" / "again")
    rows = replication.compare(recorded, tmp_path / "replications")
    synthetic.derive(recorded, tmp_path / "results")
    without = load(tmp_path / "results", synthetic.PROBLEMS, synthetic.CONSTRAINTS)
    assert tables.replication(without).is_empty
    assert numbers.numbers(without)[r"\ReplicationRuns"] == "0"
    write_text(tmp_path / "results" / "replications.csv", csv_text(replication.COLUMNS, rows))
    evidence = load(tmp_path / "results", synthetic.PROBLEMS, synthetic.CONSTRAINTS)
    table = tables.replication(evidence)
    place = {name: table.header.index(name) for name in ("subject", "problems", "again, %")}
    told = {row[place["subject"]]: row for row in table.rows}
    stage1, stage5 = told["stage 1"][place["again, %"]], told["stage 5"][place["again, %"]]
    assert stage1.endswith("] FAIL") and stage5.endswith("]")
    assert told["stage 5"][place["problems"]] == "7"
    assert "the same board" in table.note and "within 2.5 %" in table.note
    found = numbers.numbers(evidence)
    assert (found[r"\ReplicationRuns"], found[r"\ReplicationBoards"]) == ("1", "0")
    assert int(found[r"\ReplicationPassed"]) == int(found[r"\ReplicationRatios"]) - 1
    assert 4 < float(found[r"\ReplicationWorstSuitePercent"]) < 6
    assert 4 < float(found[r"\ReplicationWorstProblemPercent"]) < 8


def test_the_commands(recorded, fresh, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    kept = runner.invoke(app, ["keep", "--run", str(fresh)])
    assert kept.exit_code == 0, kept.output
    options = ["--raw", str(recorded), "--device", "h100-sxm-80gb", "--out", "out.csv"]
    assert runner.invoke(app, ["replications", *options]).exit_code == 0
    assert "stage5" in (tmp_path / "out.csv").read_text()
    options[3] = "other"
    assert runner.invoke(app, ["replications", *options]).exit_code == 0
    assert (tmp_path / "out.csv").read_text() == ",".join(replication.COLUMNS) + "\n"
    assert runner.invoke(app, ["keep", "--run", str(tmp_path)]).exit_code == 1
