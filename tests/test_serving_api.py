"""`attention_with_kvcache` and `attention_varlen` on a CPU: what they refuse, and what they say."""

import pytest
import torch

import attn_ladder
from attn_ladder import serving
from attn_ladder.decode import CACHE, Config, plan


@pytest.fixture
def interpreted(monkeypatch):
    """CPU tensors pass the checks, as under the interpreter; the kernels are replaced."""
    calls = []

    def launch(q, k, v, **arguments):
        calls.append((q, k, v, arguments))
        return torch.zeros_like(q), torch.zeros(q.shape[0], q.shape[2], q.shape[1])

    monkeypatch.setattr(serving, "INTERPRETED", True)
    monkeypatch.setattr(serving, "_ACCEPTED", set())
    monkeypatch.setattr(serving.kernels, "launch", launch)
    return calls


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def call(**changes):
    half = dict(dtype=torch.float16)
    arguments = {
        "q": torch.ones(2, 1, 4, 64, **half),
        "k_cache": torch.ones(2, 32, 2, 64, **half),
        "v_cache": torch.ones(2, 32, 2, 64, **half),
        "k": torch.ones(2, 1, 2, 64, **half),
        "v": torch.ones(2, 1, 2, 64, **half),
        "cache_seqlens": ints(3, 31),
        **changes,
    }
    positional = [arguments.pop(name) for name in ("q", "k_cache", "v_cache")]
    return positional, arguments


def ones(*shape, dtype=torch.float16):
    return torch.ones(*shape, dtype=dtype)


