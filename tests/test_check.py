"""The gate: what is wrong must fail it, each wrong thing in its own way."""

import json
import os
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from fake_gpu import SMALL, FakeMachine, right

from attn_ladder.problem import Problem, read_problems
from attn_profiling import check, record, workers
from attn_profiling.check import NotChecked, check_subject, gate, sampled_heads
from attn_profiling.elsewhere import CALLS, REPLAYS, CannotCapture, in_graph, on_streams
from attn_profiling.inputs import draw, strided
from attn_profiling.workers import Worker, WorkerDied

LARGE = Problem(
    id="large", suites=("tiny",), dtype="fp16", batch=3, seqlen_q=64, seqlen_k=64, nheads=4,
    nheads_k=4, headdim=16, causal=False,
)  # fmt: skip


def verdict(forward, problem=SMALL, views=False):
    with torch.inference_mode():
        return check_subject(torch, problem, forward, 3, "cpu", views)


def test_a_right_subject_passes():
    found = verdict(right)
    assert found.message is None
    assert 0 < found.max_error <= found.bound
    assert found.lse_error < check.LSE_BOUND


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_bound_is_tight_enough_to_see_a_scaled_output(dtype, causal):
    problem = replace(SMALL, dtype=dtype, causal=causal)
    assert verdict(right, problem).message is None

    def scaled(q, k, v, **kwargs):
        out, lse = right(q, k, v, **kwargs)
        return out * 1.05, lse

    assert "exceeds" in verdict(scaled, problem).message


def test_unwritten_outputs_are_found():
    def unwritten(q, k, v, **kwargs):
        out, lse = torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1])
        good, good_lse = right(q, k, v, **kwargs)
        out[:, :-1] = good[:, :-1]
        lse.copy_(good_lse)
        return out, lse

    assert "left unwritten" in verdict(unwritten).message


def test_an_unwritten_lse_is_found():
    def unwritten(q, k, v, **kwargs):
        return right(q, k, v, **kwargs)[0], torch.empty(q.shape[0], q.shape[2], q.shape[1])

    assert "lse holds NaN" in verdict(unwritten).message


def test_outputs_cached_between_calls_are_found():
    cache = {}

    def caching(q, k, v, **kwargs):
        key = q.data_ptr()
        if key not in cache:
            cache[key] = right(q, k, v, **kwargs)
        return cache[key]

    message = verdict(caching).message
    assert message.startswith("on new values in the same buffers: error")


def test_inputs_remembered_from_the_first_call_are_found():
    seen = []

    def remembering(q, k, v, **kwargs):
        seen.append((q, k, v))
        return right(*seen[0], **kwargs)

    message = verdict(remembering).message
    assert message.startswith("on inputs at other addresses: error")


def test_strides_that_are_ignored_are_found():
    def packed(q, k, v, **kwargs):
        as_if = (torch.as_strided(x, x.shape, torch.empty(x.shape).stride()) for x in (q, k, v))
        return right(*as_if, **kwargs)

    assert verdict(packed).message is None
    assert verdict(packed, views=True).message.startswith("on inputs with other strides: ")
    assert verdict(right, views=True).message is None


def test_the_views_of_a_check_have_nan_around_them():
    inputs = draw(torch, SMALL, 0, "cpu")
    for x, view in zip(inputs, strided(inputs), strict=True):
        assert torch.equal(x, view) and not view.is_contiguous() and view.stride(3) == 1
        assert all(step * x.element_size() % 16 == 0 for step in view.stride()[:3])
        room = torch.as_strided(view, (view.stride(0) * x.shape[0],), (1,))
        assert int(room.isnan().sum()) == room.numel() - x.numel() > 0


def test_changed_inputs_are_found():
    def scaling_q(q, k, v, **kwargs):
        result = right(q, k, v, **kwargs)
        q.mul_(2)
        return result

    assert verdict(scaling_q).message == "the call changed its inputs"


