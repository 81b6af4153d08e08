"""A fresh run against the recorded one: the same passes, a planted slow-down does not."""

import json
import shutil
from pathlib import Path

import pytest
import synthetic
from typer.testing import CliRunner

from attn_profiling import verdict, verify
from attn_profiling.cli import app
from attn_profiling.record import read
from attn_profiling.verify import NotComparable, judge

FRESH = {}
ROOT = synthetic.ROOT


def make(folder, seed, **noise):
    """A run that a test may change."""
    if noise:
        return written(folder, seed, **noise)
    return Path(shutil.copytree(FRESH[seed], folder / "run"))


def written(folder, seed, **noise):
    maker = synthetic.Maker(folder, seed, **noise)
    maker.device()
    maker.check("smoke")
    maker.timing("gate", "spaced")
    return folder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return written(tmp_path_factory.mktemp("recorded"), 1)


@pytest.fixture(scope="module", autouse=True)
def fresh(tmp_path_factory):
    """The untouched run that tests copy."""
    FRESH[2] = written(tmp_path_factory.mktemp("fresh"), 2)


def verdicts(claims, word="against"):
    return {c.claim.split()[0]: c.verdict for c in claims if word in c.claim}


def test_the_same_truth_passes(recorded, tmp_path):
    claims = verify.verify(make(tmp_path, 2), recorded)
    assert set(verdicts(claims).values()) == {"PASS"}
    assert set(verdicts(claims)) >= {"stage1", "cudnn"} and "fa3" not in verdicts(claims)
    assert verify.overall(claims) == "PASS"


def slowed(folder, subject, factor, problems=lambda name: True):
    path = folder / "timing" / "gate.spaced.json"
    data = json.loads(path.read_text())
    for row in data["problems"]:
        if problems(row["problem"]["id"]):
            sample = row["attempts"][-1]["samples"][subject]
            sample["gpu_us"] = [[us * factor for us in process] for process in sample["gpu_us"]]
    path.write_text(json.dumps(data))
    return folder


def test_a_planted_slow_down_of_five_percent_is_found(recorded, tmp_path):
    run = slowed(make(tmp_path, 2), "stage1", 1.05)
    found = verdicts(verify.verify(run, recorded))
    assert found.pop("stage1") == "FAIL"
    assert set(found.values()) == {"PASS"}


def test_a_slow_down_that_noise_hides_is_ambiguous_never_a_pass(recorded, tmp_path):
    run = slowed(make(tmp_path, 2, between=0.05), "stage1", 1.03)
    assert verdicts(verify.verify(run, recorded))["stage1"] != "PASS"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.01, 0.01, "PASS"),
        (-0.06, -0.04, "FAIL"),
        (0.03, 0.05, "FAIL"),
        (-0.03, 0.0, "AMBIGUOUS"),
        (-0.5, 0.5, "AMBIGUOUS"),
    ],
)
def test_the_interval_decides(low, high, verdict):
    assert judge(low, high, 0.025) == verdict


CLAIMS = verdict.read_constraints(synthetic.CONSTRAINTS)
NCU, HOST = ("ncu", "grid"), ("host", "gate")


def rows(said, effect, name="sync-held"):
    """Rows of verdicts.csv in which one hypothesis is decided, in its first suite, and nothing else
    was measured."""
    return [
        {
            "effect": effect if (h.id, n) == (name, 0) else "",
            "verdict": said if (h.id, n) == (name, 0) else "INCONCLUSIVE",
        }
        for h in CLAIMS.hypotheses
        for n, _ in enumerate(h.suites)
    ] + [{"effect": "", "verdict": "INCONCLUSIVE"}] * len(CLAIMS.constraints)


