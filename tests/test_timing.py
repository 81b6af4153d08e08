"""GPU time: the records must show the calls, and whoever cheats the clock is found."""

import json
import random
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fake_gpu import SMALL, FakeMachine, fake_gpu, right, timed

from attn_profiling import bursts, guard, launches, record, timing
from attn_profiling.activity import Activity, ActivityError, from_kineto, split
from attn_profiling.guard import Guard, Patched
from attn_profiling.launches import MeasureError, Unsteady
from attn_profiling.partial import Partial
from attn_profiling.settings import Measuring
from attn_profiling.workers import WorkerDied

MEASURING = Measuring(
    processes=2, rounds=6, warmup_rounds=1, gap_us=400, sustained_ms=5, sustained_bursts=2,
    sustained_preheat_ms=5,
)  # fmt: skip


def stream(*names):
    """Activities one after another, each 10 µs long and 1 µs apart."""
    return [Activity(name, 11_000 * i, 10_000) for i, name in enumerate(names)]


# -- what the records show


def test_calls_are_delimited_by_flush_and_spin():
    calls = split(
        stream("F", "F", "S", "a", "b", "F", "S", "c", "F", "nan", "F", "S", "d"), "F", "S"
    )
    assert [call.kernels for call in calls] == [("a", "b"), ("c",), ("d",)]
    assert calls[0].gpu_us == pytest.approx(20)
    assert calls[0].gap_us == pytest.approx(1)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("F", "S", "F", "S", "a"), "launched no kernel"),
        (("F", "S", "a", "S", "b"), "two spins"),
        (("x", "S", "a"), "without a flush"),
    ],
)
def test_lost_records_are_seen(names, message):
    with pytest.raises(ActivityError, match=message):
        split(stream(*names), "F", "S")


def test_a_kernel_on_another_stream_is_seen():
    activities = [Activity("F", 0, 10), Activity("S", 20, 100), Activity("a", 60, 10)]
    with pytest.raises(ActivityError, match="beside the spin"):
        split(activities, "F", "S")


def event(name, kind="kernel", device="cuda", start=0):
    return SimpleNamespace(
        name=lambda: name,
        activity_type=lambda: kind,
        device_type=lambda: device,
        is_user_annotation=lambda: False,
        start_ns=lambda: start,
        duration_ns=lambda: 5,
    )


def test_memsets_count_and_host_calls_do_not():
    events = [
        event("b", start=2),
        event("Memset (Device)", "gpu_memset", start=1),
        event("cudaLaunchKernel", "cuda_runtime", "cpu"),
        event("Stream Sync", "cuda_sync"),
        event("my range", "gpu_user_annotation"),
    ]
    assert [a.name for a in from_kineto(events, "cuda")] == ["Memset (Device)", "b"]


def take_one(machine, subjects, rounds=3):
    plan = [list(subjects)] * rounds
    return launches.take(machine, fake_gpu(), subjects, plan, 400, 0)


def test_take_sums_all_kernels_of_a_call():
    machine = FakeMachine()

    def call(i):
        machine.kernel("Memset (Device)", 2)
        machine.kernel("attention", 125)

    rounds = take_one(machine, {"fa3": call})
    assert [row.launches["fa3"].gpu_us for row in rounds] == [127, 127, 127]
    assert rounds[0].launches["fa3"].event_us > 127
    assert rounds[0].launches["fa3"].spin_clock_mhz == 1755
    assert rounds[0].clock_mhz == 1755 and rounds[0].power_w == 310


def test_dropped_records_are_seen_and_taken_again():
    machine = FakeMachine()
    subjects = {"a": lambda i: machine.kernel("a", 5)}
    machine.drop = 3
    with pytest.raises(ActivityError, match="the records show"):
        take_one(machine, subjects)
    machine.drop = 3
    assert len(launches.insist(lambda: take_one(machine, subjects))) == 3


def spaced(machine, subjects, measuring=MEASURING):
    return launches.spaced(machine, fake_gpu(), subjects, measuring, random.Random(1), lambda: None)


def test_a_call_before_which_the_queue_ran_dry_is_taken_again():
    machine = FakeMachine()
    slow = {3, 5}

    def call(i):
        if i in slow:
            machine.delay_us = 50
        machine.kernel("a", 5)

    samples, _ = spaced(machine, {"a": call})
    assert samples["a"].retaken == 2
    assert samples["a"].gpu_us == [5] * 6


