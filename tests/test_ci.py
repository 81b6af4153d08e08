"""What continuous integration enforces beside the tests."""

import re
import subprocess
from pathlib import Path

import pytest

TEXT = (Path(__file__).resolve().parents[1] / ".ci" / "run").read_text()


@pytest.mark.parametrize(("seconds", "status"), [(300, 0), (301, 1)])
def test_a_step_that_takes_longer_than_its_limit_fails(seconds, status):
    (function,) = re.findall(r"^within\(\) \{.*?^\}$", TEXT, re.MULTILINE | re.DOTALL)
    code = f'set -euo pipefail\n{function}\nwithin {seconds} 300 "A step"\n'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert done.returncode == status
    assert ("TOO SLOW: A step" in done.stderr) == bool(status)


def test_both_runs_are_held_to_their_limit():
    limits = dict(re.findall(r"(\w+)_limit=(\d+)", TEXT))
    assert limits == {"replay": "300", "again": "15"}
    assert all(re.search(rf"^within .*\${name}_limit ", TEXT, re.MULTILINE) for name in limits)