@pytest.mark.parametrize(
    ("then", "now", "measured", "said"),
    [
        (("REFUTED", 0.3), ("REFUTED", 0.9), [NCU], ["PASS"]),
        (("REFUTED (post hoc)", 0.3), ("REFUTED", 0.9), [NCU], ["PASS"]),
        (("REFUTED", 0.3), ("SUPPORTED", 2.3), [NCU], ["FAIL"]),
        (("SUPPORTED", 2.3), ("REFUTED", 0.3), [NCU], ["FAIL"]),
        (("REFUTED", 0.3), ("INCONCLUSIVE", 0.7), [NCU], ["PASS"]),  # moved by less than 0.5
        (("REFUTED", 0.3), ("INCONCLUSIVE", 1.7), [NCU], ["AMBIGUOUS"]),
        (("INCONCLUSIVE", 1.7), ("REFUTED", 0.3), [NCU], ["AMBIGUOUS"]),
        (("REFUTED", 0.3), ("INCONCLUSIVE", ""), [NCU, HOST], ["AMBIGUOUS"]),
        (("REFUTED", 0.3), ("INCONCLUSIVE", ""), [HOST], []),  # the fresh run did not ask
        (("INCONCLUSIVE", ""), ("REFUTED", 0.3), [NCU], []),
    ],
)
def test_what_the_counters_say_is_compared(then, now, measured, said):
    claims = verify.compare_verdicts(CLAIMS, rows(*now), rows(*then), measured)
    assert [c.verdict for c in claims] == said
    assert all(c.claim == "sync-held, grid" for c in claims)


def test_ratios_of_times_are_compared_as_ratios_only():
    known = rows("SUPPORTED", 1.2, name="gate-5")
    assert verify.compare_verdicts(CLAIMS, known, known, [("timing", "gate")]) == []


def test_a_witness_that_turned_is_found_in_the_raw_files(recorded, tmp_path):
    """Batch 1 takes six times as long in one run as in the other."""
    run = slowed(make(tmp_path, 2), "stage3", 6, lambda name: name == "gate-b1")
    claims = {c.claim: c.verdict for c in verify.verify(run, recorded)}
    assert claims["gate-3-sequence-gpu, gate"] == "FAIL"
    same = {c.claim: c.verdict for c in verify.verify(recorded, recorded)}
    assert same["gate-3-sequence-gpu, gate"] == "PASS"


def test_what_no_longer_passes_the_gate_fails(recorded, tmp_path):
    run = make(tmp_path, 2)
    path = run / "check" / "smoke.json"
    data = json.loads(path.read_text())
    row = next(r for r in data["results"] if r["subject"] == "stage1")
    row.update(ok=False, status="failed", message="error 0.1 exceeds 0.01")
    path.write_text(json.dumps(data))
    claims = verify.verify(run, recorded)
    failed = [c for c in claims if c.verdict == "FAIL"]
    assert [c.claim for c in failed] == ["stage1 passes the gate, smoke"]
    assert "error 0.1 exceeds 0.01" in failed[0].note


def test_another_kernel_is_not_compared_as_the_same(recorded, tmp_path):
    run = make(tmp_path, 2)
    path = run / "timing" / "gate.spaced.json"
    data = json.loads(path.read_text())
    data["subjects"]["stage1"]["kernel_hash"] = "0" * 16
    path.write_text(json.dumps(data))
    claims = {c.claim.split()[0]: c for c in verify.verify(run, recorded)}
    assert claims["stage1"].verdict == "AMBIGUOUS"
    assert "different kernels" in claims["stage1"].note


def test_what_the_fresh_run_lacks_does_not_pass(recorded, tmp_path):
    run = make(tmp_path, 2)
    (run / "timing" / "gate.spaced.json").rename(run / "timing" / "other.spaced.json")
    claims = {c.claim: c for c in verify.verify(run, recorded)}
    lost = claims["timing/gate.spaced.json"]
    assert (lost.verdict, lost.fresh) == ("AMBIGUOUS", "not measured")
    assert verify.overall(claims.values()) != "PASS"