def test_a_queue_that_always_runs_dry_is_an_error():
    machine = FakeMachine()

    def call(i):
        machine.delay_us = 50
        machine.kernel("a", 5)

    with pytest.raises(Unsteady, match=r"ran dry before its calls .* raise measuring.gap_us"):
        spaced(machine, {"a": call})


def test_other_kernels_in_some_calls_are_seen():
    machine = FakeMachine()

    def call(i):
        machine.kernel("attention" if i % 2 else "cached", 5)

    with pytest.raises(Unsteady, match="different kernels in different calls"):
        spaced(machine, {"a": call})


# -- what a process measures


def measure(machine, modules, regime="spaced", chosen=None, watch=None, problem=SMALL):
    with torch.inference_mode():
        return timing.measure_problem(
            torch, machine, fake_gpu(), watch or Guard(torch), problem, modules, chosen or {},
            regime, MEASURING, 7, "cpu",
        )  # fmt: skip


@pytest.mark.parametrize("regime", ["spaced", "sustained"])
def test_all_subjects_and_the_twin_are_measured(regime):
    machine = FakeMachine()
    result = measure(machine, {"fa3": timed(machine, 100), "stage1": timed(machine, 200)}, regime)
    assert set(result["samples"]) == {"fa3", "fa3#2", "stage1"}
    assert result["aa_subject"] == "fa3"
    assert result["left_out"] == {} and result["message"] is None
    for name, us in (("fa3", 100), ("fa3#2", 100), ("stage1", 200)):
        sample = result["samples"][name]
        assert sample["gpu_us"] == pytest.approx([us] * len(sample["gpu_us"]))
        assert sample["kernels"] == {"attention": 1}
    json.dumps(result)


def test_bursts_come_from_a_graph_or_say_that_they_do_not():
    machine = FakeMachine()
    result = measure(machine, {"fa3": timed(machine, 100)}, "sustained")
    assert result["samples"]["fa3"]["launch"] == "graph"
    machine.captures = False
    result = measure(machine, {"fa3": timed(machine, 100)}, "sustained")
    assert result["samples"]["fa3"]["launch"] == "eager"
    assert "changed less than twice" in result["samples"]["fa3"]["energy_note"]
    assert result["samples"]["fa3"]["energy_mj"] == [None, None]


@pytest.mark.parametrize(("preheat_ms", "settled"), [(60, True), (1, False)])
def test_the_dip_of_the_clock_at_the_start_of_load_does_not_count(preheat_ms, settled):
    measuring = replace(MEASURING, sustained_preheat_ms=preheat_ms)
    machine = FakeMachine()
    machine.captures = False  # so that every call is made
    made = 0

    def call(q, k, v, *, causal):
        nonlocal made
        made += 1
        machine.kernel("attention", 150 if made < 300 else 100)
        return right(q, k, v, causal=causal)

    module = SimpleNamespace(forward=call)
    with torch.inference_mode():
        result = timing.measure_problem(
            torch, machine, fake_gpu(), Guard(torch), SMALL, {"stage1": module}, {}, "sustained",
            measuring, 7, "cpu",
        )  # fmt: skip
    times = result["samples"]["stage1"]["gpu_us"]
    assert (times == pytest.approx([100, 100])) == settled


def test_a_graph_whose_kernels_the_profiler_loses_is_replaced_by_calls():
    machine = FakeMachine()
    machine.graph_records = False
    sample = measure(machine, {"fa3": timed(machine, 100)}, "sustained")["samples"]["fa3"]
    assert sample["launch"] == "eager"
    assert sample["gpu_us"] == [100, 100]


def test_energy_of_a_call_from_a_counter_that_runs():
    machine = FakeMachine()
    started = time.perf_counter()
    gpu = fake_gpu(
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: int(
            500_000 * (time.perf_counter() - started)
        )
    )
    with torch.inference_mode():
        result = timing.measure_problem(
            torch, machine, gpu, Guard(torch), SMALL, {"fa3": timed(machine, 100)}, {},
            "sustained", replace(MEASURING, sustained_ms=20), 7, "cpu",
        )  # fmt: skip
    sample = result["samples"]["fa3"]
    assert sample["energy_note"] is None
    # 500 W for the 101 µs that a call takes with the gap before it
    assert sample["energy_mj"] == pytest.approx([0.5 * 101 / 1000 * 1000] * 2, rel=0.2)


