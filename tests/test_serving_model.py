"""A model on these kernels through transformers: the GPU script, in small on the CPU."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from attn_profiling import serving_model as sm


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


def test_a_difference_within_rounding_is_a_tie_and_a_larger_one_is_not():
    want, want_logits = rows(5.0, 0.125, 5.0)
    same = sm.agreement(want, want_logits, want, want_logits, torch.bfloat16)
    assert same == {"same": True, "agree": 3}
    logits = want_logits.clone()
    logits[1, 1] -= 0.25  # two units of bf16 at 20
    found = sm.agreement(logits.argmax(-1), logits, want, want_logits, torch.bfloat16)
    assert not found["same"] and found["tie"] and found["agree"] == 1
    assert found["margin"] == found["ulp"] == 0.125 and found["rounding"] == 0.25
    # the same step in fp16, whose unit there is an eighth of that
    assert not sm.agreement(logits.argmax(-1), logits, want, want_logits, torch.float16)["tie"]
    wrong = want_logits.clone()
    wrong[0, 1] = 0.0
    found = sm.agreement(wrong.argmax(-1), wrong, want, want_logits, torch.bfloat16)
    assert not found["tie"] and found["agree"] == 0 and found["margin"] == 5.0


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
    }  # fmt: skip
    data = {"token_agreement": [row], "speed": [], "elapsed_s": 1.0}
    text = sm.table(data)
    assert "0 of 1 prompts the same, 0 ties, 1 different" in text and "differs at 3" in text