def test_a_mask_aligned_top_left_is_found():
    def top_left(q, k, v, *, causal=False, **kwargs):
        n = q.shape[1]
        return right(q, k[:, :n], v[:, :n], causal=causal)

    assert "exceeds" in verdict(top_left).message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out, lse: (out.float(), lse), "dtype float32"),
        (lambda out, lse: (out.transpose(1, 2), lse), "out has shape"),
        (lambda out, lse: (out, lse.transpose(1, 2)), "lse is"),
        (lambda out, lse: (out, lse * 1.4427), "log-sum-exp is off"),
    ],
)
def test_wrong_forms_are_found(change, message):
    assert message in verdict(lambda q, k, v, **kw: change(*right(q, k, v, **kw))).message


@pytest.mark.parametrize(("off", "close"), [(0.0, True), (0.02, False)])
def test_fp16_is_held_against_sdpa_by_the_plans_own_criterion(off, close):
    def shifted(q, k, v, **kwargs):
        out, lse = right(q, k, v, **kwargs)
        return (out + off).to(out.dtype), lse

    square = replace(SMALL, seqlen_k=SMALL.seqlen_q)
    found = verdict(shifted, replace(square, dtype="fp16"))
    assert found.allclose is close and (found.message is None) is close
    assert found.unit_error == pytest.approx(off, abs=2e-3)
    assert verdict(shifted, replace(square, dtype="bf16")).allclose is None


def test_the_error_at_unit_scale_is_not_that_of_scores_that_grow():
    unit = check.Verdict(None, 0.1, 0.1, 0.3, 0.0, 0.1, True)
    grown = check.Verdict(None, 0.5, 0.4, 0.9, 0.0)
    worse = check._worse(unit, grown)
    assert (worse.max_error, worse.bound, worse.unit_error, worse.allclose) == (0.5, 0.9, 0.1, True)
    again = check.Verdict(None, 0.05, 0.1, 0.3, 0.0, 0.05, False)
    assert check._worse(worse, again).allclose is False


def test_the_bound_at_unit_scale_is_that_of_the_call_nearest_to_it():
    """Not that of scores that grow, nor of the call with the largest error."""
    large = check.Verdict(None, 0.2, 0.3, 0.8, 0.0, 0.2, None, 0.3, 0.8, 0.25)
    near = check.Verdict(None, 0.1, 0.05, 0.11, 0.0, 0.1, None, 0.05, 0.11, 0.91)
    grown = check.Verdict(None, 0.5, 0.4, 0.9, 0.0)
    for first, second in ((large, near), (near, large)):
        found = check._worse(check._worse(first, second), grown)
        assert (found.max_error, found.reference_error, found.bound) == (0.5, 0.4, 0.9)
        assert found.unit_error == 0.2
        assert (found.unit_reference_error, found.unit_bound, found.unit_share) == (
            0.05,
            0.11,
            0.91,
        )
    assert check._worse(grown, grown).unit_share is None


def test_a_check_tells_the_bound_at_unit_scale():
    found = verdict(right)
    row = check.result(SMALL, "stage1", "ok", None, found)
    assert 0 < row["unit_share"] <= 1 and row["unit_error"] <= row["max_error"]
    assert row["unit_bound"] >= 2 * row["unit_reference_error"] > 0
    assert check.result(SMALL, "stage1", "unsupported", "no")["unit_bound"] is None


def test_rows_without_a_key_give_zero_and_minus_infinity():
    problem = replace(SMALL, seqlen_q=48, seqlen_k=32)
    assert verdict(right, problem).message is None

    def finite(q, k, v, **kwargs):
        out, lse = right(q, k, v, **kwargs)
        return out, lse.clamp(min=-1e4)

    assert "log-sum-exp" in verdict(finite, problem).message


