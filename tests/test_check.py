"""The gate: what is wrong must fail it, each wrong thing in its own way."""

import json
import os
import sys
from dataclasses import replace

import pytest
import torch
from fake_gpu import SMALL, right

from attn_ladder.problem import Problem, read_problems
from attn_profiling import check, record, workers
from attn_profiling.check import NotChecked, check_subject, gate, sampled_heads
from attn_profiling.workers import Worker, WorkerDied

LARGE = Problem(
    id="large", suites=("tiny",), dtype="fp16", batch=3, seqlen_q=64, seqlen_k=64, nheads=4,
    nheads_k=4, headdim=16, causal=False,
)  # fmt: skip


def verdict(forward, problem=SMALL):
    with torch.inference_mode():
        return check_subject(torch, problem, forward, 3, "cpu")


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
        tries.append(1)
        if len(tries) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "right"

    def wait():
        waits.append(1)

    assert check.patiently(fits_the_third_time, lambda: True, wait) == "right"
    assert len(tries) == 3 and len(waits) == 2

    def never():
        tries.append(1)
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


def test_stages_are_repeated_on_problems_of_every_kind():
    problems = list(read_problems(check_problems()).values())
    repeated = {p.id: p for p in problems if p.id in check.to_repeat("stage5", problems)}
    assert len(repeated) >= 5
    assert {(p.headdim, p.causal) for p in repeated.values()} == {
        (headdim, causal) for headdim in (64, 128) for causal in (False, True)
    }
    assert check.to_repeat("fa3", problems) == check.to_repeat("fast_exp", problems) == []


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
