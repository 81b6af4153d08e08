"""The step `serving`: what its worker measures, what the command makes of it, and what it
refuses."""

import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import synthetic
import torch
from fake_gpu import fake_gpu

from attn_profiling import addenda, promote, record, serving, settings, sources, tidy, verify
from attn_profiling import serving_check as sc
from attn_profiling.launches import MeasureError
from attn_profiling.session import Session
from attn_profiling.tidy_serving import CLEAN, LARGE, SMALL
from attn_profiling.workers import WorkerDied

SHAPE = {"batch": 2, "nheads": 4, "nheads_k": 2, "headdim": 64, "length": 256}
ENTRY = {"id": "x", "shape": SHAPE, "pages": [64], "chosen": None}


class FakeTimer:
    """A call takes as many microseconds as its name is long; with `less_than`, as many less. Of FA3
    `seen` has the number of splits that a subject of the last measurement asked for."""

    def __init__(self, less_than=0):
        self.less_than, self.rounds = less_than, []

    def measure(self, subjects, rounds, seed=0):
        self.seen = {}
        for name, call in subjects.items():
            Module.asked = None
            call(seed)
            self.seen[name] = Module.asked
        self.rounds.append((len(subjects), rounds))
        us = {name: abs(self.less_than - float(len(name))) for name in subjects}
        return {
            name: {
                "gpu_us": [us[name]] * rounds, "sum_us": [us[name]] * rounds,
                "event_us": [9.0] * rounds, "median_us": us[name], "clock_mhz": None,
                "dry": 0, "kernels": [["a", 1.0], ["a", 1.0], ["b", 1.0]],
            }
            for name in subjects
        }  # fmt: skip


def timers():
    return {"samples": FakeTimer(), "clean": FakeTimer(less_than=100)}


class Module:
    """FA3's interface on the reference; off by `error`."""

    error = 0.0
    asked = None

    def get_scheduler_metadata(self, *args, **kwargs):
        raise RuntimeError("not in this build")

    def flash_attn_with_kvcache(self, q, k, v, *, cache_seqlens, causal, num_splits=0, **more):
        from attn_ladder.reference import attention_reference

        if more:
            raise TypeError(f"unexpected {more}")
        Module.asked = num_splits
        out, lse = attention_reference(q, k, v, causal=causal)
        return out.to(q.dtype) + self.error, lse


SCRIPT = """
import json, sys
import test_serving as t
from attn_profiling import serving, serving_check as sc

shape = sc.Shape(**t.SHAPE)
pool = sc.Pool([shape], "fp16", "cpu")
import torch
torch.cuda.synchronize = torch.cuda.empty_cache = lambda: None
timers = t.timers()
found = serving.measure(timers, pool, t.Module(), t.ENTRY, 3, 0)
found["asked"] = {kind: timer.seen["fa3"] for kind, timer in timers.items()}
found["rounds"] = {kind: timer.rounds for kind, timer in timers.items()}
print(json.dumps(found))
"""