def test_skipped_work_when_timed_is_found():
    """Right while nobody measures, idle when the profiler runs."""
    machine = FakeMachine()

    def lazy(q, k, v, **kwargs):
        out, lse = right(q, k, v, **kwargs)
        if machine.activities is not None:
            return torch.full_like(out, float("nan")), lse
        return out, lse

    modules = {"fa3": timed(machine, 100), "stage5": timed(machine, 1, lazy)}
    result = measure(machine, modules)
    assert "its output in a timed call is wrong" in result["left_out"]["stage5"]
    assert set(result["samples"]) == {"fa3", "fa3#2"}


@pytest.mark.parametrize("regime", ["spaced", "sustained"])
def test_outputs_cached_between_calls_are_found_when_timed(regime):
    machine = FakeMachine()
    cache = []

    def caching(q, k, v, **kwargs):
        if not cache:
            cache.append(right(q, k, v, **kwargs))
        return tuple(t.clone() for t in cache[0])

    modules = {"fa3": timed(machine, 100), "stage5": timed(machine, 1, caching)}
    result = measure(machine, modules, regime)
    assert "wrong" in result["left_out"]["stage5"]
    assert "fa3" in result["samples"]


def test_a_wrong_twin_subject_leaves_the_others_with_another_pair():
    machine = FakeMachine()

    def wrong(q, k, v, **kwargs):
        return torch.zeros_like(q), None

    modules = {"fa3": timed(machine, 100, wrong), "cudnn": timed(machine, 110)}
    result = measure(machine, modules)
    assert result["aa_subject"] == "cudnn"
    assert set(result["samples"]) == {"cudnn", "cudnn#2"}


def test_a_subject_that_raises_is_left_out_with_its_reason():
    machine = FakeMachine()

    def broken(q, k, v, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB")

    modules = {"fa3": timed(machine, 100), "stage1": timed(machine, 1, broken)}
    result = measure(machine, modules)
    assert result["left_out"]["stage1"].startswith("error: out of GPU memory: CUDA out of memory")


def test_an_event_timer_that_lies_is_found():
    machine = FakeMachine(timer_scale=0.5)
    result = measure(machine, {"fa3": timed(machine, 100)})
    assert "a timer is not what it should be" in result["message"]


def test_a_patched_timer_is_found(monkeypatch):
    machine = FakeMachine()
    watch = Guard(torch)

    def patching(q, k, v, **kwargs):
        monkeypatch.setattr(torch.cuda.Event, "elapsed_time", lambda self, end: 1e-3)
        return right(q, k, v, **kwargs)

    with pytest.raises(Patched, match="torch.cuda.Event.elapsed_time was replaced"):
        measure(machine, {"fa3": timed(machine, 100, patching)}, watch=watch)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch.cuda, "synchronize"),
        (torch.autograd.profiler.profile, "__exit__"),
        (torch, "isfinite"),
    ],
)
def test_the_guard_watches_what_measures_and_judges(monkeypatch, owner, name):
    watch = Guard(torch)
    watch.verify()
    monkeypatch.setattr(owner, name, lambda *args: None)
    with pytest.raises(Patched, match=name):
        watch.verify()


def test_poison_reaches_what_is_left_unwritten():
    with guard.poisoned(torch):
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.ones(2, dtype=torch.bfloat16)).isnan().all()
        assert torch.ones(2).new_empty(2).isnan().all()
        assert torch.empty(2, dtype=torch.int32).dtype == torch.int32
    assert torch.empty is not None and not torch.zeros(2).isnan().any()


def test_reused_inputs_are_refused():
    from attn_profiling.inputs import Rotation

    rotation = Rotation(torch, SMALL, 5, 0, "cpu")
    addresses = {rotation[i][0].data_ptr() for i in range(5)}
    assert len(addresses) == 5
    assert not torch.equal(rotation[0][0], rotation[1][0])
    assert all(t.abs().max() > 0 for t in rotation[0])

    class SameAddress(torch.Tensor):
        def __getitem__(self, key):
            size = key.stop - key.start
            return super().__getitem__(slice(0, size))

    fake = SimpleNamespace(
        Generator=torch.Generator,
        float16=torch.float16,
        bfloat16=torch.bfloat16,
        randn=lambda *a, **k: torch.randn(*a, **k).as_subclass(SameAddress),
    )
    with pytest.raises(RuntimeError, match="share an address"):
        Rotation(fake, SMALL, 5, 0, "cpu")


