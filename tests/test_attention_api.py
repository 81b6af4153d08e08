"""The public entry point, on a CPU: what it refuses and how, and what it says it would run."""

import math
import subprocess
import sys

import pytest
import torch

from attn_ladder import dispatch


def make(batch=2, seqlen=256, nheads=4, headdim=64, dtype=torch.bfloat16):
    return torch.ones(batch, seqlen, nheads, headdim, dtype=dtype)


@pytest.fixture
def gpu(monkeypatch):
    """A CPU tensor passes for one on an H100; stage 5 is replaced by a recorder."""
    calls = []

    def install(capability=(9, 0)):
        from attn_ladder import stage1_fused, stage5_everything

        dispatch.route.cache_clear()
        monkeypatch.setattr(dispatch, "capability", lambda device: capability)
        monkeypatch.setattr(dispatch, "num_sms", lambda device: 132)
        for module in (stage1_fused, stage5_everything):

            def forward(q, k, v, *, softmax_scale=None, causal=False, name=module.__name__):
                calls.append((name.rsplit(".")[-1], q, k, v, softmax_scale, causal))
                batch, seqlen_q, nheads, _ = q.shape
                return torch.zeros_like(q), torch.zeros(batch, nheads, seqlen_q)

            monkeypatch.setattr(module, "forward", forward)
        return calls

    yield install
    dispatch.route.cache_clear()


def test_the_package_loads_neither_torch_nor_triton():
    code = "import sys, attn_ladder; print([m for m in ('torch', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    code = "import sys, attn_ladder; attn_ladder.attention; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_an_unknown_name_is_an_attribute_error():
    import attn_ladder

    with pytest.raises(AttributeError, match="atention"):
        _ = attn_ladder.atention


