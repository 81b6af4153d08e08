"""A model on these kernels through transformers: the GPU script, in small on the CPU."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from attn_profiling import serving_model as sm
from attn_profiling import serving_tokens as st


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
def test_a_tiny_model_gives_the_tokens_of_sdpa_and_eager(tmp_path):
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "attn_profiling.serving_model", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", str(out), "--seconds", "400"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads(out.read_text())
    rows = found["token_agreement"]
    assert all(row["same"] and row["agree"] == sm.TINY.new_tokens for row in rows)
    assert {row["cache"] for row in rows} == {"dynamic", "static", "bounded", "bounded, past"}
    assert {row["against"] for row in rows} == {"sdpa", "eager"}
    assert {row["implementation"] for row in rows} == {"attn_ladder", "sdpa"}
    assert found["memory"]["expanded_bytes"] == 3 * found["memory"]["cache_bytes"]
    speed = {(row["kind"], row["implementation"]) for row in found["speed"]}
    assert len(speed) == 4 and all("tokens_per_s" in row for row in found["speed"])
    assert "2 of 2 prompts the same" in done.stdout


def rows(*margins):
    """Reference logits whose second token is behind the first by so much."""
    logits = torch.zeros(len(margins), 5)
    for step, margin in enumerate(margins):
        logits[step, 1], logits[step, 2] = 20.0, 20.0 - margin
    return logits.argmax(-1), logits


def agreement(logits, want, want_logits, exact=None, references=()):
    """With exact logits that are the reference's, unless others are given."""
    judge = lambda step: ((want_logits if exact is None else exact)[step], list(references))  # noqa: E731
    return st.agreement(logits.argmax(-1), logits, want, want_logits, torch.bfloat16, judge)