def test_a_sample_of_heads_holds_the_first_and_the_last():
    problem = replace(LARGE, batch=8, nheads=16, nheads_k=16, seqlen_q=4096, seqlen_k=4096)
    heads = sampled_heads(problem, 0)
    assert heads[0] == (0, 0) and heads[-1] == (7, 15) and len(heads) == check.SAMPLED_HEADS
    assert sampled_heads(problem, 1) != heads
    long = replace(problem, seqlen_q=2 * check.LONG, seqlen_k=2 * check.LONG)
    assert len(sampled_heads(long, 0)) == check.LONG_SAMPLED_HEADS
    assert sampled_heads(LARGE, 0) is None
    ragged = replace(problem, causal=True, seqlen_q=4095)
    assert sampled_heads(ragged, 0) is None  # SDPA could not cover the other heads


def test_a_wrong_head_outside_the_sample_is_found(monkeypatch):
    monkeypatch.setattr(check, "FULL_HEADS", 0)
    heads = sampled_heads(LARGE, 3)
    other = next((b, h) for b in range(3) for h in range(4) if (b, h) not in heads)
    assert verdict(right, LARGE).message is None

    def one_wrong(q, k, v, **kwargs):
        out, lse = right(q, k, v, **kwargs)
        out[other[0], :, other[1]] = 0
        return out, lse

    assert f"batch {other[0]} head {other[1]}" in verdict(one_wrong, LARGE).message


def test_out_of_memory_and_cuda_errors_are_told_apart():
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB")
    assert "out of GPU memory" in check.explain(full) and not check.poisons_process(full)
    broken = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert check.poisons_process(broken)
    assert not check.poisons_process(ValueError("headdim=3"))


def test_a_check_waits_for_memory_that_others_hold():
    tries, waits = [], []

    def fits_the_third_time():
        held = torch.zeros(3)
        tries.append(weakref.ref(held))
        if len(tries) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "right"

    def wait():
        waits.append(1)
        assert not tries or tries[-1]() is None, "it waits with what it holds"

    assert check.patiently(fits_the_third_time, lambda: True, wait) == "right"
    assert len(tries) == 3 and len(waits) == 2

    def never():
        tries.append(lambda: None)
        raise torch.OutOfMemoryError("CUDA out of memory")

    tries.clear()
    with pytest.raises(torch.OutOfMemoryError):  # alone on the GPU
        check.patiently(never, lambda: False, wait)
    assert len(tries) == 1
    with pytest.raises(torch.OutOfMemoryError):
        check.patiently(never, lambda: True, wait)
    assert len(tries) == 1 + check.PATIENCE + 1

    def broken():
        tries.append(1)
        raise ValueError("something else")

    tries.clear()
    with pytest.raises(ValueError, match="something else"):
        check.patiently(broken, lambda: True, wait)
    assert len(tries) == 1


@pytest.mark.parametrize("what", ["out", "lse"])
def test_a_run_that_gives_other_bits_is_found(what):
    calls = 0

    def drifts(q, k, v, *, causal):
        nonlocal calls
        calls += 1
        out, lse = right(q, k, v, causal=causal)
        if calls == 5:
            changed = out if what == "out" else lse
            changed.view(-1)[3] += 0.01
        return out, lse

    assert check.QUEUED > 20  # so the look at the end finds it
    assert check.repeated(torch, SMALL, drifts, 0, "cpu", 20) == 4
    calls = 10
    assert check.repeated(torch, SMALL, drifts, 0, "cpu", 20) == 20
    calls = 0
    assert check.repeated(torch, SMALL, drifts, 0, "cpu", 2 * check.QUEUED) == 4


def test_a_run_that_leaves_what_was_in_memory_is_found():
    results = []

    def skips(q, k, v, *, causal):
        results.append(right(q, k, v, causal=causal) if len(results) < 2 else results[-1])
        return results[-1]

    assert check.repeated(torch, SMALL, skips, 0, "cpu", 20) == 2


def test_stages_are_repeated_on_problems_of_every_kind():
    problems = list(read_problems(check_problems()).values())
    repeated = {p.id: p for p in problems if p.id in check.to_repeat("stage5", problems)}
    assert len(repeated) >= 5
    assert {(p.headdim, p.causal) for p in repeated.values()} == {
        (headdim, causal) for headdim in (64, 128) for causal in (False, True)
    }
    assert check.to_repeat("fa3", problems) == check.to_repeat("fast_exp", problems) == []