pages = dict(k_cache=ones(5, 16, 2, 64), v_cache=ones(5, 16, 2, 64))
WRONG = {
    "no tensor": (dict(k_cache=[1]), ValueError, r"k_cache=\[1\]"),
    "dims": (dict(q=ones(2, 4, 64)), ValueError, r"q\.shape=\(2, 4, 64\)"),
    "caches differ": (dict(v_cache=ones(2, 31, 2, 64)), ValueError, r"v_cache\.shape=\(2, 31"),
    "heads": (dict(q=ones(2, 1, 3, 64)), ValueError, "nheads=3 of q must be a multiple"),
    "headdim of the cache": (
        dict(k_cache=ones(2, 32, 2, 128)),
        ValueError,
        "must have the headdim",
    ),
    "headdim": (
        dict(q=ones(2, 1, 4, 96)),
        NotImplementedError,
        r"headdim=96 is not supported; \(64, 128",
    ),
    "dtype": (dict(k_cache=ones(2, 32, 2, 64).bfloat16()), ValueError, r"k_cache\.dtype"),
    "integers": (dict(q=ones(2, 1, 4, 64).int()), ValueError, r"q\.dtype=torch\.int32"),
    "device": (
        dict(v=torch.ones(2, 1, 2, 64, dtype=torch.float16, device="meta")),
        ValueError,
        r"v\.device=meta",
    ),
    "empty": (dict(q=ones(2, 0, 4, 64)), ValueError, r"q\.shape=\(2, 0, 4, 64\)"),
    "batch of the cache": (
        dict(k_cache=ones(3, 32, 2, 64), v_cache=ones(3, 32, 2, 64)),
        ValueError,
        r"k_cache\.shape\[0\]=3.*cache_batch_idx",
    ),
    "k alone": (dict(v=None), ValueError, "v=None but k is given"),
    "v differs from k": (dict(v=ones(2, 2, 2, 64)), ValueError, r"v\.shape=\(2, 2, 2, 64\)"),
    "new heads": (
        dict(k=ones(2, 1, 4, 64), v=ones(2, 1, 4, 64)),
        ValueError,
        r"k\.shape=\(2, 1, 4",
    ),
    "cache not contiguous": (
        dict(k_cache=ones(2, 32, 2, 128)[..., ::2]),
        ValueError,
        r"k_cache\.stride\(-1\)=2",
    ),
    "lengths": (dict(cache_seqlens=ints(1)), ValueError, r"cache_seqlens\.shape=\(1,\)"),
    "long lengths": (dict(cache_seqlens=ints(1, 2).long()), ValueError, r"cache_seqlens\.dtype"),
    "beyond the capacity": (
        dict(cache_seqlens=ints(1, 32)),
        ValueError,
        r"=\[1, 32\] must be in 0..31",
    ),
    "negative": (dict(cache_seqlens=ints(-1, 2)), ValueError, r"cache_seqlens=\[-1, 2\]"),
    "one int too large": (dict(cache_seqlens=40), ValueError, r"cache_seqlens=\[40, 40\]"),
    "a bool": (dict(cache_seqlens=True), ValueError, "cache_seqlens=True"),
    "row": (dict(cache_batch_idx=ints(0, 2)), ValueError, r"cache_batch_idx=\[0, 2\]"),
    "page size": (dict(block_table=ints(0, 1).view(2, 1)), NotImplementedError, "page size 32"),
    "page": (
        dict(**pages, block_table=ints(0, 9, 1, 5).view(2, 2)),
        ValueError,
        r"block_table\[1\]",
    ),
    "rows twice": (
        dict(cache_batch_idx=ints(1, 1)),
        ValueError,
        r"cache_batch_idx=\[1, 1\] must differ",
    ),
    "a page of two sequences": (
        dict(**pages, block_table=ints(0, 1, 2, 1).view(2, 2), cache_seqlens=ints(16, 17)),
        ValueError,
        "sequences 0 and 1 both append to page 1",
    ),
    "more new keys than the cache holds": (
        dict(k=ones(2, 33, 2, 64), v=ones(2, 33, 2, 64), cache_seqlens=ints(0, 0)),
        ValueError,
        r"k\.shape=\(2, 33, 2, 64\)",
    ),
    "an expanded cache": (
        dict(v_cache=ones(1, 32, 2, 64).expand(2, 32, 2, 64)),
        ValueError,
        r"v_cache\.stride\(\)=\(0, 128, 64, 1\) repeats",
    ),
    "too long": (
        dict(
            k_cache=ones(1, 1, 1, 64).expand(2, 2**30, 2, 64),
            k=None,
            v=None,
            v_cache=ones(1, 1, 1, 64).expand(2, 2**30, 2, 64),
        ),
        NotImplementedError,
        "1073741824 keys",
    ),
    "rows and pages": (
        dict(**pages, block_table=ints(0, 1, 2, 3).view(2, 2), cache_batch_idx=ints(0, 1)),
        ValueError,
        "cache_batch_idx must be None",
    ),
    "causal": (dict(causal=1), ValueError, "causal=1"),
    "scale": (dict(softmax_scale=float("nan")), ValueError, "softmax_scale=nan"),
    "validate": (dict(validate=1), ValueError, "validate=1"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("function", [attn_ladder.attention_with_kvcache, attn_ladder.explain])
def test_wrong_input_is_named_with_its_value(interpreted, case, function):
    changes, error, message = WRONG[case]
    positional, arguments = call(**changes)
    with pytest.raises(error, match=message):
        function(*positional, **arguments)
    assert not interpreted


def test_bf16_is_refused_where_the_interpreter_would_compute_it_wrongly(interpreted, monkeypatch):
    q, k = ones(1, 1, 4, 64).bfloat16(), ones(1, 32, 2, 64).bfloat16()
    with pytest.raises(NotImplementedError, match=r"q\.dtype=torch\.bfloat16: Triton's interp"):
        serving.check_tensors(q, {"k_cache": k}, 4)
    serving.check_tensors(q.half(), {"k_cache": k.half()}, 4)
    monkeypatch.setattr(serving, "INTERPRETED", False)
    monkeypatch.setattr(serving, "capability", lambda device: (9, 0))
    serving.check_tensors(q, {"k_cache": k}, 4)


def test_right_input_is_not_refused(interpreted):
    positional, arguments = call()
    out, lse = attn_ladder.attention_with_kvcache(*positional, **arguments, return_lse=True)
    assert out.shape == (2, 1, 4, 64) and lse.shape == (2, 4, 1)
    q, k_cache, _, given = interpreted[0]
    assert k_cache.data_ptr() == positional[1].data_ptr()  # never a copy
    assert given["bounds"].tolist() == [3, 31]


def test_what_was_accepted_once_is_checked_again_where_it_differs(interpreted):
    """The checks of a call's shape are remembered; values and everything else are not."""
    positional, arguments = call()
    for _ in range(2):
        attn_ladder.attention_with_kvcache(*positional, **arguments)
    assert len(interpreted) == 2
    for case in WRONG.values():
        changes, error, message = case
        positional, arguments = call(**changes)
        with pytest.raises(error, match=message):
            attn_ladder.attention_with_kvcache(*positional, **arguments)
    positional, arguments = call(q=ones(2, 1, 4, 64).requires_grad_())
    with torch.no_grad():
        attn_ladder.attention_with_kvcache(*positional, **arguments)
    with pytest.raises(NotImplementedError, match=r"q\.requires_grad"):
        attn_ladder.attention_with_kvcache(*positional, **arguments)


def test_one_length_for_all(interpreted):
    positional, arguments = call(cache_seqlens=7)
    attn_ladder.attention_with_kvcache(*positional, **arguments)
    assert interpreted[0][3]["bounds"].tolist() == [7, 7]


def test_a_cpu_tensor_is_refused_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match=r"block_table\.device=cpu"):
        serving._here("block_table", ints(1), torch.device("cuda:0"))
    x = ints(1, 2)
    assert serving._here("block_table", x, x.device) is x


def test_a_page_beyond_the_length_may_be_anything(interpreted):
    positional, arguments = call(**pages, block_table=ints(0, 9, 1, 2).view(2, 2))
    attn_ladder.attention_with_kvcache(*positional, **arguments)
    assert interpreted


def test_sequences_may_share_pages_that_are_only_read(interpreted):
    table = ints(0, 1, 0, 2).view(2, 2)
    positional, arguments = call(**pages, block_table=table, cache_seqlens=ints(16, 20))
    attn_ladder.attention_with_kvcache(*positional, **arguments)
    assert interpreted


def test_rows_may_repeat_where_nothing_is_appended(interpreted):
    positional, arguments = call(cache_batch_idx=ints(1, 1), k=None, v=None)
    attn_ladder.attention_with_kvcache(*positional, **arguments)
    assert interpreted


def test_gradients_are_refused_unless_switched_off(interpreted):
    positional, arguments = call(q=ones(2, 1, 4, 64).requires_grad_())
    with pytest.raises(NotImplementedError, match=r"q\.requires_grad=True"):
        attn_ladder.attention_with_kvcache(*positional, **arguments)
    with torch.no_grad():
        attn_ladder.attention_with_kvcache(*positional, **arguments)


def test_a_cpu_tensor_is_refused_without_the_interpreter():
    positional, arguments = call()
    with pytest.raises(ValueError, match="q.device=cpu"):
        attn_ladder.attention_with_kvcache(*positional, **arguments)


def test_an_old_gpu_is_refused(interpreted, monkeypatch):
    positional, arguments = call()
    monkeypatch.setattr(serving, "INTERPRETED", False)
    monkeypatch.setattr(serving, "capability", lambda device: (7, 5))
    with pytest.raises(NotImplementedError, match="7.5"):
        attn_ladder.explain(*positional, **arguments)
    monkeypatch.setattr(serving, "capability", lambda device: (8, 0))
    assert attn_ladder.explain(*positional, **arguments).subject == "decode"


def test_validation_is_refused_while_a_graph_is_captured(interpreted, monkeypatch):
    positional, arguments = call(validate=True)
    attn_ladder.attention_with_kvcache(*positional, **arguments)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="validate=True synchronises"):
        attn_ladder.attention_with_kvcache(*positional, **arguments)