WRONG = {
    "q is no tensor": (lambda q, k, v: ([1], k, v), {}, ValueError, r"q=\[1\]"),
    "q has three dimensions": (lambda q, k, v: (q[0], k, v), {}, ValueError, r"q\.shape=\(256,"),
    "v differs from k": (lambda q, k, v: (q, k, v[:, 1:]), {}, ValueError, r"v\.shape=\(2, 255,"),
    "batch": (lambda q, k, v: (q, k[:1], v[:1]), {}, ValueError, r"k\.shape\[0\]=1"),
    "headdim": (lambda q, k, v: (q, k[..., :32], v[..., :32]), {}, ValueError, r"=32 must be"),
    "no batch": (lambda q, k, v: (q[:0], k[:0], v[:0]), {}, ValueError, "batch=0"),
    "no query": (lambda q, k, v: (q[:, :0], k, v), {}, ValueError, "seqlen_q=0"),
    "no key": (lambda q, k, v: (q, k[:, :0], v[:, :0]), {}, ValueError, "seqlen_k=0"),
    "heads": (lambda q, k, v: (q, k[:, :, :3], v[:, :, :3]), {}, ValueError, "nheads_k=3"),
    "dtypes": (lambda q, k, v: (q, k.half(), v), {}, ValueError, r"k\.dtype=torch\.float16"),
    "integers": (lambda q, k, v: (q.int(), k, v), {}, ValueError, r"q\.dtype=torch\.int32"),
    "fp32": (lambda q, k, v: (q.float(), k, v), {}, NotImplementedError, r"torch\.float32"),
    "sparse": (lambda q, k, v: (q.to_sparse(), k, v), {}, NotImplementedError, r"torch\.sparse"),
    "causal": (lambda q, k, v: (q, k, v), {"causal": 1}, ValueError, "causal=1"),
    "nan": (lambda q, k, v: (q, k, v), {"softmax_scale": math.nan}, ValueError, "=nan"),
    "text": (lambda q, k, v: (q, k, v), {"softmax_scale": "x"}, ValueError, "softmax_scale='x'"),
    "negative": (lambda *t: t, {"softmax_scale": -1.0}, NotImplementedError, "scale=-1.0"),
    "tiny": (lambda *t: t, {"softmax_scale": 1e-46}, ValueError, "softmax_scale=1e-46"),
    "vast": (lambda *t: t, {"softmax_scale": 1e39}, ValueError, r"softmax_scale=1e\+39"),
    "zero": (lambda *t: t, {"softmax_scale": 0}, NotImplementedError, "softmax_scale=0"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("function", [dispatch.attention, dispatch.explain])
def test_wrong_input_is_named_with_its_value(gpu, case, function):
    gpu()
    change, arguments, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        function(*change(make(), make(), make()), **arguments)


def test_right_input_is_not_refused(gpu):
    calls = gpu()
    out = dispatch.attention(make(), make(nheads=2), make(nheads=2), causal=True)
    assert out.shape == (2, 256, 4, 64)
    assert calls[0][0] == "stage5_everything" and calls[0][5] is True


def test_a_cpu_tensor_is_refused():
    with pytest.raises(ValueError, match="q.device=cpu"):
        dispatch.attention(make(), make(), make())


def test_a_large_headdim_is_refused_and_a_middle_one_falls_back(gpu):
    calls = gpu()
    wide = make(headdim=264)
    with pytest.raises(NotImplementedError, match="headdim=264"):
        dispatch.attention(wide, wide, wide)
    middle = make(headdim=96)
    dispatch.attention(middle, middle, middle)
    assert calls[0][0] == "stage1_fused"


def test_gradients_are_refused_unless_switched_off(gpu):
    gpu()
    k = make().requires_grad_()
    with pytest.raises(NotImplementedError, match="k.requires_grad=True"):
        dispatch.attention(make(), k, make())
    with torch.no_grad():
        dispatch.attention(make(), k, make())
    with torch.inference_mode():
        dispatch.attention(make(), k, make())


def test_other_gpus_run_stage_1_and_old_ones_are_refused(gpu):
    calls = gpu((8, 0))
    dispatch.attention(make(), make(), make())
    assert calls[0][0] == "stage1_fused"
    assert "stage1" in str(dispatch.explain(make(), make(), make()))
    gpu((7, 5))
    with pytest.raises(NotImplementedError, match="7.5"):
        dispatch.attention(make(), make(), make())


def test_without_a_fitting_triton_stage_1_runs_and_says_why(gpu, monkeypatch):
    calls = gpu()
    monkeypatch.setitem(sys.modules, "attn_ladder.stage5_everything", None)
    monkeypatch.delattr("attn_ladder.stage5_everything")
    dispatch.attention(make(), make(), make())
    assert calls[0][0] == "stage1_fused"
    assert "stage5 cannot be imported" in str(dispatch.explain(make(), make(), make()))


def test_launching_needs_triton_3_6():
    code = "import triton; triton.__version__ = '3.8.0'; import attn_ladder.launch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "triton 3.6 is needed" in done.stderr


def test_an_h100_runs_stage_5_and_says_with_which_configuration(gpu):
    gpu()
    text = str(dispatch.explain(make(), make(), make(), causal=True))
    assert "stage5" in text and "dynamic" in text and "copied: nothing" in text


def test_return_lse(gpu):
    gpu()
    out, lse = dispatch.attention(make(), make(), make(), return_lse=True)
    assert out.shape == (2, 256, 4, 64) and lse.shape == (2, 4, 256)


IN_PLACE = {
    "transposed storage": torch.ones(2, 4, 256, 64, dtype=torch.bfloat16).transpose(1, 2),
    "slice of a longer row": torch.ones(2, 256, 4, 136, dtype=torch.bfloat16)[..., 8:72],
    "packed with others": torch.ones(2, 256, 12, 64, dtype=torch.bfloat16)[:, :, 4:8],
    "one batch, any stride": torch.ones(1, 256, 4, 64, dtype=torch.bfloat16).as_strided(
        (1, 256, 4, 64), (3, 256, 64, 1)
    ),
}
COPIED = {
    "strided last dimension": (
        torch.ones(2, 256, 4, 128, dtype=torch.bfloat16)[..., ::2],
        "last dimension has stride 2",
    ),
    "odd rows": (torch.ones(2, 256, 4, 65, dtype=torch.bfloat16)[..., :64], "multiples of 16"),
    "expanded heads": (
        torch.ones(2, 256, 1, 64, dtype=torch.bfloat16).expand(2, 256, 4, 64),
        "repeat",
    ),
    "odd address": (
        torch.ones(2 * 256 * 4 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 256, 4, 64),
        "address",
    ),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_what_the_kernel_can_read_is_not_copied(gpu, case):
    calls = gpu()
    x = IN_PLACE[case]
    assert not dispatch.explain(x, x, x).copies
    dispatch.attention(x, x, x)
    assert all(tensor is x for tensor in calls[0][1:4])


@pytest.mark.parametrize("case", COPIED)
def test_what_the_kernel_cannot_read_is_copied_and_explained(gpu, case):
    calls = gpu()
    x, reason = COPIED[case]
    y = make()
    copies = dispatch.explain(y, x, y).copies
    assert list(copies) == ["k"] and reason in copies["k"]
    dispatch.attention(y, x, y)
    _, q, k, v, *_ = calls[0]
    assert q is y and v is y
    assert k.is_contiguous() and k.data_ptr() % 16 == 0 and torch.equal(k, x)


def test_a_copy_is_not_remembered_for_an_aligned_address(gpu):
    calls = gpu()
    odd, _ = COPIED["odd address"]
    even = make()
    dispatch.attention(odd, odd, odd)
    dispatch.attention(even, even, even)
    assert calls[0][1] is not odd and calls[1][1] is even


HASHES = """
import functools, threading
import torch
import triton.runtime.cache as cache
calls, over = [], threading.Event()

@functools.lru_cache
def slow():
    calls.append(1)
    over.wait(60)

cache.triton_key = slow
from attn_ladder import dispatch
dispatch.capability = lambda device: (8, 0)
x = (torch.Size((1, 8, 1, 64)), (512, 64, 64, 1), torch.bfloat16, torch.device("cuda", 0))
threading.Timer(0.5, over.set).start()
dispatch.route(True, None, *x, *x, *x)
cache.triton_key()  # what compiling does
print(len(calls))
"""


@pytest.mark.parametrize(("waits", "times"), [(True, "1"), (False, "2")])
def test_tritons_hash_begins_with_the_import_and_is_not_made_twice(waits, times):
    code = HASHES if waits else HASHES.replace("dispatch.route", "# dispatch.route")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == times