# -- on two streams and in a CUDA graph


class Streams:
    """Two streams; what was called since the last synchronize may still run on any of them."""

    def __init__(self):
        self.current, self.running, self.waits = "default", [], 0
        self.two = [self.Stream(self, "a"), self.Stream(self, "b")]

    class Stream:
        def __init__(self, streams, name):
            self.streams, self.name = streams, name

        def __enter__(self):
            self.streams.current = self.name

        def __exit__(self, *args):
            self.streams.current = "default"

    def synchronize(self):
        self.waits += 1
        self.running.clear()


def calling(forward):
    inputs = draw(torch, SMALL, 0, "cpu")
    return lambda: forward(*inputs, causal=SMALL.causal)


def with_counter(streams, shared):
    """A subject that counts its tiles in memory that it shares among streams, or does not."""

    def forward(q, k, v, *, causal):
        out, lse = right(q, k, v, causal=causal)
        if shared and any(other != streams.current for other in streams.running):
            out[-1, -1] = 0  # the counter was not at 0, so the last tile is left out
        streams.running.append(streams.current)
        return out, lse

    return forward


def test_a_subject_that_shares_a_counter_among_streams_is_found():
    streams = Streams()
    call = calling(with_counter(streams, shared=False))
    assert on_streams(torch, call, streams.two, streams.synchronize) is None
    assert streams.waits == 2  # before the first and after the last: none between
    assert len(set(streams.running)) == 0

    streams = Streams()
    made = calling(with_counter(streams, shared=True))
    found = on_streams(torch, made, streams.two, streams.synchronize)
    assert (
        found == f"call 2 of {2 * CALLS}, on 2 streams in turn, gave other bits than a call alone"
    )


@pytest.mark.parametrize("what", [0, 1])
def test_the_last_call_on_a_stream_is_compared_too(what):
    streams, calls = Streams(), []

    def drifts(q, k, v, *, causal):
        calls.append(streams.current)
        found = right(q, k, v, causal=causal)
        if len(calls) == 1 + 2 * CALLS:
            found[what].view(-1)[3] += 0.01
        return found

    found = on_streams(torch, calling(drifts), streams.two, streams.synchronize)
    assert found.startswith(f"call {2 * CALLS} of {2 * CALLS}")
    assert calls == ["default", *["a", "b"] * CALLS]


def recycling(wrong_from):
    """A subject whose outputs lie in the same memory each time, with a tile left out from the
    given call on: without NaN in that memory the old answer would stand there."""
    memory, calls = [], []

    def forward(q, k, v, *, causal):
        calls.append(1)
        found = right(q, k, v, causal=causal)
        if not memory:
            memory.extend(found)
        rows = slice(None) if len(calls) < wrong_from else slice(0, -1)
        memory[0][:, rows] = found[0][:, rows]
        memory[1].copy_(found[1])
        return tuple(memory)

    return forward


def test_an_old_answer_in_recycled_memory_does_not_hide_a_missing_tile():
    streams = Streams()
    for wrong_from, message in ((1000, None), (5, "call 4 of 20")):
        call = calling(recycling(wrong_from))
        found = on_streams(torch, call, streams.two, streams.synchronize)
        assert found is message or found.startswith(message)


def test_a_subject_without_lse_is_compared():
    streams = Streams()
    call = calling(lambda *inputs, causal: (right(*inputs, causal=causal)[0], None))
    assert on_streams(torch, call, streams.two, streams.synchronize) is None


def test_replays_between_calls_are_compared():
    waits, calls = [], []

    def counting(q, k, v, *, causal):
        calls.append(1)
        return right(q, k, v, causal=causal)

    capture = FakeMachine().capture
    assert in_graph(torch, calling(counting), capture, lambda: waits.append(1)) is None
    assert len(waits) == REPLAYS
    assert len(calls) == 2 + 2 * REPLAYS  # alone, captured; in each replay, and after it