def test_the_worker_times_what_is_right_alone_and_in_pages():
    """Our kernels under Triton's interpreter, compared with the reference before they are timed."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert set(found["samples"]) == {"decode", "decode#2", "p64", "fa3", "fa3#2"}
    assert set(found["clean"]) == {"decode", "decode#2", "fa3", "fa3#2"}
    assert found["samples"]["decode"]["gpu_us"] == [6.0] * 3 and found["left_out"] == {}
    assert found["samples"]["fa3"]["kernels"] == {"a": 2, "b": 1}
    assert found["clean"]["decode"]["gpu_us"] == [94.0] * 3  # of the other timer
    # behind one flush the shortest name of those that run, `auto`; behind the other a long one
    chosen = found["chosen"]
    assert chosen["samples"] == {} and chosen["clean"]["num_splits"] >= 1
    assert found["asked"] == {"samples": 0, "clean": chosen["clean"]["num_splits"]}
    for kind, tried in found["tried"].items():
        failed = {str(row["config"]): row["message"] for row in tried if row["message"]}
        assert "not in this build" in failed["{'metadata': True}"]
        assert "unexpected" in failed["{'pack_gqa': True}"]
        runs = [row for row in tried if row["gpu_us"] is not None]
        finalists = [row for row in runs if row["final"]]
        assert len(finalists) == 3 < len(runs) and chosen[kind] in [r["config"] for r in finalists]
        first, final, last = found["rounds"][kind]
        assert first == [len(runs), 5] and final == [3, 20] and last[1] == 3


@pytest.fixture
def on_cpu(monkeypatch):
    """Our side is the reference, with pages read through the table."""
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)

    def ours(pool, shape, page=0):
        def call(i):
            q, k, v = pool.inputs(shape, i)
            if page:
                size = (-1, page, shape.nheads_k, shape.headdim)
                table = sc.page_table(shape, page).long()
                k, v = (x.reshape(size)[table].reshape(x.shape) for x in (k, v))
            lens = torch.tensor([shape.length] * shape.batch)
            return Module().flash_attn_with_kvcache(q, k, v, cache_seqlens=lens, causal=True)[0]

        return call

    monkeypatch.setattr(sc, "ours", ours)
    return sc.Pool([sc.Shape(**SHAPE)], "fp16", "cpu")


def measured(pool, module):
    return serving.measure(
        timers(), pool, module, {**ENTRY, "chosen": {"samples": {}, "clean": {}}}, 3, 0
    )


def test_what_is_wrong_is_left_out_and_not_timed(on_cpu, monkeypatch):
    assert measured(on_cpu, Module())["left_out"] == {}
    module = Module()
    module.error = 0.1
    found = measured(on_cpu, module)
    assert set(found["samples"]) == {"decode", "decode#2", "p64"}
    assert found["left_out"]["fa3"].startswith("wrong: error 1.0")
    ours = sc.ours  # reads pages in an order that is not the table's
    monkeypatch.setattr(
        sc, "ours", lambda pool, shape, page=0: ours(pool, shape, page and 2 * page)
    )
    found = measured(on_cpu, ImportError("no such module"))
    assert set(found["samples"]) == {"decode", "decode#2"}
    assert found["left_out"]["p64"].startswith("wrong: error")
    assert "no such module" in found["left_out"]["fa3"]


def test_not_a_number_is_wrong(on_cpu):
    q, k, v = on_cpu.inputs(sc.Shape(**SHAPE), 0)
    out = Module().flash_attn_with_kvcache(q, k, v, cache_seqlens=None, causal=True)[0]
    assert serving.wrong(out, q, k, v) is None
    out[1, 0, 0, 0] = float("nan")
    assert "NaN" in serving.wrong(out, q, k, v)
    assert serving.sampled(1) == [0] and serving.sampled(64) == [0, 21, 42, 63]


# -- the command


def samples(us, rounds=4):
    return {
        "gpu_us": [us] * rounds, "sum_us": [us] * rounds, "event_us": [us + 1] * rounds,
        "clock_mhz": 1700.0, "dry": 0, "kernels": {"k": 1},
    }  # fmt: skip


CHOSEN = {"samples": {"num_splits": 4}, "clean": {"num_splits": 2}}


def result(**changes):
    taken = {n: samples(10.0) for n in ("decode", "decode#2")}
    taken |= {n: samples(12.0) for n in ("fa3", "fa3#2")} | {"p256": samples(10.1)}
    clean = {n: samples(8.0 if "d" in n else 10.0) for n in taken if n != "p256"}
    found = {
        "samples": taken,
        "clean": clean,
        "chosen": CHOSEN,
        "tried": {},
        "left_out": {},
    }
    return {**found, "copy_bytes_per_s": 3e12, **changes}


class FakeWorker:
    answer = None
    begun: list = []

    def __init__(self, kind, arguments, log, environment):
        assert kind == "serving" and environment["ATTN_LADDER_FA3_MODULE"] == "fa3_fwd_interface"
        (self.part,) = arguments

    def begin(self, request):
        self.request = request
        self.begun.append((self.part, [e["id"] for e in request.get("entries", ())]))

    def messages(self, silence_s):
        if self.part == "checks":
            yield {"check": {"name": "kvcache", "ok": True, "detail": "right", "seconds": 1.0}}
            yield {"stopped": None}
            return
        for entry in self.request["entries"]:
            yield {"begin": entry["id"]}
            found = type(self).answer(len(self.begun), entry)
            if isinstance(found, Exception):
                raise found
            yield {"result": found}
            if any("illegal memory" in text for text in found["left_out"].values()):
                return

    def close(self):
        return None


@pytest.fixture
def step(monkeypatch, tmp_path):
    monkeypatch.setattr(serving, "Session", lambda s, names: Session(s, names, fake_gpu()))
    monkeypatch.setattr(serving, "Worker", FakeWorker)
    FakeWorker.begun = []
    config = {"measuring": {"processes": 2, "rounds": 4, "max_attempts": 2}}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def run(answer):
        FakeWorker.answer = staticmethod(answer)
        chosen = settings.load(tmp_path / "config.json", tmp_path)
        return serving.run(chosen, "smoke_decode", tmp_path / "serving" / "smoke_decode.json")

    run.folder = tmp_path
    return run


def test_the_record_has_every_problem_with_its_samples(step):
    seen = []

    def answer(n, entry):
        seen.append((entry["id"], entry["pages"], entry["chosen"]))
        return result()

    data = step(answer)
    assert record.read(step.folder / "serving" / "smoke_decode.json", "decode") == data
    rows = {row["problem"]["id"]: row for row in data["problems"]}
    assert len(rows) == 4 and {row["status"] for row in rows.values()} == {"ok"}
    alone, paged = (rows["decode-b1-h9-k3-d64-512" + tail] for tail in ("", "-p256"))
    taken = alone["attempts"][0]["samples"]
    assert set(taken) == {"decode", "decode#2", "fa3", "fa3#2"}
    assert taken["fa3"]["gpu_us"] == [[12.0] * 4] * 2
    assert alone["chosen"] == {"fa3": {"num_splits": 4}} and paged["chosen"] == {}
    assert alone["clean_chosen"] == {"fa3": {"num_splits": 2}} and paged["clean_chosen"] == {}
    assert paged["attempts"][0]["samples"]["decode"]["gpu_us"] == [[10.1] * 4] * 2
    attempt = alone["attempts"][0]
    assert attempt["clean"]["fa3"]["gpu_us"] == [[10.0] * 4] * 2
    assert attempt["clean_aa_ratios"] == {"decode": 1.0, "fa3": 1.0} and attempt["clean_ok"]
    assert paged["attempts"][0]["clean"] == paged["attempts"][0]["clean_aa_ratios"] == {}
    assert [row["name"] for row in data["checks"]] == ["kvcache"]
    assert set(data["subjects"]) == {"decode", "fa3"}
    # the second process is told what the first one chose
    assert seen[0][1:] == ([256], None) and seen[-1][1:] == ([256], CHOSEN)
    assert not list((step.folder / "serving" / ".partial" / "smoke_decode").glob("*.json"))


def test_a_stopped_step_goes_on_without_measuring_twice(step):
    def dies(n, entry):
        return WorkerDied("gone") if "k8" in entry["id"] and n > 2 else result()

    with pytest.raises(MeasureError, match="decode-b1-h32-k8-d128-2k: gone"):
        step(dies)
    before = len(FakeWorker.begun)
    step(lambda n, entry: result())
    later = FakeWorker.begun[before:]
    assert ("checks", []) not in later
    assert [len(ids) for _, ids in later] == [2]


def test_a_pair_that_is_off_is_measured_again_and_then_inconclusive(step):
    def off(n, entry):
        if "k3" not in entry["id"]:
            return result()
        taken = result()["samples"] | {"fa3#2": samples(12.6)}
        return result(samples=taken)

    data = step(off)
    rows = {row["problem"]["id"]: row for row in data["problems"]}
    row = rows["decode-b1-h9-k3-d64-512"]
    assert row["status"] == "inconclusive" and len(row["attempts"]) == 2
    assert row["attempts"][1]["aa_ratios"] == {"decode": 1.0, "fa3": 1.05}
    assert "A/A pair of fa3 differs by 5.00%" in row["attempts"][1]["message"]
    assert len(rows["decode-b1-h32-k8-d128-2k"]["attempts"]) == 1
    assert [len(ids) for _, ids in FakeWorker.begun] == [0, 2, 2, 1, 1]


def test_a_pair_that_is_off_behind_the_other_flush_is_measured_again(step):
    """What agreed before stays, and each flush counts by an attempt in which its pairs agree."""

    def off(n, entry):
        if "k3" not in entry["id"]:
            return result()
        if n <= 3:  # checks, and the two processes of the first attempt
            return result(clean=result()["clean"] | {"fa3#2": samples(10.5)})
        return result(samples=result()["samples"] | {"fa3#2": samples(12.6)})

    data = step(off)
    rows = {row["problem"]["id"]: row for row in data["problems"]}
    row, other = rows["decode-b1-h9-k3-d64-512"], rows["decode-b1-h32-k8-d128-2k"]
    assert [(a["ok"], a["clean_ok"]) for a in row["attempts"]] == [(True, False), (False, True)]
    assert row["status"] == "ok" and len(other["attempts"]) == 1
    assert "behind the flush that reads differs by 5.00%" in row["attempts"][0]["message"]


def test_the_peer_may_be_left_out_behind_one_flush_only(step, on_cpu):
    """Its samples behind the other are there, and the reason is of the one."""
    entry = {**ENTRY, "chosen": {"samples": {}, "clean": None}}
    found = serving.measure(timers(), on_cpu, Module(), entry, 3, 0)
    assert "fa3" in found["samples"] and "fa3" not in found["clean"]
    assert found["left_out"] == {"fa3, clean L2": "none of its configurations runs"}
    data = step(lambda n, entry: result(left_out=found["left_out"], chosen=entry["chosen"]
                                        or {"samples": {}, "clean": None}))  # fmt: skip
    row = next(row for row in data["problems"] if row["chosen"])
    assert row["left_out"] == found["left_out"] and row["clean_chosen"] == {}
    assert row["status"] == "ok"


def test_a_shape_that_loses_the_gpu_does_not_keep_the_others(step):
    def lost(n, entry):
        if "k3" not in entry["id"]:
            return result()
        return result(
            samples={}, clean={}, left_out={"decode": "an illegal memory access"}, chosen=None
        )

    data = step(lost)
    rows = {row["problem"]["id"]: row for row in data["problems"]}
    assert rows["decode-b1-h9-k3-d64-512"]["left_out"]["decode"].startswith("an illegal")
    assert rows["decode-b1-h32-k8-d128-2k"]["status"] == "ok"
    assert any("decode-b1-h9-k3-d64-512: inconclusive" in line for line in serving.summary(data))


def test_what_failed_once_is_measured_again_and_what_is_wrong_is_not(step):
    def answer(n, entry):
        if "k3" in entry["id"]:
            return result(samples={}, clean={}, left_out={"decode": "wrong: error 1, bound 0"})
        first = n <= 3  # checks, and the two processes of the first attempt
        failed = {
            "samples": {},
            "clean": {},
            "left_out": {"decode": "ActivityError: 3 records are lost"},
        }
        return result(**failed) if first else result()

    data = step(answer)
    rows = {row["problem"]["id"]: row for row in data["problems"]}
    again, wrong = rows["decode-b1-h32-k8-d128-2k"], rows["decode-b1-h9-k3-d64-512"]
    assert [a["ok"] for a in again["attempts"]] == [False, True] and again["status"] == "ok"
    assert again["left_out"] == {}
    assert len(wrong["attempts"]) == 1 and wrong["left_out"]["decode"].startswith("wrong")


# -- the model


def loaded(folder, **config):
    (folder / "config.json").write_text(json.dumps(config))
    return settings.load(folder / "config.json", folder)


def test_without_a_model_the_record_says_so(step):
    out = step.folder / "serving" / "model.json"
    data = serving.run_model(loaded(step.folder), out)
    assert record.read(out, "model") == data
    assert data["reason"] == serving.NO_MODEL and "not measured: no model named" in data["reason"]
    assert data["model"] is None and serving.summary(data) == [serving.NO_MODEL]


def test_a_model_that_is_not_there_or_cannot_be_read_is_an_error(step, monkeypatch):
    out = step.folder / "serving" / "model.json"
    with pytest.raises(ValueError, match=r"model='nothing.gguf' is no file here"):
        serving.run_model(loaded(step.folder, model="nothing.gguf"), out)
    model = step.folder / "small.gguf"
    model.write_bytes(b"GGUF")

    def absent(name):
        raise serving.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(serving.metadata, "version", absent)
    with pytest.raises(ValueError, match="needs the package transformers, which is not installed"):
        serving.run_model(loaded(step.folder, model=str(model)), out)
    assert not out.exists()


def test_what_the_script_finds_becomes_the_record(step, monkeypatch):
    model, out = step.folder / "small.gguf", step.folder / "serving" / "model.json"
    model.write_bytes(b"GGUF")
    monkeypatch.setattr(serving.metadata, "version", lambda name: "1")
    speed = {"kind": "prefill", "implementation": "sdpa", "batch": 1, "before": 0}
    found = {
        "stopped": "the rest at 400 s", "elapsed_s": 400.0, "dtype": "bfloat16",
        "token_agreement": [
            {"case": "alone", "cache": "static", "against": "sdpa", "prompt_tokens": 5,
             "implementation": name, "new_tokens": 64, "dtype": "torch.bfloat16", "same": True,
             "agree": 64} for name in ("attn_ladder", "sdpa")
        ] + [
            {"case": "alone", "cache": "static", "error": "RuntimeError: no"},
        ],
        "speed": [{**speed, "dtype": "torch.bfloat16", "seconds": [0.5, 0.25], "tokens": 10,
                   "tokens_per_s": 1.0}, {**speed, "error": "no"}],
    }  # fmt: skip

    def ran(command, env, stdout, stderr):
        assert env["ATTN_LADDER_FA3_MODULE"] == "fa3_fwd_interface"
        assert command[command.index("--model") + 1] == str(model)
        Path(command[command.index("--out") + 1]).write_text(json.dumps(found))
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(serving, "subprocess", SimpleNamespace(run=ran, STDOUT=None))
    data = serving.run_model(loaded(step.folder, model=str(model)), out)
    assert record.read(out, "model") == data
    assert data["model"]["sha256"] == hashlib.sha256(b"GGUF").hexdigest()
    assert data["speed"][0]["seconds"] == [[0.5, 0.25]] and data["memory"] is None
    assert data["errors"] == {"stopped": "the rest at 400 s"}
    assert serving.summary(data)[0] == "tokens: 1 of 2 prompts the same, 0 ties"

    def silent(command, env, stdout, stderr):
        stdout.write("Killed\n")
        return SimpleNamespace(returncode=-9)

    monkeypatch.setattr(serving, "subprocess", SimpleNamespace(run=silent, STDOUT=None))
    with pytest.raises(MeasureError, match="exit status -9 and nothing found.*\n.*Killed"):
        serving.run_model(loaded(step.folder, model=str(model)), out)


# -- from the record to the tables


@pytest.fixture
def maker(tmp_path):
    made = synthetic.Maker(tmp_path / "run")
    made.device()
    made.decode("smoke_decode")
    made.model()
    return made


def derived(maker):
    return tidy.tidy(maker.folder, "replay", synthetic.PROBLEMS, synthetic.open_report)


def one(rows, **wanted):
    (row,) = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
    return row


def shared_rows(name):
    with (synthetic.shared() / "results" / name).open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_the_tables_find_the_truth_of_decoding():
    decode = [r for r in shared_rows("speedups.csv") if r["suite"] == "decode"]
    speedups = [r for r in decode if r["regime"] == "spaced"]
    for problem, truth in ((SMALL, 1.25), (LARGE, 1.1), (tidy.MINIMUM, 1.1)):
        row = one(decode, problem=problem, peer="fa3", regime=CLEAN)
        assert float(row["ratio"]) == pytest.approx(1.05 * truth, rel=0.004)
    for problem, truth in ((SMALL, 1.25), (LARGE, 1.1), (tidy.MINIMUM, 1.1)):
        row = one(speedups, problem=problem, peer="fa3")
        assert float(row["ratio"]) == pytest.approx(truth, rel=0.004)
        assert float(row["ci_low"]) < float(row["ratio"]) < float(row["ci_high"])
    row = one(speedups, problem="decode-b16-h32-k8-d128-4k-p256", peer="contiguous")
    assert float(row["ratio"]) == pytest.approx(1 / 1.02, rel=0.004)
    assert not [r for r in speedups if r["problem"].endswith("-p256") and r["peer"] == "fa3"]
    metrics = [r for r in shared_rows("metrics.csv") if r["suite"] == "decode"]
    clean = [r for r in metrics if r["regime"] == CLEAN]
    told = {"gpu_us", "aa_ratio", "conclusive", "chosen_there", "tried_there"}
    assert {r["metric"] for r in clean} == told
    metrics = [r for r in metrics if r["regime"] != CLEAN]
    size = 4 * 64 * 8192 * 8 * 128
    place = {"problem": "decode-b64-h32-k8-d128-8k", "subject": "decode", "statistic": "median"}
    us = float(one(metrics, metric="gpu_us", **place)["value"])
    rate = float(one(metrics, metric="kv_bytes_per_s", **place)["value"])
    assert rate == pytest.approx(size / us * 1e6)
    assert float(one(metrics, metric="of_copy", **place)["value"]) == pytest.approx(
        100 * rate / 3e12
    )
    assert float(one(metrics, metric="checks_right")["value"]) == 12


def test_the_tables_find_the_tokens_memory_and_speed_of_the_model():
    rows = [r for r in shared_rows("metrics.csv") if r["suite"] == "model"]
    token = {
        "problem": "alone, dynamic, bf16, against sdpa", "subject": "attn_ladder",
        "statistic": "value",
    }  # fmt: skip
    assert float(one(rows, metric="token_agreement", **token)["value"]) == pytest.approx(2 / 3)
    assert one(rows, metric="token_ties", **token)["value"] == "1"
    whole = {"problem": "(tokens)", "subject": "attn_ladder", "statistic": "value"}
    assert one(rows, metric="token_differences", **whole)["value"] == "0"
    assert one(rows, metric="token_prompts", **whole)["value"] == "23"
    whole["problem"] = "(tokens), fp16"
    assert one(rows, metric="token_agreement", **whole)["value"] == "1"
    difference = {"problem": "alone, dynamic, bf16, against sdpa, 55 tokens"}
    assert one(rows, metric="first_difference_agree", **difference)["value"] == "31"
    assert one(rows, metric="first_difference_exact_margin", **difference)["value"] == "-0.03"
    cache = one(rows, metric="cache_bytes")
    assert one(rows, metric="expanded_bytes")["value"] == f"{3 * float(cache['value']):.9g}"
    speed = {"problem": "prefill, batch 8", "subject": "sdpa", "metric": "tokens_per_s"}
    assert float(one(rows, **speed, statistic="median")["value"]) == pytest.approx(8 * 2048 / 0.025)
    assert float(one(rows, **speed, statistic="ci_low")["value"]) < 8 * 2048 / 0.025


def test_a_record_without_fp32_logits_is_told_and_may_be_replaced(maker):
    path = maker.folder / "serving" / "model.json"
    data = json.loads(path.read_text())
    assert addenda.fault(data, {}) is None
    rows = [row for row in data["token_agreement"] if row["implementation"] == "attn_ladder"]
    for row in rows:
        del row["implementation"]
        for name in ("exact_margin", "logit_error", "reference_error"):
            row.pop(name, None)
    path.write_text(json.dumps(data | {"token_agreement": rows}))
    assert addenda.fault(record.read(path, "model"), {}) == "without fp32 logits"
    tables = derived(maker)
    assert one(tables.metrics, metric="token_ties", problem="(tokens)")["value"] == 1
    found = {row["metric"] for row in tables.metrics}
    assert "first_difference_margin" in found and "first_difference_exact_margin" not in found


def medians(tables, regime):
    """How many samples each reduction over shapes has."""
    return {
        row["problem"]: row["n"] for row in tables.speedups
        if row["problem"].startswith("(") and (row["peer"], row["regime"]) == ("fa3", regime)
    }  # fmt: skip


LOST = "decode-b1-h32-k8-d128-2k"  # one of 23 shapes, and of 9 small ones
WHOLE = {tidy.MEDIAN: 23 * 90, tidy.MINIMUM: 23 * 90, SMALL: 9 * 90, LARGE: 14 * 90}
WITHOUT = {tidy.MEDIAN: 22 * 90, tidy.MINIMUM: 22 * 90, LARGE: 14 * 90}


def test_what_is_inconclusive_is_left_out_of_the_medians(maker):
    """And where that is more than a tenth, there is none."""
    (maker.folder / "serving" / "smoke_decode.json").unlink()
    maker.decode("decode", noisy=[LOST])
    tables = derived(maker)
    assert medians(tables, "spaced") == medians(tables, CLEAN) == WITHOUT
    (item,) = tables.provenance["inconclusive"]
    assert item["problem"] == LOST and item["reason"] == "A/A is off"


def test_a_pair_that_is_off_behind_the_flush_that_reads_leaves_out_that_regime_only(maker):
    (maker.folder / "serving" / "smoke_decode.json").unlink()
    maker.decode("decode")
    path = maker.folder / "serving" / "decode.json"
    data = json.loads(path.read_text())
    for row in data["problems"]:
        if row["problem"]["id"] == LOST:
            row["attempts"][0]["clean_ok"] = False
    path.write_text(json.dumps(data))
    tables = derived(maker)
    assert medians(tables, "spaced") == WHOLE and medians(tables, CLEAN) == WITHOUT
    place = dict(problem=LOST, metric="conclusive", regime=CLEAN)
    assert one(tables.metrics, **place)["value"] == 0 and not tables.provenance["inconclusive"]
    for row in data["problems"]:  # a later attempt, whose other pair is off
        if row["problem"]["id"] == LOST:
            again = row["attempts"][0] | {"attempt": 2, "ok": False, "clean_ok": True}
            row["attempts"].append(again)
    path.write_text(json.dumps(data))
    tables = derived(maker)
    assert medians(tables, "spaced") == medians(tables, CLEAN) == WHOLE
    assert one(tables.metrics, **place)["value"] == 1 and not tables.provenance["inconclusive"]


def test_a_wrong_check_and_an_error_are_told(maker):
    path = maker.folder / "serving" / "smoke_decode.json"
    data = json.loads(path.read_text())
    data["checks"][3] |= {"ok": False, "detail": "error 1e-1, bound 1e-2"}
    path.write_text(json.dumps(data))
    tables = derived(maker)
    assert one(tables.metrics, metric="checks_wrong")["value"] == 1
    told = {(row["problem"], row["reason"]) for row in tables.provenance["excluded"]}
    assert ("kvcache 3", "error 1e-1, bound 1e-2") in told
    assert ("prefill, batch 8", "RuntimeError: no") in told


def test_a_changed_kernel_is_stale_and_gives_no_number(maker, monkeypatch):
    monkeypatch.setattr(record, "source_hash", lambda name: "0" * 16)
    tables = derived(maker)
    assert {row["what"] for row in tables.provenance["stale"]} == {
        "decode", "fa3", "transformers",
    }  # fmt: skip
    assert tables.speedups == [] and not [r for r in tables.metrics if r["suite"] == "model"]
    assert {r["metric"] for r in tables.metrics} == {"checks_right", "checks_wrong"}


def test_a_changed_shape_or_number_format_is_stale(maker):
    path = maker.folder / "serving" / "smoke_decode.json"
    data = json.loads(path.read_text())
    data["problems"][0]["problem"]["dtype"] = "fp16"
    data["problems"][1]["problem"]["batch"] = 3
    path.write_text(json.dumps(data))
    reasons = [row["reason"] for row in derived(maker).provenance["stale"]]
    assert len(reasons) == 2
    assert "other values of dtype" in reasons[0] and "other values of batch" in reasons[1]


def test_a_foreign_file_in_its_place_is_refused(maker):
    path = maker.folder / "serving" / "smoke_decode.json"
    path.write_bytes((maker.folder / "serving" / "model.json").read_bytes())
    with pytest.raises(record.RecordError, match="schema='attn-ladder/model/1', expected"):
        derived(maker)


def test_without_a_model_there_is_a_note_and_no_row(maker):
    maker.model(reason=serving.NO_MODEL)
    tables = derived(maker)
    assert f"serving/model.json: {serving.NO_MODEL}" in tables.provenance["notes"]
    assert not [r for r in tables.metrics if r["suite"] == "model"]


def test_the_hash_of_what_serves_follows_its_files(tmp_path, monkeypatch):
    decode, model = sources.source_hash("decode"), sources.source_hash("transformers")
    assert sources.source_hash("fa3") == synthetic.stage.kernel_hash("fa3") != decode != model
    folder = tmp_path / "attn_ladder"
    (folder / "integrations").mkdir(parents=True)
    for path in synthetic.stage.PACKAGE.rglob("*.py"):
        target = folder / path.relative_to(synthetic.stage.PACKAGE)
        target.parent.mkdir(exist_ok=True, parents=True)
        target.write_text(path.read_text())
    monkeypatch.setattr(synthetic.stage, "PACKAGE", folder)

    def hashes():
        synthetic.stage.source_hash.cache_clear()
        return sources.source_hash("decode"), sources.source_hash("transformers")

    try:
        assert hashes() == (decode, model)
        with (folder / "decode.py").open("a") as handle:
            handle.write("# a comment\n")
        assert hashes() == (decode, model)
        with (folder / "serving.py").open("a") as handle:
            handle.write("X = 1\n")
        assert hashes()[0] == decode and hashes()[1] != model
        with (folder / "decode.py").open("a") as handle:
            handle.write("X = 1\n")
        assert hashes()[0] != decode
    finally:
        synthetic.stage.source_hash.cache_clear()


# -- promoting and verifying


def test_a_run_with_serving_is_promoted_and_one_without_its_file_is_not(maker, tmp_path):
    suites = {
        "check": [], "time": {"spaced": [], "sustained": []}, "host": [], "profile": [],
        "serving": ["smoke_decode"],
    }  # fmt: skip
    config = maker.folder / "config.json"
    config.write_text(json.dumps({"suites": suites, "model": "small.gguf"}))
    target, _ = promote.promote(maker.folder, tmp_path / "measurements" / "one")
    held = sorted(p.name for p in (target / "serving").iterdir())
    assert held == ["model.json", "smoke_decode.json"]
    (maker.folder / "serving" / "model.json").unlink()
    with pytest.raises(promote.NotPromoted, match="serving/model.json: no such file"):
        promote.promote(maker.folder, tmp_path / "measurements" / "two")
    config.write_text(json.dumps({"suites": suites, "model": None}))
    assert promote.promote(maker.folder, tmp_path / "measurements" / "three")


def claims(maker, tmp_path, change=None):
    fresh = synthetic.Maker(tmp_path / "fresh", 2)
    fresh.device()
    fresh.decode("smoke_decode")
    fresh.model()
    if change:
        change(fresh.folder / "serving")
    found = verify._serving(fresh.folder / "serving", addenda.files(maker.folder, "serving"), 0.025)
    return {claim.claim.split(",")[0]: claim.verdict for claim in found}


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda data: data["errors"].update(stopped="the rest at 400 s"), "cut short"),
        (lambda data: data["token_agreement"].pop(0), "cut short"),
        (lambda data: [row.pop("reference_error", 0) for row in data["token_agreement"]],
         "another rule"),
        (lambda data: data["token_agreement"].pop(), None),  # of the references alone
    ],
)  # fmt: skip
def test_tokens_of_a_run_that_was_cut_short_do_not_pass(maker, change, note):
    recorded = json.loads((maker.folder / "serving" / "model.json").read_text())
    fresh = json.loads(json.dumps(recorded))
    change(fresh)
    (claim,) = verify.compare_tokens(fresh, recorded)
    assert claim.verdict == ("AMBIGUOUS" if note else "PASS")
    assert claim.note is None if note is None else note in claim.note


def test_the_same_truth_passes_and_worse_tokens_and_slower_kernels_fail(maker, tmp_path):
    assert set(claims(maker, tmp_path).values()) == {"PASS"}

    def worse(folder):
        data = json.loads((folder / "model.json").read_text())
        data["token_agreement"][1]["tie"] = False
        (folder / "model.json").write_text(json.dumps(data))
        data = json.loads((folder / "smoke_decode.json").read_text())
        data["checks"][0]["ok"] = False
        for row in data["problems"]:
            for name, taken in row["attempts"][0]["samples"].items():
                if name == "decode":
                    taken["gpu_us"] = [[1.1 * us for us in p] for p in taken["gpu_us"]]
        (folder / "smoke_decode.json").write_text(json.dumps(data))

    found = claims(maker, tmp_path, worse)
    assert len(found) == 3 and set(found.values()) == {"FAIL"}