def test_explain_tells_the_kernel_its_splits_and_the_copies(interpreted):
    positional, arguments = call()
    text = str(attn_ladder.explain(*positional, **arguments))
    assert "kernel: decode" in text and "max_splits=128" in text and "copied: nothing" in text
    positional, arguments = call(q=ones(2, 1, 4, 128)[..., ::2])
    copies = attn_ladder.explain(*positional, **arguments).copies
    assert list(copies) == ["q"] and "stride 2" in copies["q"]
    table = ints(0, 1, 2, 3).view(2, 2).T
    positional, arguments = call(**pages, block_table=table)
    assert (
        "strides are (1, 2)" in attn_ladder.explain(*positional, **arguments).copies["block_table"]
    )


def test_explain_tells_of_lengths_that_are_brought_to_the_device():
    q, k = (torch.empty(2, 1, heads, 64, device="meta") for heads in (4, 2))
    lens = ints(1, 2)
    route = serving._route(q, k, k, 1, CACHE, {"cache_seqlens": lens}, None)
    assert "it is on cpu" in route.copies["cache_seqlens"]


RAGGED_WRONG = {
    "dims": (dict(q=ones(1, 6, 4, 64)), r"q\.shape=\(1, 6, 4, 64\)"),
    "keys differ": (dict(v=ones(5, 2, 64)), r"v\.shape=\(5, 2, 64\)"),
    "batches differ": (dict(cu_seqlens_k=ints(0, 6)), r"cu_seqlens_k\.shape=\(2,\)"),
    "no batch": (dict(cu_seqlens_q=ints(0), cu_seqlens_k=ints(0)), r"cu_seqlens_q\.shape=\(1,\)"),
    "falling": (dict(cu_seqlens_q=ints(0, 7, 6)), r"cu_seqlens_q=\[0, 7, 6\]"),
    "not all": (dict(cu_seqlens_k=ints(0, 2, 5)), r"cu_seqlens_k=\[0, 2, 5\]"),
    "longest": (dict(max_seqlen_q=3), "max_seqlen_q=3 is less than 4"),
    "no length": (dict(max_seqlen_k=0), "max_seqlen_k=0"),
}