def test_a_replay_with_stale_results_is_found():
    machine = FakeMachine()
    scores = []

    def stale(q, k, v, *, causal):
        """Under capture it bakes in what it had computed on other inputs."""
        if machine.emitted is not None:
            return right(q.flip(1), k, v, causal=causal)
        scores.append(1)
        return right(q, k, v, causal=causal)

    expected = f"replay 1 of {REPLAYS} of a CUDA graph gave other bits than a call alone"
    found = in_graph(torch, calling(stale), machine.capture, machine.synchronize)
    assert found == expected and len(scores) == 2

    def capture_nothing(calls):  # the output of the capture is right, the graph is empty
        return lambda: None, calls[-1]()

    assert in_graph(torch, calling(right), capture_nothing, machine.synchronize) == expected


def test_a_replay_that_disturbs_the_next_call_is_found():
    machine = FakeMachine()
    left = []

    def forward(q, k, v, *, causal):
        out, lse = right(q, k, v, causal=causal)
        if machine.emitted is not None:
            left.append(1)  # the counter of the graph, which the next call finds
        elif len(left) > 2:
            out[0, 0] = 0
        return out, lse

    found = in_graph(torch, calling(forward), machine.capture, machine.synchronize)
    assert found == f"the call after replay 2 of {REPLAYS} of a CUDA graph gave other bits"


def test_a_failed_capture_is_told():
    machine = FakeMachine()
    machine.captures = False
    with pytest.raises(CannotCapture, match="RuntimeError: operation not permitted when stream"):
        in_graph(torch, calling(right), machine.capture, machine.synchronize)

    def breaks_twice(calls):
        try:
            raise ValueError("the stream is waited for")
        finally:
            raise RuntimeError("CUDA error: previous error during capture")

    with pytest.raises(CannotCapture, match="ValueError: the stream is.*, then RuntimeError: CUDA"):
        in_graph(torch, calling(right), breaks_twice, machine.synchronize)

    def no_memory(calls):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):  # which may be the fault of others
        in_graph(torch, calling(right), no_memory, machine.synchronize)


@pytest.fixture
def fake_cuda(monkeypatch):
    """`check.elsewhere` as on a GPU, with fakes for its streams and its machine."""
    streams, machine = Streams(), FakeMachine()
    drawn = check.draw
    monkeypatch.setattr(check, "draw", lambda torch, p, seed, device: drawn(torch, p, seed, "cpu"))
    monkeypatch.setattr(check, "Machine", lambda torch, flush_factor: machine)
    monkeypatch.setattr(machine, "synchronize", streams.synchronize)
    monkeypatch.setattr(torch.cuda, "Stream", iter(streams.two).__next__)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    return streams, machine


def test_calls_elsewhere_stand_in_the_row(fake_cuda):
    streams, _ = fake_cuda
    found = check.elsewhere(torch, SMALL, with_counter(streams, shared=False), 0)
    assert found == check.Elsewhere(True, True)
    row = check.result(SMALL, "x", "ok", None, other=found)
    assert row["streams"] is True and row["graph"] is True
    row = check.result(SMALL, "x", "unsupported", "why")
    assert row["streams"] is None and row["graph"] is None


def test_both_faults_elsewhere_are_told_and_a_failed_capture_ends_the_worker(fake_cuda):
    streams, machine = fake_cuda
    machine.captures = False
    found = check.elsewhere(torch, SMALL, with_counter(streams, shared=True), 0)
    assert (found.streams, found.graph, found.fatal) == (False, False, True)
    assert "on 2 streams in turn" in found.message and "cannot be captured" in found.message


def test_a_record_without_calls_elsewhere_is_valid(checked):
    def older(data):
        for row in data["results"]:
            del row["streams"], row["graph"]

    assert record.read(checked(older) / "check" / "tiny.json", "check")["results"]