# -- configurations of a peer


def chooser(machine, times):
    def make(config):
        us = times[config["n"]]
        if us is None:
            raise RuntimeError("no such kernel")
        return lambda i: machine.kernel("attention", us)

    candidates = [{"n": i} for i in range(len(times))]
    return launches.choose(machine, fake_gpu(), make, candidates, MEASURING, random.Random(0))


def test_the_fastest_configuration_is_kept_and_all_are_told():
    kept, tried = chooser(FakeMachine(), [100, 80, None])
    assert kept == {"n": 1}
    assert [row["gpu_us"] for row in tried] == [100, 80, None]
    assert "no such kernel" in tried[2]["message"]


def test_the_default_stays_unless_another_is_clearly_faster():
    assert chooser(FakeMachine(), [100, 99.5])[0] == {"n": 0}


# -- energy


def test_power_comes_from_the_jumps_of_the_counter():
    # 500 W, the counter updated every 100 ms, read every 30 ms
    readings = [(t, 500_000 * (int(t * 10) / 10)) for t in (0.03 * i for i in range(12))]
    assert bursts.edge_power_w(readings) == pytest.approx(500, rel=0.25)
    assert bursts.edge_power_w(readings[:4]) is None
    assert bursts.edge_power_w([]) is None


# -- attempts


def result(ratio=1.0, message=None, kernels=None):
    def sample(us):
        return {
            "gpu_us": [us] * 6, "event_us": [us] * 6, "clock_mhz": [1755.0] * 6,
            "power_w": [300.0] * 6, "energy_mj": [], "energy_note": None, "spin_clock_mhz": [],
            "calls": [], "launch": None, "retaken": 0, "kernels": kernels or {"attention": 1},
        }  # fmt: skip

    return {
        "problem": "small", "aa_subject": "fa3", "message": message, "left_out": {},
        "samples": {"fa3": sample(100.0), "fa3#2": sample(100.0 * ratio), "x": sample(90.0)},
        "chosen": {"fa3": {}, "x": None}, "tried": {},
    }  # fmt: skip


def test_an_aa_pair_that_differs_fails_the_attempt():
    assert timing.merge(1, [result(), result()], 0.01)["ok"]
    off = timing.merge(1, [result(1.02), result(1.03)], 0.01)
    assert not off["ok"] and off["aa_ratio"] == 1.025 and off["aa_subject"] == "fa3#2"
    assert "differs by 2.50%" in off["message"]


def test_disagreement_and_other_kernels_fail_the_attempt():
    assert not timing.merge(1, [result(), result(message="clocks disagree")], 0.01)["ok"]
    mixed = timing.merge(1, [result(), result(kernels={"other": 1})], 0.01)
    assert "different kernels in different processes" in mixed["message"]


def test_a_subject_that_a_process_lacks_is_not_merged():
    lacking = result()
    del lacking["samples"]["x"]
    assert set(timing.merge(1, [result(), lacking], 0.01)["samples"]) == {"fa3", "fa3#2"}


def test_partial_results_count_under_the_same_conditions_only(tmp_path):
    Partial(tmp_path, lambda p: "key").put(1, 0, SMALL, {"a": 1})
    assert Partial(tmp_path, lambda p: "key").get(1, 0, SMALL) == {"a": 1}
    assert Partial(tmp_path, lambda p: "key").get(1, 1, SMALL) is None
    assert Partial(tmp_path, lambda p: "another driver").get(1, 0, SMALL) is None
    (tmp_path / "small.a1.p0.json").write_text('{"key": "key", "resu')
    assert Partial(tmp_path, lambda p: "key").get(1, 0, SMALL) is None


# -- a whole suite, with workers that do not measure