def test_a_difference_within_rounding_is_a_tie_and_a_larger_one_is_not():
    want, want_logits = rows(5.0, 0.125, 5.0)
    assert agreement(want_logits, want, want_logits) == {"same": True, "agree": 3}
    logits, exact = want_logits.clone(), want_logits.clone()
    logits[1, 1] -= 0.25  # two units of bf16 at 20
    exact[1, 1] -= 0.0625  # the reference is off by as much, the margin is half of that
    exact[1, 3] += 0.125
    found = agreement(logits, want, want_logits, exact)
    assert not found["same"] and found["tie"] and found["agree"] == 1
    assert found["margin"] == found["ulp"] == 0.125 and found["rounding"] == 0.25
    figures = {name: found[name] for name in ("exact_margin", "logit_error", "reference_error")}
    assert figures == {"exact_margin": 0.0625, "logit_error": 0.1875, "reference_error": 0.125}
    # our logits further from the exact ones than twice the references': no tie
    far = logits.clone()
    far[1, 4] = 0.3
    assert not agreement(far, want, want_logits, exact)["tie"]
    # unless the other reference is as far
    other = want_logits[1].clone()
    other[4] = 0.2
    assert agreement(far, want, want_logits, exact, [other])["tie"]
    # a margin that rounding does not explain
    wrong = want_logits.clone()
    wrong[0, 1] = 0.0
    found = agreement(wrong, want, want_logits, exact)
    assert found["agree"] == 0 and found["exact_margin"] == 5.0 and not found["tie"]


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
def test_an_attention_that_forgets_a_key_gives_no_tie():
    """`sdpa` without the first key's value against `sdpa` and `eager`, by a random model in bf16;
    what these two make of each other is a tie, if it is not the same."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def forgets(module, query, key, value, *arguments, **more):
        value = value.clone()
        value[:, :, 0] = 0
        return sdpa_attention_forward(module, query, key, value, *arguments, **more)

    AttentionInterface.register("forgets", forgets)
    AttentionMaskInterface.register("forgets", sdpa_mask)
    runner = sm.Runner(sm.tiny_llama().bfloat16(), list(range(2, 97)) * 3, sm.TINY)
    judge, wrong, right = st.Judge(runner), [], []
    for ids in runner.prompts(tuple(range(3, 23))):
        mask = torch.ones_like(ids)
        taken = {n: runner.greedy(n, ids, mask, "dynamic") for n in ("forgets", *st.REFERENCES)}
        want, want_logits = (x[0] for x in taken["sdpa"])
        for name, found in (("forgets", wrong), ("eager", right)):
            tokens, logits = (x[0] for x in taken[name])
            row = st.agreement(
                tokens, logits, want, want_logits, torch.bfloat16,
                lambda step, ids=ids, want=want: judge(torch.cat([ids, want[None, :step]], 1)),
            )  # fmt: skip
            found.append(row)
    assert not any(row.get("tie") for row in wrong) and not all(row["same"] for row in wrong)
    assert all(row["same"] or row["tie"] for row in right)


def test_the_shares_of_the_cases_are_all_of_them_once():
    cases = [("batch of all", i, "dynamic") for i in range(2)] + [("alone", 5, "static")]
    cases += [("alone", i, "dynamic") for i in range(20)]
    parts = [st.shared(cases, k, 3) for k in range(3)]
    assert sorted(map(str, sum(parts, []))) == sorted(map(str, cases))
    assert [len(part) for part in parts] == [3, 10, 10] and st.shared(cases, 0, 1) == cases


def test_calls_are_timed_in_turn_and_what_fails_is_told():
    made, chosen = [], []

    def fails():
        made.append("c")
        if made.count("c") == 2:
            raise RuntimeError("no")

    calls = {"a": lambda: made.append("a"), "b": lambda: made.append("b"), "c": fails}
    found, errors = sm.timed_in_turn(torch.device("cpu"), calls, chosen.append, 4)
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 4, "b": 4}
    assert list(errors) == ["c"] and errors["c"].startswith("RuntimeError: no")
    assert made == chosen and len(made) == 12  # every round, and the failing one twice
    assert all(sorted(made[i : i + 3]) == ["a", "b", "c"] for i in (0, 3))
    assert len({tuple(made[i : i + 2]) for i in (6, 8, 10)} | {tuple(made[:3])}) > 1


def side_by_side(monkeypatch, tmp_path, ends):
    """The report of processes that end as `ends` says, by number format and share: with an exit
    status, None for one that hangs, or what it writes of its end; others are fine."""
    killed = []

    class Worker:
        def __init__(self, command):
            out, dtype, share = (
                command[command.index(name) + 1] for name in ("--out", "--dtype", "--tokens")
            )
            self.place = (dtype, share)
            self.end = ends.get(self.place, {})
            if isinstance(self.end, dict):
                row = {"case": share, "dtype": dtype}
                with open(out, "w") as handle:
                    json.dump({"token_agreement": [row], "stopped": None, **self.end}, handle)

        def wait(self, timeout=None):
            if self.end is None and self.place not in killed:
                raise subprocess.TimeoutExpired("x", timeout)
            return 0 if isinstance(self.end, dict) else self.end

        def kill(self):
            killed.append(self.place)

    monkeypatch.setattr(sm.subprocess, "Popen", Worker)
    report = sm.Report(None, 100.0)
    report.data = {"token_agreement": []}
    options = sm.argparse.Namespace(out=tmp_path / "out.json", device="cuda", model="m.gguf")
    sm.tokens_side_by_side(report, options)
    every = [(dtype, f"{k}/3") for dtype in sm.DTYPES for k in range(3)]
    assert sorted(killed) == sorted(every) and not list(tmp_path.iterdir())
    found = [(row["dtype"], row["case"]) for row in report.data["token_agreement"]]
    assert found == [place for place in every if isinstance(ends.get(place, {}), dict)]
    return report.data.get("error")


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (-9, "ended with exit status -9"),
        (1, "ended with exit status 1"),
        (None, "did not end within 100 s"),
        ({"error": "out of memory"}, "out of memory"),
        ({"stopped": "the rest at 9 s"}, "the rest at 9 s"),
    ],
)
def test_processes_side_by_side_give_one_report(monkeypatch, tmp_path, end, said):
    assert side_by_side(monkeypatch, tmp_path, {}) is None
    found = side_by_side(monkeypatch, tmp_path, {("float16", "1/3"): end})
    assert found == f"tokens in float16, part 1: {said}"


def test_a_rewound_static_cache_takes_the_next_token_where_it_was():
    from transformers import StaticCache

    model = sm.tiny_llama()
    cache = StaticCache(config=model.config, max_cache_len=8)
    ids = torch.arange(2, 7)[None]
    with torch.no_grad():
        model(ids, past_key_values=cache)
        first = model(ids[:, :1], past_key_values=cache).logits
        kept = [layer.keys.clone() for layer in cache.layers]
        sm.rewind(cache, 5)
        again = model(ids[:, :1], past_key_values=cache).logits
    assert torch.equal(first, again) and int(cache.get_seq_length()) == 6
    assert all(torch.equal(a, layer.keys) for a, layer in zip(kept, cache.layers, strict=True))


def test_the_prompts_are_of_the_suite_and_padding_is_on_the_left():
    assert len(sm.LENGTHS) >= 20 and min(sm.LENGTHS) == 1 and max(sm.LENGTHS) == 2048
    assert sm.REAL.new_tokens == 64

    class Model:
        class config:  # noqa: N801
            pad_token_id = 0

        def parameters(self):
            yield torch.empty(1)

    runner = sm.Runner(Model(), list(range(1, 60)), sm.TINY)
    prompts = runner.prompts((1, 5, 100))
    assert [prompt.shape for prompt in prompts] == [(1, 1), (1, 5), (1, 100)]
    assert all((prompt > 0).all() for prompt in prompts)
    ids, mask = runner.padded(prompts)
    assert ids.shape == (3, 100) and mask.sum(1).tolist() == [1, 5, 100]
    assert torch.equal(ids[1, 95:], prompts[1][0]) and not ids[1, :95].any()


def test_a_difference_shows_in_the_table():
    row = {
        "case": "alone", "cache": "dynamic", "against": "sdpa", "prompt_tokens": 7, "same": False,
        "agree": 3, "margin": 2.0, "rounding": 0.1, "ulp": 0.125, "tie": False,
        "exact_margin": 1.9, "logit_error": 0.1, "reference_error": 0.1,
    }  # fmt: skip
    data = {"token_agreement": [row], "speed": [], "elapsed_s": 1.0}
    text = sm.table(data)
    assert "0 of 1 prompts the same, 0 ties, 1 different" in text and "differs at 3" in text