def test_calls_elsewhere_are_metrics(checked):
    import synthetic

    from attn_profiling import tidy

    def compared(data):
        data["results"][1].update(streams=True, graph=False)

    run = checked(compared)
    synthetic.Maker(run).device()
    known = {SMALL.id: SMALL}
    tidier = tidy.Tidier(tidy.Run(run), "replay", known)
    tidier.checks()
    found = {
        (row["subject"], row["metric"]): (row["unit"], row["value"])
        for row in tidier.tables.metrics
        if row["metric"] in ("streams", "graph")
    }
    assert found == {("stage1", "streams"): ("1", 1.0), ("stage1", "graph"): ("1", 0.0)}


# -- one subject in processes of its own


WORKER = """
import json, os, sys, time
pipe = os.fdopen(int(os.environ["ATTN_LADDER_REPORT_FD"]), "w")
request = json.loads(sys.stdin.readline())
def send(**message):
    pipe.write(json.dumps(message) + "\\n")
    pipe.flush()
for problem in request["problems"]:
    send(begin=problem["id"])
    what = {behaviour}.get(problem["id"])
    if what == "crash":
        print("illegal instruction of the test", flush=True)
        os.kill(os.getpid(), 11)
    if what == "hang":
        time.sleep(60)
    if what == "exit":
        sys.exit(3)
    row = dict(problem=problem, subject=request["subject"], ok=True, status="ok", message=None,
               max_error=0.1, reference_error=0.1, bound=0.3, lse_error=0.0, heads=None,
               seconds=1.0)
    send(result=row)
"""


def check_with(monkeypatch, tmp_path, behaviour, names=("a", "b", "c")):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.replace("{behaviour}", repr(behaviour)))
    monkeypatch.setattr(workers, "COMMAND", (sys.executable, str(script)))
    problems = [replace(SMALL, id=name) for name in names]
    rows = check.check_one(
        "stage1", problems, (9, 0), 0, tmp_path / "log", {}, lambda name: None, silence_s=2.0
    )
    return {row["problem"]["id"]: row for row in rows}


def test_a_crash_costs_only_the_problem_it_met(monkeypatch, tmp_path):
    rows = check_with(monkeypatch, tmp_path, {"b": "crash"})
    assert [rows[n]["status"] for n in "abc"] == ["ok", "error", "ok"]
    assert "ended by SIGSEGV" in rows["b"]["message"]
    assert "illegal instruction of the test" in rows["b"]["message"]


def test_a_hang_is_ended_and_told(monkeypatch, tmp_path):
    rows = check_with(monkeypatch, tmp_path, {"a": "hang", "c": "exit"})
    assert [rows[n]["status"] for n in "abc"] == ["error", "ok", "error"]
    assert "no progress for 2 s" in rows["a"]["message"]
    assert "exit status 3" in rows["c"]["message"]