class FakeWorker:
    """Gives `answer(worker number, problem)` for each problem; an exception ends it."""

    answer = None
    begun: list = []

    def __init__(self, kind, arguments, log, environment):
        self.request = None

    def begin(self, request):
        self.request = request
        self.begun.append([entry["problem"]["id"] for entry in request["problems"]])

    def messages(self, silence_s):
        for entry in self.request["problems"]:
            name = entry["problem"]["id"]
            yield {"begin": name}
            found = type(self).answer(len(self.begun) - 1, name)
            if isinstance(found, Exception):
                raise found
            yield {"result": {**found, "problem": name}}

    def close(self):
        return None


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """Times the gate suite on a fake GPU with fake workers: suite(answer) -> record."""
    from attn_profiling import settings
    from attn_profiling.session import Session

    gpu = fake_gpu()
    monkeypatch.setattr(timing, "Session", lambda s, names: Session(s, names, gpu))
    monkeypatch.setattr(timing, "Worker", FakeWorker)
    monkeypatch.setattr(
        timing, "gate",
        lambda run, problems, names: {p.id: {"fa3": None, "stage1": None} for p in problems},
    )  # fmt: skip
    measuring = {"processes": 3, "rounds": 6, "max_attempts": 3}
    (tmp_path / "config.json").write_text(
        json.dumps({"measuring": measuring, "subjects": ["fa3", "stage1"]})
    )
    FakeWorker.begun = []

    def run(answer):
        FakeWorker.answer = staticmethod(answer)
        chosen = settings.load(tmp_path / "config.json", tmp_path)
        return timing.run(chosen, "smoke", "spaced", tmp_path / "timing" / "smoke.spaced.json")

    def close():
        chosen = settings.load(tmp_path / "config.json", tmp_path)
        session = Session(chosen, ["fa3", "stage1"], gpu)
        beside = {**session.header("timing", "smoke"), "regime": "spaced", "problems": []}
        record.write(tmp_path / "timing" / "smoke.spaced.json", beside, "timing")
        out = tmp_path / "timing" / "smoke.sustained.json"
        (out.parent / ".partial" / "smoke.spaced").rename(out.parent / ".partial" / out.stem)
        return timing.close(chosen, "smoke", "sustained", out)

    monkeypatch.setattr(timing, "content_key", lambda content, fields, hashes: hashes["fa3"])
    run.folder, run.close = tmp_path, close
    return run


def test_a_suite_is_measured_in_every_process(suite):
    data = suite(lambda worker, problem: result())
    assert len(FakeWorker.begun) == 3
    assert {row["status"] for row in data["problems"]} == {"ok"}
    assert len(data["problems"][0]["attempts"][0]["samples"]["x"]["gpu_us"]) == 3
    assert data["problems"][0]["chosen"] == {"fa3": {}, "x": None}
    assert not list((suite.folder / "timing" / ".partial").rglob("*.json"))


def test_a_problem_with_a_bad_pair_is_measured_again_and_all_attempts_kept(suite):
    def answer(worker, problem):
        return result(1.05 if worker < 3 and problem == "smoke-d64-causal" else 1.0)

    data = suite(answer)
    rows = {row["problem"]["id"]: row for row in data["problems"]}
    assert [a["ok"] for a in rows["smoke-d64-causal"]["attempts"]] == [False, True]
    assert rows["smoke-d64-causal"]["status"] == "ok"
    assert FakeWorker.begun[3:] == [["smoke-d64-causal"]] * 3
    assert len(rows["smoke-d128-full"]["attempts"]) == 1


def test_a_problem_that_stays_off_is_inconclusive(suite):
    data = suite(lambda worker, problem: result(1.05))
    assert {row["status"] for row in data["problems"]} == {"inconclusive"}
    assert {len(row["attempts"]) for row in data["problems"]} == {3}


def test_an_interrupted_suite_goes_on_where_it_was(suite):
    def dies(worker, problem):
        if worker == 1 and problem == "smoke-d128-full":
            return WorkerDied("it was ended by SIGKILL")
        return result()

    with pytest.raises(MeasureError, match=r"smoke-d128-full, process 2: .*SIGKILL[\s\S]*kept"):
        suite(dies)
    assert not (suite.folder / "timing" / "smoke.spaced.json").exists()
    FakeWorker.begun = []
    data = suite(lambda worker, problem: result())
    assert FakeWorker.begun[0] == ["smoke-d128-full", "smoke-d128-ragged"]
    assert len(FakeWorker.begun) == 2
    assert len(data["problems"][0]["attempts"][0]["samples"]["fa3"]["gpu_us"]) == 3


def dies_in_the_second_attempt(worker, problem):
    if worker == 4 and problem == "smoke-d128-full":
        return WorkerDied("the machine is gone")
    return result(1.0 if problem == "smoke-d128-ragged" else 1.05)


