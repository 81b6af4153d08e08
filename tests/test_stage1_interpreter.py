"""Stage 1 under Triton's interpreter, on the CPU, against the fp32 reference.

The interpreter and the compiler cannot share a process, and the interpreter computes bf16 wrongly,
so the cases run in one subprocess, in fp16 and fp32.
"""

import json
import os
import subprocess
import sys

import pytest

CASES = [
    # dtype, batch, seqlen_q, seqlen_k, nheads, nheads_k, headdim, causal, scale of the scores
    ("fp16", 1, 128, 128, 2, 2, 64, True, 1.0),
    ("fp16", 2, 100, 257, 2, 1, 64, True, 1.0),
    ("fp32", 1, 257, 100, 2, 2, 64, True, 1.0),
    ("fp32", 1, 1, 1, 1, 1, 64, True, 1.0),
    ("fp32", 1, 1, 300, 4, 2, 128, False, 1.0),
    ("fp16", 1, 130, 130, 1, 1, 128, False, 8.0),
    ("fp32", 1, 65, 129, 3, 1, 80, True, 30.0),
]

SCRIPT = """
import json, sys, torch
from attn_ladder.reference import attention_reference, error_bound
from attn_ladder.stage1_fused import forward
empty = torch.empty
torch.empty = lambda *a, **k: empty(*a, **k).fill_(float("nan"))
results = []
for dtype, b, sq, sk, h, hk, d, causal, scale in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    kind = {"fp16": torch.float16, "fp32": torch.float32}[dtype]
    q, k, v = torch.randn(b, sq, h, d), torch.randn(b, sk, hk, d), torch.randn(b, sk, hk, d)
    q, k, v = (q * scale).to(kind), k.to(kind), v.to(kind)
    if sys.argv[2] == "planted":
        softmax_scale = 1.1 * d**-0.5
    else:
        softmax_scale = None
    out, lse = forward(q, k, v, causal=causal, softmax_scale=softmax_scale)
    ref, ref_lse = attention_reference(q, k, v, causal=causal)
    low, _ = attention_reference(q, k, v, causal=causal, upcast=False)
    bound, _ = error_bound(ref, low)
    finite = torch.isfinite(ref_lse)
    lse_ok = torch.equal(torch.isfinite(lse), finite)
    lse_ok = lse_ok and torch.allclose(lse[finite], ref_lse[finite], atol=2e-3)
    error = (out.float() - ref).abs().max().item()
    allowance = 1e-4 if dtype == "fp32" else 0.0  # the rule compares roundings of a 16-bit type
    results.append([error <= bound + allowance, bool(lse_ok), error, bound])
print(json.dumps(results))
"""


def run(cases: list, mode: str) -> list:
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(cases), mode],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def outcome() -> list:
    return run(CASES, "plain")


@pytest.mark.parametrize("index", range(len(CASES)))
def test_matches_the_reference(outcome: list, index: int) -> None:
    out_ok, lse_ok, error, bound = outcome[index]
    assert out_ok, f"{CASES[index]}: error {error} exceeds {bound}"
    assert lse_ok, f"{CASES[index]}: log-sum-exp differs"


def test_a_wrong_scale_is_caught() -> None:
    out_ok, lse_ok, *_ = run(CASES[:1], "planted")[0]
    assert not out_ok
    assert not lse_ok