def test_times_measured_in_another_way_do_not_pass(recorded, tmp_path):
    run = make(tmp_path, 2)
    path = run / "timing" / "gate.spaced.json"
    data = json.loads(path.read_text())
    data["content"]["measuring"]["gap_us"] += 1
    path.write_text(json.dumps(data))
    claims = {c.claim.split()[0]: c for c in verify.verify(run, recorded)}
    assert claims["stage1"].verdict == "AMBIGUOUS"
    assert "another way" in claims["stage1"].note


def test_problems_that_are_inconclusive_now_do_not_pass(recorded, tmp_path):
    run = make(tmp_path, 2)
    path = run / "timing" / "gate.spaced.json"
    data = json.loads(path.read_text())
    data["problems"][0]["status"] = "inconclusive"
    path.write_text(json.dumps(data))
    claims = [c for c in verify.verify(run, recorded) if c.claim.startswith("stage1 against")]
    assert (
        claims[0].verdict == "AMBIGUOUS" and data["problems"][0]["problem"]["id"] in claims[0].note
    )


def test_a_suite_without_a_peer_makes_no_claim(recorded):
    from attn_profiling.record import read

    data = read(recorded / "timing" / "gate.spaced.json", "timing")
    assert verify.compare_timing(data, data, 0.025)
    for row in data["problems"]:
        samples = row["attempts"][-1]["samples"]
        row["attempts"][-1]["samples"] = {"stage1": samples["stage1"]}
    assert verify.compare_timing(data, data, 0.025) == []


def test_runs_of_two_gpu_models_are_not_compared(recorded, tmp_path):
    run = make(tmp_path, 2)
    path = run / "device.json"
    data = json.loads(path.read_text())
    data["content"]["gpu"] = "NVIDIA H200"
    path.write_text(json.dumps(data))
    with pytest.raises(NotComparable, match="compare runs of one GPU model"):
        verify.verify(run, recorded)


def test_runs_with_nothing_in_common_are_not_compared(recorded, tmp_path):
    maker = synthetic.Maker(tmp_path)
    maker.device()
    with pytest.raises(NotComparable, match="has no suite that"):
        verify.verify(tmp_path, recorded)


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1.05, 1)])
def test_the_exit_status_tells(recorded, tmp_path, factor, status):
    run = slowed(make(tmp_path, 2), "stage1", factor)
    result = CliRunner().invoke(app, ["verify", "--run", str(run), "--against", str(recorded)])
    assert result.exit_code == status, result.output
    assert "stage1 against its peer" in " ".join(result.stdout.split())


def test_errors_are_one_line_not_a_trace(tmp_path):
    result = CliRunner().invoke(app, ["verify", "--run", str(tmp_path)])
    assert result.exit_code == 1
    assert "device.json: no such file" in result.stderr.replace("\n", "")
    assert "Traceback" not in result.output


@pytest.mark.parametrize(("slower", "said"), [(1.0, "PASS"), (1.05, "FAIL")])
def test_a_planted_slow_down_is_found_between_real_runs_on_two_boards(slower, said):
    """The recorded run and its replication, of the subjects whose kernel is the same in both."""
    recorded = read(ROOT / "measurements/h100-sxm-80gb/timing/gate.spaced.json", "timing")
    (path, *_) = (ROOT / "measurements/replications").glob("*/*/timing/gate.spaced.json")
    again = read(path, "timing")
    boards = {record["provenance"]["gpu_uuid"] for record in (recorded, again)}
    assert len(boards) == 2
    hashes = [{n: s["kernel_hash"] for n, s in r["subjects"].items()} for r in (recorded, again)]
    same = {n for n in hashes[0] if n != "fa3" and hashes[0][n] == hashes[1].get(n)}
    assert len(same) >= 2
    for row in again["problems"]:
        for name, sample in row["attempts"][-1]["samples"].items():
            if name in same:
                sample["gpu_us"] = [[us * slower for us in process] for process in sample["gpu_us"]]
    claims = {
        c.claim.split()[0]: c for c in verify.compare_timing(again, recorded, verify.TOLERANCE)
    }
    assert {claims[name].verdict for name in same} == {said}
