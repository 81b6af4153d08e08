"""The check of decoding that runs on a GPU, in small under Triton's interpreter on the CPU."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch

from attn_profiling import serving_check as sc
from attn_profiling.activity import ActivityError


def test_the_checks_pass_under_the_interpreter(tmp_path):
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "attn_profiling.serving_check", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", str(out), "--parts", "check", "--seconds", "300"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert len(found["checks"]) > 8 and all(row["ok"] for row in found["checks"])
    assert found["stopped"] is None


def sequence():
    from attn_ladder.reference import attention_reference

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 64), torch.randn(9, 1, 64), torch.randn(9, 1, 64)
    q, k, v = q.half(), k.half(), v.half()
    out, lse = attention_reference(q[None], k[None], v[None], causal=True)
    return out[0].half(), lse[0], q, k, v


def test_a_wrong_result_is_told():
    out, lse, *inputs = sequence()
    assert "error" in sc.compare([(out, lse, *inputs)], True)
    for wrong in ((out + 0.1, lse), (out, lse + 0.1), (out * float("nan"), lse)):
        with pytest.raises(sc.Failed):
            sc.compare([(*wrong, *inputs)], True)
    with pytest.raises(sc.Failed, match="must be 0"):
        empty = inputs[1][:0], inputs[2][:0]
        sc.compare([(out, torch.full_like(lse, -torch.inf), inputs[0], *empty)], True)


def test_a_failing_check_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch):
    def fails():
        raise RuntimeError("something")

    monkeypatch.setattr(sc, "checks", lambda *a: {"one": fails, "two": lambda: "fine"})
    report = sc.Report(tmp_path / "found.json", 60)
    assert sc.run_checks(report, "cpu", True)
    rows = json.loads((tmp_path / "found.json").read_text())["checks"]
    assert [row["ok"] for row in rows] == [False, True] and "something" in rows[0]["detail"]
    assert "1 right, 1 wrong" in sc.table(report.data)

    def dies():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(sc, "checks", lambda *a: {"one": dies, "two": lambda: "fine"})
    report = sc.Report(tmp_path / "found.json", 60)
    assert not sc.run_checks(report, "cpu", True)
    assert len(report.data["checks"]) == 1 and "'one'" in report.data["stopped"]


def test_it_stops_at_the_limit_of_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(sc, "checks", lambda *a: {"one": lambda: "fine"})
    report = sc.Report(tmp_path / "found.json", 0.0)
    assert sc.run_checks(report, "cpu", True)
    assert report.data["checks"] == [] and "at 0 s of 0 s" in report.data["stopped"]


class FakeTimer:
    """Every call takes a microsecond for each letter of its name."""

    def measure(self, subjects, rounds, seed=0):
        for call in subjects.values():
            call(0)
        return {
            name: {"gpu_us": [float(len(name))] * rounds, "median_us": float(len(name))}
            for name in subjects
        }


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for maker in ("ours", "with_config"):
        monkeypatch.setattr(sc, maker, lambda *a: lambda i: None)
    monkeypatch.setattr(sc, "fa3", lambda *a: lambda i: None)


@pytest.mark.parametrize("module", [ImportError("none"), object()])
@pytest.mark.parametrize("shape", [sc.DECODE[0], sc.DECODE[1], sc.DECODE[-1]])
def test_a_timed_shape_has_its_ratios_and_its_line(no_gpu, module, shape, tmp_path):
    report = sc.Report(tmp_path / "found.json", 60)
    report.add("decode", sc.time_shape(FakeTimer(), None, module, shape, 3e12))
    report.add("tune", sc.tune_shape(FakeTimer(), None, module, shape))
    row = json.loads((tmp_path / "found.json").read_text())["decode"][0]
    assert row["aa_ours"] == len("ours again") / 4 and row["kv_bytes"] == shape.kv_bytes
    assert ("ratio" in row) is not isinstance(module, Exception)
    text = sc.table(report.data)
    assert shape.id in text and f"tune {shape.id}" in text


class FakeMachine:
    """Records what a call launches; the queue runs dry in the first session."""

    flush_kernel, spin_kernel, gap_limit_us = "flush", "spin", 5.0

    def __init__(self):
        self.now, self.activities, self.lost = 0, [], 0

    def run(self, name, us, after=0.0, early=0.0):
        from attn_profiling.activity import Activity

        start = self.now + int(1000 * (after - early))
        self.activities.append(Activity(name, start, int(1000 * us)))
        self.now = start + int(1000 * us)

    def flush(self):
        self.run("flush", 40)

    def spin(self, us):
        self.run("spin", us)
        self.gap = 1.0 if us > 1000 else 50.0

    def event(self):
        return self.now

    def elapsed_us(self, start, end):
        return (end - start) / 1000

    def synchronize(self):
        pass

    @contextlib.contextmanager
    def recorded(self):
        self.activities = []
        yield self.activities
        if self.lost:
            self.lost -= 1
            self.activities.pop(2)


def timer_on(machine):
    timer = sc.Timer.__new__(sc.Timer)
    timer.machine, timer._calls, timer._clock = machine, 0, lambda: None
    return timer


def test_overlapping_kernels_count_once_and_a_dry_queue_is_measured_again():
    machine = FakeMachine()
    machine.lost = 1

    def early(i):  # the second kernel starts 4 µs before the first one ends
        machine.run("first", 10, after=machine.gap)
        machine.run("second", 6, early=4)

    def plain(i):
        machine.run("only", 20, after=machine.gap)

    found = timer_on(machine).measure({"early": early, "plain": plain}, 3)
    assert found["early"]["gpu_us"] == [12.0] * 3 and found["early"]["sum_us"] == [16.0] * 3
    assert found["plain"]["median_us"] == found["plain"]["sum_us"][0] == 20.0
    assert found["early"]["gap_us"] == sc.GAPS_US[1] and found["early"]["dry"] == 0
    machine.lost = 9
    with pytest.raises(ActivityError):
        timer_on(machine).measure({"plain": plain}, 3)


def test_a_candidate_that_cannot_run_is_left_out(no_gpu):
    def fails(i):
        raise RuntimeError("no such kernel")

    errors = {}
    assert list(sc.runnable({"good": lambda i: None, "bad": fails}, errors)) == ["good"]
    assert "no such kernel" in errors["bad"]


def test_the_shapes_are_those_of_the_suite():
    assert len(sc.DECODE) == len({shape.id for shape in sc.DECODE}) == 23
    assert all(shape.length % 256 == 0 for shape in sc.DECODE)
    largest = max(sc.DECODE, key=lambda shape: shape.kv_bytes)
    assert (largest.batch, largest.length, largest.kv_bytes) == (64, 8192, 2**31)


def test_every_candidate_is_a_valid_configuration():
    for shape in sc.DECODE:
        configs = list(sc.tune_configs(shape).values())
        assert 10 < len(configs) < 150


def test_candidates_that_a_shape_does_not_tell_apart_are_measured_once(no_gpu):
    shape = sc.DECODE[0]  # 512 keys
    configs = sc.tune_configs(shape)
    apart = {sc.same_splits(shape, config) for config in configs.values()}
    row = sc.tune_shape(FakeTimer(), None, object(), shape, "splits 1")
    assert len(row["measured"]) == len(apart) < len(configs) == len(row["us"])
    assert row["fa3_config"] == "splits 1" and row["fa3_us"] == len("fa3")


def test_the_lines_of_tuning_name_the_candidate_that_is_best_over_the_lengths():
    def row(length, us):
        shape = sc.Shape(1, 32, 8, 128, length)
        return {
            "shape": shape.id, "nheads": 32, "nheads_k": 8, "headdim": 128, "in_use": "a",
            "errors": {}, "fa3_config": "auto", "fa3_us": 10.0, "measured": list(us), "us": us,
        }  # fmt: skip

    lines = sc.tune_lines([row(512, {"b": 8.0, "a": 10.0}), row(1024, {"a": 10.0, "b": 16.0})])
    assert "in use a 10.0 (1.000); b 8.0 (1.250); a 10.0 (1.000)" in lines[0]
    means = [line.split(" ", 2)[2] for line in lines[2:]]
    assert means == ["a: mean 1.000, least 1.000", "b: mean 0.884, least 0.625"]
    assert "OSError" in sc.tune_lines([{"shape": "x", "error": "OSError"}])[0]


def test_only_the_chosen_checks_run(tmp_path, monkeypatch):
    done = {name: lambda: "fine" for name in ("graph", "graph, pages of 64", "operators")}
    monkeypatch.setattr(sc, "checks", lambda *a: done)
    report = sc.Report(tmp_path / "found.json", 60)
    assert sc.run_checks(report, "cpu", True, wanted=("graph",))
    assert [row["name"] for row in report.data["checks"]] == ["graph", "graph, pages of 64"]