def test_a_worker_that_is_never_begun_ends(monkeypatch, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(workers, "COMMAND", (sys.executable, str(script)))
    worker = Worker("time", [], tmp_path / "log", {})
    worker.close()
    worker.close()
    with pytest.raises((WorkerDied, ValueError, OSError)):
        list(worker.messages(1.0))


def test_a_worker_says_that_it_waits_for_its_request(monkeypatch, tmp_path):
    def started(text):
        script = tmp_path / "worker.py"
        script.write_text(text)
        monkeypatch.setattr(workers, "COMMAND", (sys.executable, str(script)))
        return Worker("host", [], tmp_path / "log", {})

    fd = "import json, os, sys; pipe = os.fdopen(int(os.environ['ATTN_LADDER_REPORT_FD']), 'w')"
    send = "send = lambda **m: print(json.dumps(m), file=pipe, flush=True)"
    answer = "send(ready=True); send(begin=json.loads(sys.stdin.readline()))"
    worker = started(f"{fd}; {send}; {answer}")
    worker.wait_ready(20.0)
    worker.begin({"a": 1})
    assert list(worker.messages(20.0)) == [{"begin": {"a": 1}}]
    worker.close()
    worker = started("import sys; sys.exit(3)")
    with pytest.raises(WorkerDied, match="exit status 3"):
        worker.wait_ready(20.0)
    worker.close()


def test_the_real_worker_reports_what_cannot_run(tmp_path):
    """Without a GPU the worker still answers: the subject's error, not a stack trace."""
    problem = read_problems(check_problems())["smoke-d64-causal"]
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    rows = check.check_one(
        "fa2", [problem], (7, 5), 0, tmp_path / "log", environment, lambda name: None
    )
    assert rows[0]["status"] == "unsupported"
    assert "needs compute capability 8.0; this GPU has 7.5" in rows[0]["message"]


def check_problems():
    from pathlib import Path

    return Path(__file__).resolve().parents[1] / "config" / "problems.tsv"


# -- the gate of a run


@pytest.fixture
def checked(tmp_path):
    """A run with a check of two subjects on SMALL; edit(record) changes it."""
    import synthetic

    def write(edit=lambda data: None, status="ok"):
        maker = synthetic.Maker(tmp_path)
        data = maker.header("check", "tiny")
        data["results"] = [
            check.result(SMALL, name, status if name == "stage1" else "ok", "why")
            for name in ("fa3", "stage1")
        ]
        edit(data)
        record.write(tmp_path / "check" / "tiny.json", data, "check")
        return tmp_path

    return write


def test_the_gate_lets_through_what_is_right(checked):
    run = checked(status="failed")
    assert gate(run, [SMALL], ["fa3", "stage1"]) == {
        "small": {"fa3": None, "stage1": "failed: why"}
    }


def test_a_problem_of_two_suites_must_be_right_in_both(checked):
    run = checked(status="failed")
    data = record.read(run / "check" / "tiny.json", "check")
    for row in data["results"]:
        row.update(ok=True, status="ok")
    record.write(run / "check" / "another.json", data, "check")
    record.write(run / "check" / "zlast.json", data, "check")
    assert gate(run, [SMALL], ["stage1"])["small"]["stage1"] == "failed: why"


def test_what_was_never_checked_stops_the_measurement(checked):
    run = checked()
    with pytest.raises(NotChecked, match="fa2 was not checked on small"):
        gate(run, [SMALL], ["fa2"])
    with pytest.raises(NotChecked, match="was not checked on other"):
        gate(run, [replace(SMALL, id="other")], ["fa3"])


def test_a_kernel_that_changed_since_its_check_is_not_measured(checked):
    def older(data):
        data["subjects"]["stage1"]["kernel_hash"] = "0" * 16

    with pytest.raises(NotChecked, match="check is stale: stage1 was recorded at commit"):
        gate(checked(older), [SMALL], ["fa3", "stage1"])


def test_a_problem_that_changed_since_its_check_is_not_measured(checked):
    run = checked()
    with pytest.raises(NotChecked, match="other values of batch"):
        gate(run, [replace(SMALL, batch=4)], ["fa3"])


def test_infinite_errors_stand_as_null():
    found = check.Verdict("bad", float("inf"), 0.1, 0.3, float("nan"))
    row = check.result(SMALL, "x", "failed", "bad", found)
    assert row["max_error"] is None and row["lse_error"] is None
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_fast_path_without_its_guard_is_found(dtype, place):
    """Softmax relative to the maximum of 128 keys: right on usual inputs, not on growing scores."""
    problem = replace(
        LARGE, dtype=dtype, batch=1, seqlen_q=32, seqlen_k=384, nheads=3, nheads_k=3, headdim=64
    )

    def unguarded(q, k, v, causal):
        scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * q.shape[-1] ** -0.5
        first = scores[..., 128 * place : 128 * (place + 1)].amax(-1, keepdim=True)
        p = torch.exp(scores - first)
        out = torch.einsum("bhqk,bkhd->bqhd", p.to(v.dtype).float(), v.float())
        out = out / p.sum(-1).transpose(1, 2)[..., None]
        return out.to(q.dtype), (first[..., 0] + p.sum(-1).log())

    found = verdict(unguarded, problem)
    assert "on scores that grow along a row" in found.message