def test_a_suite_interrupted_for_good_is_closed_with_its_whole_attempts(suite):
    with pytest.raises(MeasureError):
        suite(dies_in_the_second_attempt)
    data = suite.close()
    assert record.read(suite.folder / "timing" / "smoke.sustained.json", "timing") == data
    status = {row["problem"]["id"]: row["status"] for row in data["problems"]}
    assert status.pop("smoke-d128-ragged") == "ok" and set(status.values()) == {"inconclusive"}
    assert {len(row["attempts"]) for row in data["problems"]} == {1}
    assert data["problems"][0]["chosen"] == {"fa3": {}, "x": None}
    assert data["provenance"]["closed"]["provenance_of"] == "timing/smoke.spaced.json"


def test_a_suite_without_a_whole_first_attempt_is_not_closed(suite, monkeypatch):
    def dies(worker, problem):
        if worker == 2 and problem == "smoke-d128-full":
            return WorkerDied("the machine is gone")
        return result()

    with pytest.raises(MeasureError):
        suite(dies)
    with pytest.raises(MeasureError, match="smoke-d128-full: not every process has timed it"):
        suite.close()
    assert not (suite.folder / "timing" / "smoke.sustained.json").exists()


def test_a_suite_of_other_kernels_is_not_closed(suite, monkeypatch):
    with pytest.raises(MeasureError):
        suite(dies_in_the_second_attempt)
    monkeypatch.setattr(timing, "kernel_hash", lambda name: "changed")
    with pytest.raises(MeasureError, match="not every process has timed it"):
        suite.close()


def test_every_subject_has_every_place():
    names = ["a", "b", "c"]
    orders = bursts.rotated(random.Random(3), names, 3)
    assert [sorted(order) for order in orders] == [names] * 3
    assert all({order[place] for order in orders} == set(names) for place in range(3))
    assert bursts.rotated(random.Random(3), names, 5)[3:] == orders[:2]
    assert len({tuple(bursts.rotated(random.Random(i), names, 1)[0]) for i in range(20)}) > 2


def test_a_clock_that_swings_shifts_no_subject():
    """Neither the A/A pair nor a ratio; half of the places would shift both."""
    swing = [0.98, 1.0, 1.03, 0.985, 1.005, 1.02, 0.98, 1.0, 1.03]

    def off(rounds):
        times = {"fa3": [], "fa3#2": [], "x": []}
        for place, name in enumerate(n for order in rounds for n in order):
            times[name].append(100 * swing[place])
        made = result()
        for name, us in times.items():
            made["samples"][name] |= {"gpu_us": us, "launch": "graph"}
        return abs(timing.aa_ratio([made] * 3) - 1)

    rounds = bursts.rotated(random.Random(0), ["fa3", "fa3#2", "x"], 3)
    assert off(rounds) < 0.005 < 0.01 < off(rounds[:1])


def test_the_choices_of_the_suite_itself_come_last(tmp_path):
    import synthetic

    maker = synthetic.Maker(tmp_path)
    maker.timing("smoke", "spaced")
    data = record.read(tmp_path / "timing" / "smoke.spaced.json", "timing")
    name = data["problems"][0]["problem"]["id"]
    data["problems"] = data["problems"][:1]
    data["problems"][0]["chosen"] = {"fa3": {"num_splits": 2}}
    record.write(tmp_path / "timing" / "variant.spaced.json", data, "timing")
    assert timing.known_choices(tmp_path, "smoke")[name]["fa3"] == {}
    other = timing.known_choices(tmp_path, "profile")[name]
    assert other["fa3"] == {"num_splits": 2} and "stage1" in other


def test_nothing_that_failed_is_timed(suite, monkeypatch):
    asked = []
    monkeypatch.setattr(
        timing, "gate",
        lambda run, problems, names: {
            p.id: {"fa3": None, "stage1": "failed: error 0.1 exceeds 0.01"} for p in problems
        },
    )  # fmt: skip

    def answer(worker, problem):
        return result()

    begin = FakeWorker.begin

    def spy(self, request):
        asked.extend(entry["subjects"] for entry in request["problems"])
        begin(self, request)

    monkeypatch.setattr(FakeWorker, "begin", spy)
    data = suite(answer)
    assert all(names == ["fa3"] for names in asked)
    assert data["problems"][0]["left_out"]["stage1"].startswith("failed")
