"""The flush that reads: under Triton's interpreter it sees every word and changes none."""

import os
import subprocess
import sys

SCRIPT = """
import torch
from attn_profiling.clean_flush import reader

words = torch.arange(10_001, dtype=torch.int32)
out = torch.full((3,), -1, dtype=torch.int32)
reader(words, out)()
assert out.sum() == words.sum() == 10_000 * 10_001 // 2, out
assert (out > 0).all() and torch.equal(words, torch.arange(10_001, dtype=torch.int32))
"""


def test_every_word_is_read_and_none_is_written():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
