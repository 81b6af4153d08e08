"""Host cost and latency, on a machine that takes as long as the test says."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from fake_gpu import SMALL, FakeMachine, fake_gpu, timed

from attn_ladder.stage import load
from attn_profiling import host, host_pairs, record, settings, sources
from attn_profiling.inputs import Rotation, bound
from attn_profiling.launches import MeasureError
from attn_profiling.session import Session
from attn_profiling.workers import WorkerDied


def sleepy(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


class SlowMachine(FakeMachine):
    """Waits 2 ms when it synchronises."""

    def synchronize(self):
        sleepy(0.002)


def test_host_cost_leaves_out_the_wait_and_latency_holds_it():
    addresses = []

    def forward(q, k, v, *, causal):
        addresses.append(q.data_ptr())
        sleepy(0.0005)
        return torch.empty(1), None

    machine = SlowMachine()
    machine.captures = False
    count = 12
    rotation = Rotation(torch, SMALL, count + 2, 0, "cpu")
    call = bound(forward, rotation, True, None)
    cost = host.HostCost(machine, call, count)
    cost.take(0, count)
    found = cost.result()
    assert all(len(found[kind]) == count for kind in host.KINDS)
    assert 450 < sorted(found["eager_host_us"])[count // 2] < 1500
    assert sorted(found["eager_latency_us"])[count // 2] > 2400
    assert found["graph_latency_us"] is None and "capturing" in found["graph_note"]
    eager, fresh = (
        addresses[host.WARM_CALLS :][:count],
        addresses[host.WARM_CALLS + count :][:count],
    )
    assert len(set(eager)) == 1
    assert len(set(fresh)) == count and not set(fresh) & set(addresses[: host.WARM_CALLS])


def test_graph_latency_is_measured_where_the_call_can_be_captured():
    machine = SlowMachine()
    rotation = Rotation(torch, SMALL, 5, 0, "cpu")
    call = bound(timed(machine, 100).forward, rotation, True, None)
    with torch.inference_mode():
        cost = host.HostCost(machine, call, 3)
        cost.take(0, 2)
        cost.take(2, 1)
    found = cost.result()
    assert all(len(found[kind]) == 3 for kind in (*host.KINDS, *host.GRAPH_KINDS))
    assert found["graph_note"] is None


def first_call_of(forward):
    rotation = Rotation(torch, SMALL, 5, 0, "cpu")
    machine = SlowMachine()
    machine.captures = False
    return host.HostCost(machine, bound(forward, rotation, True, None), 3).result()


def test_the_first_call_is_told_with_the_wait_for_it():
    calls = []

    def forward(q, k, v, *, causal):
        calls.append(1)
        if len(calls) == 1:
            sleepy(0.030)
        return torch.empty(1), None

    first = first_call_of(forward)["first_call_ms"]
    assert first >= 32  # and 2 ms of waiting
    assert 2 <= first_call_of(forward)["first_call_ms"] < first  # as on the next problem


def test_what_ran_before_the_first_call_is_no_part_of_it():
    class Busy(FakeMachine):
        pending = 0.3  # inputs that are still drawn

        def synchronize(self):
            sleepy(self.pending)
            self.pending = 0.0

    rotation = Rotation(torch, SMALL, 5, 0, "cpu")
    machine = Busy()
    call = bound(timed(machine, 100).forward, rotation, True, None)
    with torch.inference_mode():
        assert 0 < host.HostCost(machine, call, 3).result()["first_call_ms"] < 300


def test_portions_cover_every_sample_once():
    for count in (1, 3, 50, 299, 300):
        parts = host.portions(count)
        assert [i for first, n in parts for i in range(first, first + n)] == list(range(count))
        assert len(parts) <= host.PORTIONS


def test_a_default_configuration_is_not_passed():
    seen = []

    def forward(q, k, v, **kwargs):
        seen.append(kwargs)

    rotation = Rotation(torch, SMALL, 1, 0, "cpu")
    bound(forward, rotation, True, None)(0)
    bound(forward, rotation, False, {"num_splits": 2})(0)
    assert seen == [{"causal": True}, {"causal": False, "config": {"num_splits": 2}}]


class FakeWorker:
    answer = None
    begun: list = []
    measuring: set = set()

    def __init__(self, kind, arguments, log, environment):
        self.request = None

    def wait_ready(self, silence_s):
        assert self.request is None and not self.measuring, "an import beside what is measured"

    def begin(self, request):
        self.request = request
        self.measuring.add(self)
        self.begun.append([entry["problem"]["id"] for entry in request["problems"]])

    def messages(self, silence_s):
        for entry in self.request["problems"]:
            yield {"begin": entry["problem"]["id"]}
            found = type(self).answer(len(self.begun), entry)
            if isinstance(found, Exception):
                raise found
            yield {"result": {"problem": entry["problem"]["id"], "samples": found}}

    def close(self):
        self.measuring.discard(self)


def sample(us):
    return {
        "eager_host_us": [us], "fresh_pointer_host_us": [us], "eager_latency_us": [us],
        "graph_latency_us": [us], "graph_gpu_us": [us], "graph_note": None,
    }  # fmt: skip


@pytest.fixture
def suite(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "Session", lambda s, names: Session(s, names, fake_gpu()))
    monkeypatch.setattr(host, "Worker", FakeWorker)
    monkeypatch.setattr(
        host, "gate",
        lambda run, problems, names: {
            p.id: {"fa3": None, "stage1": "unsupported: why"} for p in problems
        },
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"subjects": ["fa3", "stage1"]}))
    FakeWorker.begun = []

    def run(answer):
        FakeWorker.answer = staticmethod(answer)
        chosen = settings.load(tmp_path / "config.json", tmp_path)
        return host.run(chosen, "gate", tmp_path / "host" / "gate.json")

    def close():
        chosen = settings.load(tmp_path / "config.json", tmp_path)
        session = Session(chosen, ["fa3", "stage1"], fake_gpu())
        timing = {**session.header("timing", "gate"), "regime": "spaced", "problems": []}
        record.write(tmp_path / "timing" / "gate.spaced.json", timing, "timing")
        return host.close(chosen, "gate", tmp_path / "host" / "gate.json")

    run.folder, run.close = tmp_path, close
    return run


def test_every_process_gives_a_list(suite):
    data = suite(lambda process, entry: {n: sample(10.0) for n in ("fa3", "fa3#2")})
    assert record.read(suite.folder / "host" / "gate.json", "host") == data
    first = data["problems"][0]
    assert first["samples"]["fa3"]["eager_host_us"] == [[10.0]] * 3
    assert first["left_out"] == {"stage1": "unsupported: why"}


def test_an_interrupted_suite_goes_on(suite):
    def dies(process, entry):
        if process == 2 and entry["problem"]["id"] == "gate-b4":
            return WorkerDied("it was ended by SIGTERM")
        return {"fa3": sample(10.0)}

    with pytest.raises(MeasureError, match="gate-b4, process 2: it was ended by SIGTERM"):
        suite(dies)
    FakeWorker.begun = []
    data = suite(lambda process, entry: {"fa3": sample(10.0)})
    assert FakeWorker.begun[0][0] == "gate-b4" and len(FakeWorker.begun) == 2
    assert len(data["problems"]) == 7


def ends_in_the_third_process(process, entry):
    if process == 3 and entry["problem"]["id"] == "gate-b4":
        return WorkerDied("the machine is gone")
    return {"fa3": sample(10.0)}


def test_a_suite_interrupted_for_good_is_closed_with_what_is_whole(suite):
    with pytest.raises(MeasureError):
        suite(ends_in_the_third_process)
    data = suite.close()
    assert record.read(suite.folder / "host" / "gate.json", "host") == data
    rows = {row["problem"]["id"]: row for row in data["problems"]}
    assert rows["gate-b2"]["samples"]["fa3"]["eager_host_us"] == [[10.0]] * 3
    assert rows["gate-b2"]["left_out"] == {"stage1": "unsupported: why"}
    assert rows["gate-b4"]["samples"] == {}
    assert rows["gate-b4"]["left_out"] == {
        "fa3": "interrupted: 2 of 3 processes measured it",
        "stage1": "unsupported: why",
    }
    provenance = data["provenance"]
    assert provenance["closed"]["provenance_of"] == "timing/gate.spaced.json"
    assert set(provenance["before"].values()) == set(provenance["after"].values()) == {None}


def pair(us=10.0, **twin):
    """FA3 and its twin, whose times are off by the factors given by kind."""
    return {
        "fa3": sample(us),
        "fa3#2": {kind: v if v is None else [twin.get(kind, 1) * x for x in v]
                  for kind, v in sample(us).items()},
    }  # fmt: skip


EVERY = [f"gate-b{2**i}" for i in range(7)]


def disturbed(until, kind="eager_host_us"):
    """The twin is off on gate-b4 in processes up to a number; its times tell the process."""

    def answer(process, entry):
        off = entry["problem"]["id"] == "gate-b4" and process <= until
        return pair(10.0 + process, **({kind: 1.42} if off else {}))

    return answer


@pytest.mark.parametrize("kind", ["eager_host_us", "eager_latency_us", "graph_gpu_us"])
def test_a_problem_whose_pair_is_off_is_measured_again(suite, kind):
    data = suite(disturbed(3, kind))
    assert record.read(suite.folder / "host" / "gate.json", "host") == data
    assert FakeWorker.begun == [EVERY] * 3 + [["gate-b4"]] * 3
    rows = {row["problem"]["id"]: row for row in data["problems"]}
    assert rows["gate-b4"]["samples"]["fa3"]["eager_host_us"] == [[14.0], [15.0], [16.0]]
    (earlier,) = rows["gate-b4"]["earlier"]
    assert earlier["fa3"]["eager_host_us"] == [[11.0], [12.0], [13.0]]
    assert host_pairs.off(earlier) == {kind: pytest.approx(1.42)}
    assert [name for name, row in rows.items() if "earlier" in row] == ["gate-b4"]


@pytest.mark.parametrize(
    "twin", [{}, {"eager_host_us": 1.09}, {"fresh_pointer_host_us": 1.42}, {"eager_host_us": 0.91}]
)
def test_what_agrees_or_no_metric_is_made_of_is_not_measured_again(suite, twin):
    data = suite(lambda process, entry: pair(**twin))
    assert FakeWorker.begun == [EVERY] * 3
    assert not any("earlier" in row for row in data["problems"])


def test_attempts_are_bounded_and_all_are_kept(suite):
    data = suite(disturbed(1000))
    assert FakeWorker.begun == [EVERY] * 3 + [["gate-b4"]] * 6
    (row,) = (row for row in data["problems"] if "earlier" in row)
    times = [taken["fa3"]["eager_host_us"][0] for taken in [*row["earlier"], row["samples"]]]
    assert times == [[11.0], [14.0], [17.0]]


def test_a_second_attempt_that_was_interrupted_goes_on(suite):
    def dies(process, entry):
        return WorkerDied("killed") if process == 5 else disturbed(3)(process, entry)

    with pytest.raises(MeasureError, match="gate-b4, process 2: killed"):
        suite(dies)
    FakeWorker.begun = []
    data = suite(lambda process, entry: pair(20.0 + process))
    assert FakeWorker.begun == [["gate-b4"]] * 2
    (row,) = (row for row in data["problems"] if "earlier" in row)
    assert row["samples"]["fa3"]["eager_host_us"] == [[14.0], [21.0], [22.0]]
    assert row["earlier"][0]["fa3"]["eager_host_us"] == [[11.0], [12.0], [13.0]]


def test_the_first_calls_are_those_of_the_first_attempt(suite):
    """Those of a later one were made in processes that had not measured the problems before."""

    def answer(process, entry):
        found = disturbed(3)(process, entry)
        return {name: {**taken, "first_call_ms": float(process)} for name, taken in found.items()}

    (row,) = (row for row in suite(answer)["problems"] if "earlier" in row)
    assert row["samples"]["fa3"]["first_call_ms"] == [1.0, 2.0, 3.0]
    assert row["samples"]["fa3"]["eager_host_us"] == [[14.0], [15.0], [16.0]]
    assert "first_call_ms" not in row["samples"]["fa3#2"]


@pytest.mark.parametrize(("lost", "attempts"), [(6, 1), (9, 2)])
def test_a_closed_suite_has_the_attempts_that_are_whole(suite, lost, attempts):
    def dies(process, entry):
        return WorkerDied("gone") if process == lost else disturbed(1000)(process, entry)

    with pytest.raises(MeasureError):
        suite(dies)
    (row,) = (row for row in suite.close()["problems"] if row["problem"]["id"] == "gate-b4")
    assert len(row.get("earlier", [])) + 1 == attempts
    assert row["samples"]["fa3"]["eager_host_us"][0] == [11.0 + 3 * (attempts - 1)]


def test_the_kinds_of_the_pairs_are_those_that_are_measured():
    kinds = {kind for of in host_pairs.HOST_PAIRS.values() for kind in of}
    assert kinds < set(host_pairs.KINDS) == {*host.KINDS, *host.GRAPH_KINDS}


def test_the_entry_that_users_call_is_recorded(suite, monkeypatch):
    data = suite(lambda process, entry: pair())
    assert not any("entry_hash" in entry for entry in data["subjects"].values())
    header = {"subjects": {name: {"kernel_hash": name} for name in ("fa3", "stage5")}}
    told = host.record_of(header, [])["subjects"]
    assert told["stage5"]["entry_hash"] == sources.entry_hash("stage5")
    assert "entry_hash" not in told["fa3"]
    module = load("stage5")
    assert host.entry_of(module) is not module.forward and set(sources.ENTRIES) == {"stage5"}


def test_a_suite_of_another_entry_does_not_go_on(suite, monkeypatch):
    with pytest.raises(MeasureError):
        suite(ends_in_the_third_process)
    monkeypatch.setattr(host, "ENTRIES", {"fa3": "any.py"})
    with pytest.raises(MeasureError, match="no problem was measured by every process"):
        suite.close()


def test_a_suite_of_other_kernels_is_not_closed(suite, monkeypatch):
    with pytest.raises(MeasureError):
        suite(ends_in_the_third_process)
    monkeypatch.setattr(host, "kernel_hash", lambda name: "changed")
    with pytest.raises(MeasureError, match="no problem was measured by every process"):
        suite.close()
    assert not (suite.folder / "host" / "gate.json").exists()


def test_a_suite_without_a_whole_problem_is_not_closed(suite):
    with pytest.raises(MeasureError):
        suite(lambda process, entry: WorkerDied("at once"))
    with pytest.raises(MeasureError, match="no problem was measured by every process"):
        suite.close()


def test_a_graph_that_failed_in_one_process_has_no_latency():
    failed = {**sample(1.0), "graph_latency_us": None, "graph_note": "no capture"}
    merged = host.merge([{"samples": {"a": sample(1.0)}}, {"samples": {"a": failed}}])
    assert merged["a"]["graph_latency_us"] is None and merged["a"]["graph_note"] == "no capture"
    assert SimpleNamespace(**merged["a"]).eager_host_us == [[1.0], [1.0]]


def test_first_calls_are_kept_per_process(suite):
    def answer(process, entry):
        return {"fa3": {**sample(10.0), "first_call_ms": 100.0 + process}}

    data = suite(answer)
    assert record.read(suite.folder / "host" / "gate.json", "host") == data
    for row in data["problems"]:
        assert row["samples"]["fa3"]["first_call_ms"] == [101.0, 102.0, 103.0]


def test_a_record_without_first_calls_is_valid(suite):
    """As runs were recorded before they were measured; a process without it leaves none."""

    def answer(process, entry):
        return {"fa3": {**sample(10.0), **({"first_call_ms": 1.0} if process == 2 else {})}}

    data = suite(answer)
    assert record.read(suite.folder / "host" / "gate.json", "host") == data
    assert all("first_call_ms" not in row["samples"]["fa3"] for row in data["problems"])


@pytest.mark.parametrize("wrong", [[], [0.0], [None], 12.3, [[12.3]]])
def test_wrong_first_calls_are_refused(suite, wrong):
    data = suite(lambda process, entry: {"fa3": {**sample(10.0), "first_call_ms": 1.0}})
    data["problems"][0]["samples"]["fa3"]["first_call_ms"] = wrong
    with pytest.raises(record.RecordError, match="first_call_ms"):
        record.validate(data, "host", "a file")


def test_the_top_stage_is_called_as_users_call_it(monkeypatch):
    import attn_ladder

    monkeypatch.setattr(attn_ladder, "attention", lambda q, k, v, causal: ("public", causal))
    module = SimpleNamespace(__name__="attn_ladder.stage5_everything", forward=None)
    assert host.entry_of(module)(1, 2, 3, causal=True) == ("public", True)
    other = SimpleNamespace(__name__="attn_ladder.stage4_pipeline", forward="own")
    assert host.entry_of(other) == "own"
    dosed = load("control_launch.4")  # no module but what a variant makes of one
    assert host.entry_of(dosed) == dosed.forward


def test_a_backend_is_selected_around_the_calls_not_in_them():
    import torch

    from attn_ladder.peers import _sdpa, cudnn

    q = torch.randn(1, 8, 2, 16)
    backend = _sdpa.SDPBackend.MATH
    forward, entered = _sdpa.forward_with(backend), []

    def context(only):
        entered.append(only)
        return real(only)

    real = _sdpa.sdpa_kernel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sdpa, "sdpa_kernel", context)
        outside, _ = forward(q, q, q)
        assert entered == [backend]
        with _sdpa.selected(backend)():
            inside, _ = forward(q, q, q)
        assert entered == [backend, backend] and torch.equal(inside, outside)
    with cudnn.session():
        assert torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
