"""Predictions: configurations as the stages have them, queues and schedules by hand, the committed
file, and whether it was there before a run."""

import csv
import importlib
import subprocess

import pytest
import synthetic
from typer.testing import CliRunner

from attn_ladder.problem import Problem, read_problems
from attn_profiling import predict
from attn_profiling.cli import app
from attn_profiling.record import predictions_sha256
from paper import numbers, tables
from paper.evidence import load

PROBLEMS = read_problems(synthetic.PROBLEMS)
PREDICTED = [p for p in PROBLEMS.values() if {"grid", "gate"} & set(p.suites)]
GRID = [p for p in PREDICTED if "grid" in p.suites]
PILOT = synthetic.ROOT / "config" / "pilot.csv"
MODULES = {
    "stage1": "stage1_fused",
    "stage2": "stage2_signalling",
    "stage3": "stage3_persistent",
    "stage4": "stage4_pipeline",
    "stage5": "stage5_everything",
}


def configuration(subject, problem):
    """What a stage's own source says, in the words of `predict.Tiles`."""
    stage = importlib.import_module(f"attn_ladder.{MODULES[subject]}")
    if subject == "stage5":
        size = (problem.batch, problem.seqlen_q, problem.nheads, problem.headdim)
        c = stage.schedule(None, size, size, problem.causal, 132)[0]
        order = {"static": "strided", "dynamic": "counter"}.get(c.schedule, c.schedule)
        return {
            "keys": c.BLOCK_N, "warpgroups": c.consumers, "overlap": c.overlap, "order": order,
            "half_diagonal": c.half_diagonal, "l2_bytes": c.l2_bytes,
        }  # fmt: skip
    c = stage.CONFIGS[problem.headdim]
    said = {"keys": c.BLOCK_N}
    if subject == "stage1":
        said["rows"] = c.BLOCK_M
    if hasattr(c, "num_registers"):
        said["ctas"] = 256 // c.num_registers
    if hasattr(c, "l2_bytes"):
        said["l2_bytes"] = c.l2_bytes
    if hasattr(c, "overlap"):
        said["overlap"] = c.overlap
    return said


def differing(tiles, said):
    return {name: value for name, value in said.items() if getattr(tiles, name) != value}


@pytest.mark.parametrize("subject", predict.STAGES)
def test_tiles_are_those_of_the_stage(subject):
    for problem in PREDICTED:
        tiles = predict.tiles(subject, problem)
        assert differing(tiles, configuration(subject, problem)) == {}, problem.id
    other = predict.Tiles(32, 1, "other", "other", 9, 4, l2_bytes=1)
    assert "keys" in differing(other, configuration(subject, GRID[0]))


def test_what_the_model_does_not_cover_is_an_error():
    with pytest.raises(ValueError, match="'fa3' is not predicted; known: stage1"):
        predict.tiles("fa3", GRID[0])
    with pytest.raises(ValueError, match="smoke-d128-ragged.*seqlen_q=300.*multiples of 128"):
        predict.predict(PROBLEMS["smoke-d128-ragged"], "stage5")


def test_demands_are_those_of_the_algorithm():
    """64 × 128 × 128: 4 · 64 · 128 · 128 operations at 4096 a cycle, 16 exp2 a cycle."""
    problem = PROBLEMS["grid-d128-full-s8192"]
    need = predict.demand(
        predict.tiles("stage5", problem), problem, predict.device("h100-sxm-80gb")
    )
    assert need.tensor == pytest.approx(1024, rel=1e-3) and need.mufu == 512
    assert need.issue == 310
    assert need.shared == 2 * 128 * (2 * 128 + 64) / 128
    assert need.products == need.tensor and need.softmax == need.mufu


def test_a_queueing_network():
    """One stream waits for nobody; many keep the busiest resource busy; two of one resource."""
    assert predict.meeting_by_chance([3.0, 2.0], 1, 5.0) == 10.0
    assert predict.meeting_by_chance([3.0, 2.0], 100, 5.0) / 100 == pytest.approx(3.0)
    assert predict.meeting_by_chance([4.0], 2, 0.0) == 8.0
    two = predict.meeting_by_chance([3.0, 3.0], 2, 0.0)
    assert 6.0 < two < 12.0  # neither perfect overlap nor none


def test_overlap_is_worth_what_it_hides():
    need = predict.Demand(tensor=512, mufu=512, issue=300, shared=300, l2=10)

    def step(overlap, warpgroups=2, latency=100.0):
        tiles = predict.Tiles(128, 300, overlap, "strided", warpgroups=warpgroups)
        return predict.step_cycles(tiles, need, latency, 1)

    assert step("step") == 2 * 512 + 2 * 512 + 100  # all in turn
    assert step("own") == 512 + 2 * 512 + 100  # one product is not hidden
    assert step("others") == 2 * (512 + 100)  # the softmax hides behind the other's product
    assert step("others") < step("free") < step("step") and step("others") < step("own")
    assert step("others", latency=0.0) == 2 * 512  # the bound: a resource is always busy
    starved = predict.Demand(tensor=512, mufu=512, issue=300, shared=300, l2=2000)
    tiles = predict.Tiles(128, 300, "others", "strided")
    assert predict.step_cycles(tiles, starved, 100.0, 1) == 2 * 2000