@pytest.mark.parametrize("case", [*RAGGED_WRONG, "nothing"])
@pytest.mark.parametrize("function", [attn_ladder.attention_varlen, attn_ladder.explain])
def test_wrong_ragged_input_is_named(interpreted, monkeypatch, case, function):
    monkeypatch.setattr(
        serving.kernels, "launch", lambda q, *a, **k: (torch.zeros_like(q), q.new_zeros(4, 6))
    )
    changes, message = RAGGED_WRONG.get(case, ({}, None))
    arguments = {
        "q": ones(6, 4, 64), "k": ones(6, 2, 64), "v": ones(6, 2, 64),
        "cu_seqlens_q": ints(0, 2, 6), "cu_seqlens_k": ints(0, 2, 6),
        "max_seqlen_q": 4, "max_seqlen_k": 4, **changes,
    }  # fmt: skip
    positional = [arguments.pop(name) for name in ("q", "k", "v")]
    if message is None:
        function(*positional, **arguments)
        return
    with pytest.raises(ValueError, match=message):
        function(*positional, **arguments)


def test_the_split_policy_knows_neither_batch_nor_capacity():
    assert set(plan.__wrapped__.__annotations__) == {
        "seqlen_q", "nheads", "nheads_k", "headdim", "return"
    }  # fmt: skip
    for nheads, nheads_k in ((32, 8), (32, 32), (9, 3), (16, 1), (16, 16)):
        config = plan(1, nheads, nheads_k, 64)
        assert config.max_splits * nheads_k <= 256
        assert config.min_split >= 16 * nheads // nheads_k
    assert plan(4096, 32, 8, 128).max_splits == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [({"BLOCK_M": 48}, "BLOCK_M=48"), ({"min_split": 65}, "=65"), ({"max_splits": 0}, "=0")],
)
def test_a_wrong_config_is_refused(change, message):
    right = dict(
        BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=3, max_splits=8, min_split=64
    )  # fmt: skip
    Config(**right)
    with pytest.raises(ValueError, match=message):
        Config(**{**right, **change})