def test_waves_and_imbalance():
    for order in ("launched", "strided", "snake"):
        assert predict.finish([1.0] * 132, order, 132) == 1.0
        assert predict.finish([1.0] * 133, order, 132) == 2.0
    falling = [4.0, 3.0, 2.0, 1.0]
    assert predict.finish(falling, "snake", 2) == 5.0
    assert predict.finish(falling, "strided", 2) == 6.0
    assert predict.finish([5.0, 1.0, 1.0, 1.0], "launched", 2) == 5.0
    # whoever asks one tile ahead may be given a tile behind a long one
    assert predict.finish([5.0, 1.0, 1.0, 1.0], "counter", 2) == 6.0


def test_every_tile_is_handed_out_once():
    for problem in PREDICTED:
        for subject in predict.STAGES:
            tiles = predict.tiles(subject, problem)
            pieces = predict.work(tiles, problem, 132 * tiles.ctas)
            num_m = -(-problem.seqlen_q // tiles.rows)
            heads = problem.batch * problem.nheads
            assert sum(count for _, count in pieces) == heads * num_m, (problem.id, subject)
            steps = sum(predict.key_blocks(tiles, problem, m) for m in range(num_m))
            assert sum(steps for steps, _ in pieces) == heads * steps


def test_time_follows_the_clock_but_not_that_of_the_memory():
    long, short = PROBLEMS["grid-d128-full-s8192"], PROBLEMS["grid-d128-causal-s512"]
    start = predict.START_US.value
    fast, slow = (predict.predict(long, "stage5", clock_mhz=mhz).us - start for mhz in (2000, 1000))
    assert slow == pytest.approx(2 * fast)
    at = [predict.predict(short, "stage5", clock_mhz=mhz) for mhz in (4000, 8000)]
    assert at[0].us == at[1].us and at[0].limit == "DRAM"


def test_limits_and_bounds():
    for problem in PREDICTED:
        for subject in predict.STAGES:
            found = predict.predict(problem, subject)
            assert 0 < found.busy < 1 and found.tail_us > -1e-6, (problem.id, subject)
            assert found.loaded_mhz < found.clock_mhz
    assert predict.predict(PROBLEMS["grid-d128-full-s8192"], "stage5").limit == "tensor"
    assert predict.predict(PROBLEMS["grid-d64-full-s8192"], "stage5").limit == "tensor+MUFU"
    assert predict.predict(PROBLEMS["grid-d64-full-s8192"], "stage1").limit == "issue"


def test_the_pilot_times_are_met_and_a_wrong_constant_is_not(monkeypatch):
    def worst():
        errors = predict.pilot_errors(synthetic.PROBLEMS, PILOT)
        return {s: max(predict.off(e) for (_, x), e in errors.items() if x == s)
                for s in predict.TARGET}  # fmt: skip

    assert all(off <= predict.TARGET[subject] for subject, off in worst().items())
    for subject in predict.TARGET:
        wrong = predict.Fitted(1500, "cycles", "planted")
        monkeypatch.setitem(predict.STEP_LATENCY, subject, wrong)
    predict.predict.cache_clear()
    assert all(off > predict.TARGET[subject] for subject, off in worst().items())
    monkeypatch.undo()
    predict.predict.cache_clear()


def test_fitted_constants_say_what_they_were_fitted_to():
    fitted = [x for x in vars(predict).values() if isinstance(x, predict.Fitted)]
    fitted += [*predict.STEP_LATENCY.values(), *predict.TILE_OVERHEAD.values()]
    assert len(fitted) == 5 + 2 * len(predict.STAGES)
    assert all(constant.unit and constant.source for constant in fitted)


# -- the committed file


def command(*options):
    return CliRunner().invoke(app, ["predict", "--problems", str(synthetic.PROBLEMS), *options])


def test_the_committed_predictions_are_what_the_model_says():
    assert synthetic.PREDICTIONS.read_text() == predict.text(synthetic.PROBLEMS), (
        "run `attn-profiling predict --write` and commit it before the next run is measured"
    )
    with synthetic.PREDICTIONS.open(newline="") as handle:
        found = list(csv.DictReader(handle))
    assert tuple(found[0]) == predict.COLUMNS
    assert len(found) == len(PREDICTED) * len(predict.STAGES)


def test_check_fails_where_the_file_is_out_of_date(tmp_path, monkeypatch):
    path = tmp_path / "predictions.csv"
    assert command("--check", "--out", str(path)).exit_code == 1  # absent
    assert command("--write", "--out", str(path)).exit_code == 0
    assert command("--check", "--out", str(path)).exit_code == 0
    monkeypatch.setattr(predict, "START_US", predict.Fitted(9.0, "us", "planted"))
    predict.predict.cache_clear()
    assert command("--check", "--out", str(path)).exit_code == 1
    predict.predict.cache_clear()
    assert command("--out", str(path)).exit_code == 1  # neither --write nor --check


def git(folder, *words):
    name = ["-c", "user.name=x", "-c", "user.email=x@y", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", folder, *name, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def commit(folder, name, text):
    (folder / name).write_text(text)
    git(folder, "add", name)
    git(folder, "commit", "-q", "-m", name)
    return git(folder, "rev-parse", "HEAD")


def test_the_order_of_commits_decides(tmp_path):
    git(tmp_path, "init", "-q")
    path = tmp_path / "predictions.csv"
    too_early = commit(tmp_path, "kernel.py", "1")
    with_it = commit(tmp_path, path.name, "predicted\n")
    later = commit(tmp_path, "kernel.py", "2")
    mine = predictions_sha256(path)
    assert predict.predates([with_it], [None], path)
    assert predict.predates([with_it, later], [None], path)
    assert not predict.predates([too_early], [mine], path)  # git overrules what a run says
    assert not predict.predates([too_early, later], [mine], path)
    assert not predict.predates([], [mine], path)
    commit(tmp_path, path.name, "fitted afterwards\n")
    assert not predict.predates([later], [predictions_sha256(path)], path)
    path.unlink()
    assert not predict.predates([later], [None], path)


def test_without_git_the_recorded_hash_decides(tmp_path):
    path = tmp_path / "predictions.csv"
    path.write_text("predicted\n")
    unknown, mine = ["7" * 40], predictions_sha256(path)
    assert predict.predates(unknown, [mine], path)
    assert not predict.predates(unknown, [None], path)
    assert not predict.predates(unknown, [mine, "0" * 64], path)
    path.write_text("fitted afterwards\n")
    assert not predict.predates(unknown, [mine], path)


# -- the comparison


@pytest.fixture
def evidence():
    results = synthetic.shared() / "results"
    return load(results, synthetic.PROBLEMS, synthetic.CONSTRAINTS)


def test_errors_are_predicted_over_measured(evidence):
    problem = PROBLEMS["grid-d64-full-s2048"]
    predicted = evidence.predicted(problem.id, "stage5").us
    truth = synthetic.true_us(problem, "stage5")
    ratio = evidence.measured_over_predicted("grid", problem.id, "stage5").value
    assert ratio == pytest.approx(truth / predicted, rel=0.01)
    errors = evidence.prediction_errors("grid", "stage5")
    assert any(e == pytest.approx(predicted / truth - 1, abs=0.02) for e in errors)
    assert len(errors) == len(GRID) - 1  # one problem is inconclusive


def test_a_measured_clock_is_used(evidence, monkeypatch):
    committed = evidence.prediction_errors("grid", "stage5")
    assert evidence.prediction_errors("grid", "stage5", at_measured_clock=True) == committed
    metric = evidence.metric

    def slower(suite, problem, subject, name, regime="-"):
        if name == "spin_clock_mhz":
            return tables.Value(990.0)
        return metric(suite, problem, subject, name, regime)

    monkeypatch.setattr(evidence, "metric", slower)
    found = evidence.prediction_errors("grid", "stage5", at_measured_clock=True)
    assert all(a > b for a, b in zip(found, committed, strict=True))


def test_a_comparison_says_whether_it_is_post_hoc(evidence):
    assert "This comparison is confirmatory." in tables.prediction(evidence).note
    assert numbers.numbers(evidence)[r"\PredictionStatus"] == "confirmatory"
    evidence.provenance["predictions_sha256"] = [None]
    assert "This comparison is post hoc." in tables.prediction(evidence).note
    assert numbers.numbers(evidence)[r"\PredictionStatus"] == "post hoc"


def test_the_table_has_the_targets_and_says_what_was_not_measured(evidence, monkeypatch):
    rows = {row[0]: row for row in tables.prediction(evidence).rows}
    assert rows["stage 4"][4:6] == ["180", "0.95"] and rows["stage 4"][-2] == "≤ 15"
    assert rows["stage 4"][-1] in ("yes", "no") and rows["stage 1"][-2:] == ["", ""]
    monkeypatch.setattr(evidence, "metric", lambda *_: None)
    for row in tables.prediction(evidence).rows:
        assert row[8] == "not measured" and row[-1] == ""
    assert numbers.numbers(evidence)[r"\StageFivePredictionOff"] == numbers.MISSING


def test_another_device_has_no_predictions(evidence):
    assert evidence.predicted("gate-b16", "stage5") is not None
    results = synthetic.shared() / "results"
    other = load(results, synthetic.PROBLEMS, synthetic.CONSTRAINTS)
    other._predicted.clear()
    assert all(row[1] == row[2] == "–" for row in tables.prediction(other).rows)
    assert all(row[4] == "–" for row in tables.predictions(other).rows)


def test_problem_fields_that_change_change_the_prediction():
    base = PROBLEMS["gate-b16"]
    twice = Problem(**{**vars(base), "batch": 2 * base.batch})
    assert predict.predict(twice, "stage4").us > 1.9 * predict.predict(base, "stage4").us
