"""The host side of `decode_hopper`, and how its kernel deals out work, on a CPU.

Splits and items are device functions of plain arithmetic, run here in Python with a stand-in for
`gl`.
"""

import itertools
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_ladder import decode, decode_hopper, decode_launch
from attn_ladder.decode_hopper import Build, Config
from attn_ladder.decode_launch import build, choose_config, copy_reason, refusal, split_policy

NUM_SMS = 132
LIMIT = 256  # splits of a sequence in all key heads
thorough = settings(derandomize=True, deadline=None, max_examples=300)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def call(
    batch=3, seqlen_q=1, nheads=8, nheads_k=2, headdim=64, size=64, page=0, dtype=torch.float16,
    device="meta", **changes,
):  # fmt: skip
    """Arguments of `refusal`: q, k, v and the rest; a cache of `batch` rows or of pages. A change
    is a value, or a function of what it replaces."""
    cache = dict(size=(batch, page or size, nheads_k, headdim), dtype=dtype, device=device)
    arguments = {
        "q": torch.empty((batch, seqlen_q, nheads, headdim), dtype=dtype, device=device),
        "k": torch.empty(**cache),
        "v": torch.empty(**cache),
        "mode": decode.CACHE,
    }
    if page:
        arguments["block_table"] = torch.zeros((batch, size // page), dtype=torch.int32)
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return arguments


def why(**changes):
    return refusal(**call(**changes))


def wide(x, by=4):
    """`x` in rows that are longer by some elements."""
    return torch.empty((*x.shape[:-1], x.shape[-1] + by), dtype=x.dtype, device=x.device)[
        ..., : x.shape[-1]
    ]


def shifted(x):
    """`x` one element further in memory."""
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape)


def last_apart(x):
    return torch.empty((*x.shape, 8), dtype=x.dtype, device=x.device)[..., 0]


def one_for_all_heads(x):
    return x[:, :, :1].expand(x.shape)


GOOD = {
    "as it comes": {},
    "bf16": dict(dtype=torch.bfloat16),
    "headdim 128": dict(headdim=128),
    "16 rows of one token": dict(nheads=32),
    "16 tokens": dict(seqlen_q=16, nheads=2),
    "rows that are no power of two": dict(seqlen_q=3, nheads=10),
    "128 key heads": dict(nheads=128, nheads_k=128),
    "pages of 16": dict(page=16),
    "pages of 64": dict(page=64),
    "pages of 256": dict(page=256, size=512),
    "a range of the keys": dict(mode=decode.RANGE),
    "as many keys as there may be": dict(size=2**30 - 1),
    "rows of 144 bytes": dict(k=lambda x: wide(x, 8), v=lambda x: wide(x, 16)),
    "heads before keys": dict(k=lambda x: x.view(*x.shape[:1], 2, 64, 64).transpose(1, 2)),
}
REFUSED = {
    "ragged queries": (dict(mode=decode.VARLEN), "queries are ragged"),
    "fp32": (dict(dtype=torch.float32), "q.dtype=torch.float32"),
    "headdim 96": (dict(headdim=96), "headdim=96"),
    "headdim 256": (dict(headdim=256), "headdim=256"),
    "17 heads a key head": (dict(nheads=34), "17 query rows of a key head, more than 16"),
    "18 rows of two tokens": (dict(nheads=18, seqlen_q=2), "18 query rows"),
    "129 key heads": (dict(nheads=129, nheads_k=129), "nheads_k=129, more than 128"),
    "pages of 32": (dict(page=32), "page_size=32, none of (16, 64, 256)"),
    "pages of 128": (dict(page=128, size=256), "page_size=128"),
    "too many keys": (dict(size=2**30), "a capacity of 1073741824 keys"),
    "too many keys in pages": (
        dict(page=256, size=512, block_table=lambda x: x[:1, :1].expand(len(x), 2**22)),
        "a capacity of 1073741824 keys",
    ),
    "columns of the block table": (
        dict(page=16, block_table=lambda x: x.t().contiguous().t()),
        "a block table whose rows are not contiguous",
    ),
    "rows of k": (dict(k=wide), "the strides of k, (8704, 136, 68, 1), are not"),
    "rows of v": (dict(v=wide), "the strides of v, (8704, 136, 68, 1), are not"),
    "elements of k": (dict(k=last_apart), "the strides of k, (65536, 1024, 512, 8), are not"),
    "one v for all heads": (dict(v=one_for_all_heads), "the strides of v, (8192, 128, 0, 1)"),
    "address of k": (dict(device="cpu", k=shifted), "k is not aligned to 16 bytes"),
    "address of v": (dict(device="cpu", v=shifted), "v is not aligned to 16 bytes"),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_the_kernel_can_is_not_refused(name):
    assert why(**GOOD[name]) is None


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_why(name):
    changes, text = REFUSED[name]
    assert text in why(**changes)


def reasons(change, batches):
    """What is said in each batch, without the stride of the batch."""
    said = {str(why(**change, batch=batch)) for batch in batches}
    return {re.sub(r"\(\d+, ", "(batch, ", text) for text in said}


@pytest.mark.parametrize("name", [*GOOD, *REFUSED])
def test_a_refusal_never_depends_on_the_batch(name):
    change = GOOD[name] if name in GOOD else REFUSED[name][0]
    one = () if name == "columns of the block table" else (1,)  # which is a row, of one sequence
    assert len(reasons(change, (*one, 2, 3, 32, 33, 700))) == 1


def test_a_refusal_that_depends_on_the_batch_would_be_noticed():
    repeated = dict(k=lambda x: x[:1].expand(x.shape))  # which a batch of one does not
    assert len(reasons(repeated, (1, 3))) == 2


COPIED = {
    "address": (dict(device="cpu", q=shifted), "not aligned to 16 bytes"),
    "rows": (dict(q=wide), r"strides \(544, 544, 68, 1\)"),
    "tokens": (dict(q=lambda x: x.as_strided(x.shape, (512, 4, 64, 1))), r"strides \(512, 4,"),
    "batch": (dict(q=lambda x: x.as_strided(x.shape, (2**31, 512, 64, 1))), "are too large"),
}


@pytest.mark.parametrize("name", COPIED)
def test_queries_that_cannot_be_read_in_place_are_copied(name):
    changes, text = COPIED[name]
    assert re.search(text, copy_reason(call(**changes)["q"]))


@pytest.mark.parametrize(
    "change", [lambda x: x, lambda x: wide(x, 8), one_for_all_heads, lambda x: x[:, :, 2:]]
)
def test_queries_in_units_of_16_bytes_are_read_in_place(change):
    assert copy_reason(call(q=change)["q"]) is None


# What is compiled.


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (dict(BLOCK_N=32), "BLOCK_N=32"),
        (dict(BLOCK_N=96), "BLOCK_N=96"),
        (dict(num_buffers=1), "num_buffers=1"),
        (dict(ctas_per_sm=0), "ctas_per_sm=0"),
        (dict(ctas_per_sm=3), "ctas_per_sm=3"),
        (dict(min_split=384), "min_split=384"),
        (dict(min_split=0), "min_split=0"),
        (dict(min_split=64, BLOCK_N=128), "min_split=64"),
    ],
)
def test_a_bad_configuration_is_named_with_its_value(values, said):
    with pytest.raises(ValueError, match=said):
        Config(**values)


def test_good_configurations_are_taken():
    assert Config() == Config(64, 2, 2, 512)
    assert Config(BLOCK_N=128, num_buffers=3, ctas_per_sm=1, min_split=128).min_split == 128


def built(batch=1, rows=1, headdim=128, page=0, config=None):
    config = config or choose_config(headdim, 0)
    return build(config, headdim, page, False, False, batch, rows)


def test_a_build_has_room_for_the_batch_and_the_rows():
    sizes = {n: built(batch=n).batch for n in (1, 32, 33, 128, 129, 512)}
    assert sizes == {1: 32, 32: 32, 33: 128, 128: 128, 129: 512, 512: 512}
    assert {n: built(rows=n).rows for n in (1, 4, 5, 16)} == {1: 4, 4: 4, 5: 16, 16: 16}
    assert built() == Build(128, 0, False, False, 32, 4, 64, 2, decode_launch.POLICY)
    assert built(config=Config(evict_first=False)).policy == ""


def test_each_tma_load_gets_the_policy_and_nothing_else_does():
    load = (
        "@%p1 cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%r1], [%rd2, {%r3, %r4, %r5, %r6}], [%r7];"
    )
    other = (
        "ld.shared.b32 %r1, [%r2];\ncp.async.bulk.prefetch.tensor.4d.L2.global.tile [%rd2, {%r3}];"
    )
    lines = decode_launch.with_policy(f"{other}\n{load}\n{load}").splitlines()
    assert "\n".join(lines[:2]) == other and len(lines) == 4
    for line in lines[2:]:
        assert line.startswith("{ .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64")
        assert line.endswith(
            "bytes.L2::cache_hint [%r1], [%rd2, {%r3, %r4, %r5, %r6}], [%r7], policy; }"
        )
    with pytest.raises(ValueError, match="no TMA load in the PTX"):
        decode_launch.with_policy(other)


LOAD = "cp.async.bulk.tensor.4d.shared::cluster.global [%r1], [%rd2, {%r3}], [%r7];"


def stages_of_a_compilation(*_, **__):
    """What Triton does with its hook."""
    stages = {"ptx": lambda source, metadata: source}
    if (hook := triton.knobs.runtime.add_stages_inspection_hook) is not None:
        hook(None, stages, None, None, 90)
    return stages


@pytest.fixture
def hook(monkeypatch):
    """A hook that was there before: the names of the stages that it has seen."""
    seen = []
    monkeypatch.setattr(
        triton.knobs.runtime,
        "add_stages_inspection_hook",
        lambda backend, stages, *more: seen.append(sorted(stages)),
    )
    return seen


@pytest.mark.parametrize("wanted", [True, False])
def test_a_kernel_is_compiled_with_the_policy_that_it_asks_for(monkeypatch, hook, wanted):
    monkeypatch.setattr(triton, "compile", stages_of_a_compilation)
    source = decode_hopper.source(built(config=Config(evict_first=wanted)), "bf16")
    stages = decode_launch.compile_kernel(source, None)
    assert ("evict_first" in stages["ptx"](LOAD, {})) is wanted
    assert stages_of_a_compilation()["ptx"](LOAD, {}) == LOAD


def test_the_policy_is_in_the_key_of_the_compiled_kernel(hook, monkeypatch):
    """Triton's cache does not know what is done to the PTX, but all that is compiled for."""
    monkeypatch.setattr(triton, "compile", lambda source, **how: source.hash())
    policies = (decode_launch.POLICY, decode_launch.POLICY.replace("1.0", "0.5"), "")
    keys = [
        decode_launch.compile_kernel(
            decode_hopper.source(replace(built(), policy=policy), "bf16"), target=None
        )
        for policy in (*policies, decode_launch.POLICY)
    ]
    assert len(set(keys[:3])) == 3 and keys[0] == keys[3]


def test_no_other_thread_and_no_other_hook_is_touched(hook):
    """While one thread compiles with an edit, another with another one, and one without."""

    def other():
        with decode_launch.edited(str.title):
            return stages_of_a_compilation()

    with ThreadPoolExecutor(1) as pool, decode_launch.edited(str.upper):
        without = pool.submit(stages_of_a_compilation).result()
        titled = pool.submit(other).result()
        mine = stages_of_a_compilation()
        again = stages_of_a_compilation()
    made = [stages["ptx"]("text", {}) for stages in (mine, titled, without, again)]
    assert made == ["TEXT", "Text", "text", "text"] and hook == [["ptx"]] * 4


def test_an_edit_ends_where_nothing_is_compiled(hook):
    with pytest.raises(RuntimeError, match="in the cache"), decode_launch.edited(str.upper):
        raise RuntimeError("in the cache")
    assert stages_of_a_compilation()["ptx"]("text", {}) == "text"
    installed = triton.knobs.runtime.add_stages_inspection_hook
    with decode_launch.edited(str.upper):
        assert triton.knobs.runtime.add_stages_inspection_hook is installed
    assert stages_of_a_compilation()["ptx"]("text", {}) == "text" and len(hook) == 2


def test_keys_are_given_up_first_where_it_was_faster():
    config = decode_launch.choose_config
    assert config(128, 2**28).evict_first and not config(128, 2**29).evict_first
    assert config(64, 2**29) == Config(BLOCK_N=128, evict_first=False)
    assert decode_launch.kv_bytes(2, (7, 5000, 3, 128), None) == 4 * 2 * 5000 * 3 * 128
    assert decode_launch.kv_bytes(2, (900, 256, 3, 64), 20) == 4 * 2 * 20 * 256 * 3 * 64
    assert decode_launch.kv_bytes(2000, (2000, 1, 1, 64), None) == 4 * 512 * 64


@pytest.mark.parametrize("headdim", [64, 128])
@pytest.mark.parametrize("page", decode_hopper.PAGE_SIZES)
def test_boxes_make_a_block_and_none_spans_pages(headdim, page):
    cfg = built(headdim=headdim, page=page)
    assert cfg.boxes * cfg.box == cfg.BLOCK_N and cfg.parts * 64 == headdim
    assert cfg.BLOCK_N * headdim == 8192  # 16 KB each of K and V
    assert page == 0 or (page % cfg.box == 0 and cfg.box <= page)


def test_a_block_too_large_for_the_registers_is_refused():
    with pytest.raises(ValueError, match=r"BLOCK_N=128.*headdim=128"):
        built(config=Config(BLOCK_N=128))
    assert built(config=Config(BLOCK_N=128), headdim=64).BLOCK_N == 128


@pytest.fixture
def compiling(monkeypatch):
    """What `Kernel` asks of Triton."""
    asked = []
    metadata = SimpleNamespace(global_scratch_size=0, profile_scratch_size=0, tensordesc_meta=None)

    def compile_(source, target, options):
        asked.append(options)
        run = SimpleNamespace(
            launch=lambda *arguments: None, launch_cooperative_grid=False, launch_pdl=False
        )
        return SimpleNamespace(metadata=metadata, run=run, function=0, packed_metadata=None)

    target = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: "sm_90"))
    monkeypatch.setattr(decode_launch.triton, "compile", compile_)
    monkeypatch.setattr(decode_launch, "driver", target)
    monkeypatch.setattr(decode_launch, "GluonASTSource", lambda *parts: parts)
    return asked, metadata


def test_a_kernel_is_compiled_with_few_enough_registers_for_two_of_them(compiling):
    asked, metadata = compiling
    compile_now = decode_launch.compiled.__wrapped__
    compile_now(built(), torch.bfloat16, 0)
    assert asked == [{"num_warps": 4, "maxnreg": decode_launch.REGISTERS}]
    assert 2 * 256 * decode_launch.REGISTERS <= 65536  # the producer's warp makes a warpgroup
    metadata.global_scratch_size = 8
    with pytest.raises(ValueError, match="scratch memory"):
        compile_now(built(), torch.bfloat16, 0)


# Splits.


def splits_by_the_policy(length, nheads_k, min_split):
    """(splits, keys of one) as the docstring of `decode_hopper` says."""
    at_most = max([1, *(2**i for i in range(9) if 2**i * nheads_k <= LIMIT)])
    keys = min_split
    while -(-length // keys) > at_most:
        keys *= 2
    return max(1, -(-length // keys)), keys


def test_the_policy_by_examples():
    assert splits_by_the_policy(0, 8, 512) == (1, 512)
    assert splits_by_the_policy(512, 8, 512) == (1, 512)
    assert splits_by_the_policy(513, 8, 512) == (2, 512)
    assert splits_by_the_policy(32 * 512, 8, 512) == (32, 512)
    assert splits_by_the_policy(32 * 512 + 1, 8, 512) == (17, 1024)
    assert splits_by_the_policy(32 * 512, 9, 512) == (16, 1024)
    assert splits_by_the_policy(10**6, 128, 512) == (2, 2**19)
    assert splits_by_the_policy(10**6, 200, 512) == (1, 2**20)


def clz(x):
    return torch.tensor([32 - int(n).bit_length() for n in x.reshape(-1)]).reshape(x.shape)


class Pointer:
    """An address among integers, as `load` takes it."""

    def __init__(self, values, place=0):
        self.values = torch.as_tensor(values)
        self.place = place

    def __add__(self, step):
        return Pointer(self.values, self.place + step)


def load(pointer, mask, other):
    place = torch.as_tensor(pointer.place)
    mask = torch.as_tensor(mask).expand(place.shape)
    inside = torch.where(mask, place, 0)
    assert 0 <= int(inside.min()) and int(inside.max()) < len(pointer.values)
    return torch.where(mask, pointer.values[inside].long(), other)


def instruction(asm, constraints, arguments, **options):
    assert asm == "clz.b32 $0, $1;"
    return clz(arguments[0])


DEVICE_FUNCTIONS = ("log2_keys", "splits_of", "bounds_of", "make_table", "find_item")


@contextmanager
def device(ctas=1):
    """The device functions as functions of tensors, on a grid of `ctas`."""
    larger = lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b))
    stand_in = SimpleNamespace(
        int32=torch.int64, arange=lambda first, end, _: torch.arange(first, end), load=load,
        where=torch.where, maximum=larger, sum=torch.sum, max=lambda x, axis: x.amax(axis),
        associative_scan=lambda x, axis, _: x.cumsum(axis), num_programs=lambda axis: ctas,
        inline_asm_elementwise=instruction,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_hopper, "gl", stand_in)
        patch.setattr(decode_hopper, "table_layout", lambda *sizes: None)
        for name in DEVICE_FUNCTIONS:
            patch.setattr(decode_hopper, name, getattr(decode_hopper, name).fn)
        yield


def splits_on_the_device(lengths, nheads_k, capacity, config):
    """(splits, keys of one) of each length."""
    at_most, _ = split_policy(nheads_k, capacity, config)
    call = SimpleNamespace(
        log2_splits=at_most.bit_length() - 1, log2_min_split=config.min_split.bit_length() - 1
    )
    with device():
        parts = decode_hopper.splits_of(torch.as_tensor(lengths), call)
        log2 = decode_hopper.log2_keys(torch.as_tensor(lengths), call)
    return parts.tolist(), (2**log2).tolist()


CONFIGS = st.sampled_from([Config(), Config(128, min_split=128), Config(min_split=4096)])


@thorough
@given(
    st.integers(1, 160),
    st.one_of(st.integers(1, 70_000), st.integers(1, 2**30 - 1)),
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
    CONFIGS,
)
def test_a_sequence_has_the_splits_of_the_policy_and_there_is_room(heads, capacity, shares, config):
    lengths = [0, capacity, *(int(share * capacity) for share in shares)]
    at_most, room = split_policy(heads, capacity, config)
    found = splits_on_the_device(lengths, heads, capacity, config)
    wanted = [splits_by_the_policy(n, heads, config.min_split) for n in lengths]
    assert list(zip(*found, strict=True)) == wanted
    assert all(parts <= room <= at_most for parts, _ in wanted)
    assert at_most == 1 or at_most * heads <= LIMIT < 2 * at_most * heads
    for n, (_, keys) in zip(lengths, wanted, strict=True):  # the least power of two
        assert keys == config.min_split or -(-n // (keys // 2)) > at_most


def test_too_little_room_or_another_policy_would_be_noticed():
    config, capacity = Config(), 30_000
    most, _ = splits_by_the_policy(capacity, 2, config.min_split)
    assert most > split_policy(2, capacity // 2, config)[1]
    lengths = [capacity, 100]
    right = splits_on_the_device(lengths, 2, capacity, config)
    assert right == ([59, 1], [512, 512])
    assert splits_on_the_device(lengths, 2, capacity, replace(config, min_split=1024)) != right
    assert splits_on_the_device(lengths, 8, capacity, config) != right


# The plan of a call.


class FakeKernel:
    """Remembers what it is asked for."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.launches = []

    def tensor_maps(self, *layouts):
        self.layouts = layouts
        return lambda *pointers: tuple(("map", address) for address in pointers)

    def launch(self, grid, stream, arguments):
        self.launches.append((grid, stream, arguments))


def planning(patch):
    """`plan` of a call on a device that is not here; nothing is remembered."""
    plan = getattr(decode_launch.plan, "__wrapped__", decode_launch.plan)
    patch.setattr(decode_launch, "plan", plan)
    patch.setattr(decode_launch, "compiled", lambda cfg, dtype, device: FakeKernel(cfg))
    patch.setattr(decode_launch.launch, "multiprocessors", lambda device: NUM_SMS)

    def of(
        config=None, ranged=False, causal=True, seqlen_new=0, indexed=False, batch=2, seqlen_q=1,
        nheads=8, nheads_k=2, headdim=128, size=4096, rows=None, table=None,
    ):  # fmt: skip
        q = torch.empty((batch, seqlen_q, nheads, headdim), device="meta")
        k = torch.empty((rows or batch, size, nheads_k, headdim), device="meta")
        return plan(
            config, torch.bfloat16, 0, ranged, causal, seqlen_new, indexed, table, q.shape, k.shape,
            q.stride(), k.stride(), k.stride(),
        )  # fmt: skip

    return of


@pytest.fixture
def planned(monkeypatch):
    return planning(monkeypatch)


def wrong_quotients(inverse, divisor, most):
    return [x for x in range(most + 1) if (x * inverse) >> 16 != x // divisor]


def test_multiplying_by_an_inverse_divides_exactly(planned):
    for group in range(1, 17):
        call = planned(nheads=2 * group)[2]
        assert wrong_quotients(call.inverse_group, group, 15) == []
    for heads in range(1, 129):
        call = planned(nheads=heads, nheads_k=heads)[2]
        assert call.nheads_k == heads and call.group == 1
        assert wrong_quotients(call.inverse_heads, heads, max(256, heads)) == []
        assert max(256, heads) * call.inverse_heads < 2**31


def test_an_inverse_rounded_down_would_be_noticed(planned):
    call = planned(nheads=6, nheads_k=3)[2]
    assert 3 in wrong_quotients(call.inverse_heads - 1, 3, 256)
    assert 2 in wrong_quotients(call.inverse_group - 1, 2, 15)


def test_a_plan_has_the_sizes_of_its_call(planned):
    kernel, maps, call, grid, rows = planned(
        batch=3, seqlen_q=2, nheads=12, nheads_k=3, size=5000, rows=7, seqlen_new=2, causal=False
    )
    assert kernel.cfg == Build(128, 0, False, False, 32, 16, 64, 2, decode_launch.POLICY)
    assert call == decode_hopper.Call(
        batch=3, seqlen_q=2, group=4, nheads_k=3, inverse_group=16384, inverse_heads=21846,
        seqlen_new=2, capacity=5000, num_rows=7, num_splits=10, log2_splits=6, log2_min_split=9,
        causal=0, stride_qb=384, stride_qm=192, stride_qh=16, stride_tb=0,
    )  # fmt: skip
    assert grid == 3 * 3 * 10 and rows == 3 * 10 * 2 * 12
    assert [layout.tensor for layout in kernel.layouts] == [0, 1]
    assert {layout.shape for layout in kernel.layouts} == {(7, 5000, 3, 128)}
    assert maps(64, 128) == (("map", 64), ("map", 128))


def test_a_plan_of_pages_counts_their_keys(planned):
    kernel, _, call, _, _ = planned(size=64, rows=50, table=(20, 24), indexed=True, ranged=True)
    assert (call.capacity, call.num_rows, call.stride_tb, call.num_splits) == (1280, 50, 24, 3)
    assert kernel.cfg.page_size == 64 and kernel.cfg.indexed and kernel.cfg.ranged


def test_the_grid_fills_the_machine_and_no_more(planned):
    assert planned(batch=500)[3] == 2 * NUM_SMS
    assert planned(batch=500, config=Config(ctas_per_sm=1))[3] == NUM_SMS
    _, _, call, grid, rows = planned(batch=1, size=512)
    assert (call.num_splits, grid, rows) == (1, 2, 0)  # nothing to combine


# Which items a call has.


def items_of(planned, lens, nheads_k, capacity, ctas, shift=0, **more):
    """(sequence, key head, first split, splits of the sequence, log2 of the keys of a split) of
    each item, and log2 of the splits of one; `shift` is added to the inverse of the key heads."""
    kernel, _, call, grid, _ = planned(
        batch=len(lens), nheads=nheads_k, nheads_k=nheads_k, size=capacity, **more
    )
    call = call._replace(inverse_heads=call.inverse_heads + shift)
    assert len(lens) <= kernel.cfg.batch and grid <= 2 * NUM_SMS
    bounds, index = Pointer(lens), Pointer([len(lens) - 1 - b for b in range(len(lens))])
    if kernel.cfg.ranged:  # all but an error begin at the second key
        ranges = [[min(1, n), n + min(1, n), n] for n in lens]
        bounds = Pointer(list(itertools.chain(*ranges)))
    found = []
    with device(ctas):
        ends, items, unit = decode_hopper.make_table(bounds, index, call, 4, kernel.cfg)
        for t in range(int(items)):
            item = decode_hopper.find_item(torch.tensor(t), ends, unit, bounds, index, call,
                                           kernel.cfg)  # fmt: skip
            found.append(tuple(int(x) for x in item))
    return found, int(unit)


def deal_faults(items, unit, lens, nheads_k, min_split=512):
    """What is wrong with the items of a call, in words."""
    group = decode_hopper.GROUP.value
    have, stored, faults = Counter(), Counter(), []
    for b, head, first, parts, log2, *_ in items:
        if b >= len(lens) or (parts, 2**log2) != splits_by_the_policy(lens[b], nheads_k, min_split):
            faults.append(f"splits of sequence {b}")
            continue
        splits = range(first, min(first + 2**unit, parts))
        have.update((b, head, split) for split in splits)
        ends = [i for i in splits if unit == 0 or i % group == group - 1 or i == splits[-1]]
        stored[b, head] += len(ends)
        if unit and first % group:
            faults.append(f"an item begins within a group, at {first}")
    wanted = {b: splits_by_the_policy(n, nheads_k, min_split)[0] for b, n in enumerate(lens)}
    heads = range(nheads_k)
    if have != Counter((b, h, i) for b in wanted for h in heads for i in range(wanted[b])):
        faults.append("not every split once")
    for (b, _), count in stored.items():
        if count != (wanted[b] if unit == 0 else -(-wanted[b] // group)):
            faults.append(f"{count} results of sequence {b}")
    return faults


@settings(thorough, max_examples=60)
@given(data=st.data())
def test_every_split_is_in_one_item(data):
    with pytest.MonkeyPatch.context() as patch:
        plan = planning(patch)
        nheads_k = data.draw(st.sampled_from([1, 2, 3, 7, 8, 20, 128]))
        capacity = data.draw(st.sampled_from([100, 5000, 40_000]))
        length = st.integers(0, capacity)
        lens = data.draw(st.lists(length, min_size=1, max_size=max(1, 64 // nheads_k)))
        ctas = data.draw(st.sampled_from([8, 60, 2 * NUM_SMS]))
        if nheads_k == 128:
            ctas = 2 * NUM_SMS
        items, unit = items_of(plan, lens, nheads_k, capacity, ctas)
        assert deal_faults(items, unit, lens, nheads_k) == []
        assert len(items) < 6 * ctas + 4 * nheads_k * len(lens)


UNITS = {0: 264, 2: 60, 3: 25, 4: 8}  # log2 of the splits of an item: CTAs


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", ["plain", "ranged", "indexed"])
def test_items_are_larger_the_fewer_the_ctas(planned, unit, kind):
    lens, heads, capacity = [5000, 0, 40_000, 513, 12_345], 2, 40_001
    kinds = {} if kind == "plain" else {kind: True}
    items, found = items_of(planned, lens, heads, capacity, UNITS[unit], **kinds)
    assert found == unit
    assert deal_faults(items, unit, lens, heads) == []
    _, _, _, _, _, first, length, position, row, error = zip(*items, strict=True)
    assert not any(error)
    b = [item[0] for item in items]
    assert length == tuple(lens[i] for i in b)
    assert first == tuple(min(1, lens[i]) if kind == "ranged" else 0 for i in b)
    assert position == tuple(
        lens[i] - (min(1, lens[i]) if kind == "ranged" else 1) for i in b
    )  # of the only query
    assert row == tuple(len(lens) - 1 - i if kind == "indexed" else i for i in b)


@pytest.mark.parametrize(
    ("lens", "kind", "bit"),
    [([-1, 9], {}, 1), ([9, 101], {}, 1), ([9, 2**31 - 1], {}, 1), ([9, 101], "ranged", 16)],
)
def test_a_bad_length_is_an_item_without_keys(planned, lens, kind, bit):
    kinds = {kind: True} if kind else {}
    items, unit = items_of(planned, lens, 1, 100, 264, **kinds)
    good = [0 <= n <= 100 for n in lens]
    assert deal_faults(items, unit, [n if fine else 0 for n, fine in zip(lens, good, strict=True)],
                       1) == []  # fmt: skip
    assert [item[9] for item in items] == [0 if fine else bit for fine in good]
    assert [item[6] for item in items] == [9 if fine else 0 for fine in good]


def test_items_dealt_out_wrongly_would_be_noticed(planned):
    lens, heads = [5000, 0, 40_000], 3
    items, unit = items_of(planned, lens, heads, 40_000, 20)
    assert deal_faults(items, unit, lens, heads) == [] and unit > 0
    lost = deal_faults(items[:-1], unit, lens, heads)
    assert "not every split once" in lost and any("results of sequence 2" in x for x in lost)
    assert "not every split once" in deal_faults(items * 2, unit, lens, heads)
    assert "splits of sequence 0" in deal_faults(items, unit, [9000, *lens[1:]], heads)
    late = [(b, head, first + 1, *rest) for b, head, first, *rest in items]
    assert "an item begins within a group, at 1" in deal_faults(late, unit, lens, heads)
    wrong, unit = items_of(planned, lens, heads, 40_000, 20, shift=-1)
    assert "not every split once" in deal_faults(wrong, unit, lens, heads)


# A launch, and a batch that needs several.


def test_a_launch_passes_what_the_kernel_takes(planned, monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    kernel = FakeKernel(None)
    monkeypatch.setattr(decode_launch, "compiled", lambda *key: kernel)
    arguments = call(batch=5, seqlen_q=2, size=1600, device="cpu")
    q, k, v = (arguments[x] for x in "qkv")
    out, lse = torch.empty_like(q), torch.empty(5, 8, 2)
    bounds, index = ints(1, 2, 3, 4, 5), ints(4, 3, 2, 1, 0)
    rooms, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: rooms.append(empty(*a, **k)) or rooms[-1])
    decode_launch._launch(out, lse, q, k, v, bounds, index, None, (None, False, True, 1, 0.5))
    ((grid, stream, passed),) = kernel.launches
    names = decode_hopper.decode_kernel.arg_names
    given = dict(zip(names, passed, strict=True))
    rows = 5 * 4 * 2 * 8  # four splits
    (partial,) = rooms
    assert partial.numel() == rows * (64 + 2)  # fp32 results; a sum and an exponent each
    error, counter = decode.error_flag("cpu"), decode.counters(q.device, 10)
    assert given.pop("call").num_splits == 4 and grid == 5 * 2 * 4 and stream == 77
    assert given == {
        "k_desc": ("map", k.data_ptr()), "v_desc": ("map", v.data_ptr()), "q_ptr": q.data_ptr(),
        "out_ptr": out.data_ptr(), "lse_ptr": lse.data_ptr(), "partial_ptr": partial.data_ptr(),
        "totals_ptr": partial.data_ptr() + rows * 64 * 4, "bounds_ptr": bounds.data_ptr(),
        "index_ptr": index.data_ptr(), "table_ptr": bounds.data_ptr(),
        "error_ptr": error.data_ptr(), "counter_ptr": counter.data_ptr(), "qk_scale": 0.5,
        "cfg": None,
    }  # fmt: skip


@pytest.fixture
def running(monkeypatch):
    """Launches and appends of `run`; a launch copies its queries and lengths to its results."""
    launches, appended = [], []

    def launch(out, lse, q, k, v, bounds, index, block_table, options):
        out.copy_(q)
        lse.copy_(bounds.reshape(len(q), -1)[:, :1, None].expand(lse.shape))
        launches.append(SimpleNamespace(q=q, index=index, table=block_table, options=options))

    def append(*tensors, **places):
        assert not launches  # before anybody attends
        appended.append((tensors, places))

    monkeypatch.setattr(decode_launch, "_launch", launch)
    monkeypatch.setattr(decode, "append", append)
    return launches, appended


def batch_of(batch, seqlen_q=1):
    """q, k and v whose sequences differ, and their lengths."""
    numbers = torch.arange(batch, dtype=torch.float32).view(-1, 1, 1, 1)
    q = numbers.expand(batch, seqlen_q, 2, 64).to(torch.bfloat16).contiguous()
    k = torch.zeros(batch, 1, 1, 64, dtype=torch.bfloat16)
    return q, k, k.clone(), torch.randperm(batch).to(torch.int32)


@pytest.mark.parametrize("batch", [1, 512, 513, 1024, 1100])
@pytest.mark.parametrize("kind", ["rows of the batch", "index", "pages"])
def test_a_large_batch_is_cut_into_parts_that_cover_it_once(running, batch, kind):
    launches, _ = running
    q, k, v, bounds = batch_of(batch)
    index = torch.randperm(batch).to(torch.int32) if kind == "index" else None
    table = torch.arange(3 * batch, dtype=torch.int32).view(-1, 3) if kind == "pages" else None
    out, lse = decode_launch.run(
        q, k, v, mode=decode.CACHE, bounds=bounds, index=index, block_table=table
    )
    assert torch.equal(out, q) and torch.equal(lse, bounds[:, None, None].expand(lse.shape).float())
    sizes = [len(part.q) for part in launches]
    assert max(sizes) <= decode_hopper.BATCHES[-1] and sum(sizes) == batch
    rows, pages = ([getattr(part, x) for part in launches] for x in ("index", "table"))
    if kind == "pages":
        assert rows == [None] * len(launches) and torch.equal(torch.cat(pages), table)
    else:
        assert pages == [None] * len(launches)
        if kind == "index" or batch > 512:
            wanted = torch.arange(batch) if index is None else index
            assert torch.equal(torch.cat(rows), wanted.to(torch.int32))
            assert all(x.dtype == torch.int32 for x in rows)
        else:  # the kernel's own numbers are the rows
            assert rows == [None]


def test_ranges_are_cut_with_their_sequences(running):
    q, k, v, first = batch_of(600)
    bounds = torch.stack([first, first + 1, first], 1)
    out, lse = decode_launch.run(q, k, v, mode=decode.RANGE, bounds=bounds)
    assert torch.equal(out, q) and torch.equal(lse[:, 0, 0], first.float())
    assert [part.options[1] for part in running[0]] == [True, True]


def test_a_part_left_out_would_be_noticed(running, monkeypatch):
    launch, nan = decode_launch._launch, float("nan")
    monkeypatch.setattr(
        decode_launch, "_launch", lambda *a: launch(*a) if len(a[0]) == 512 else a[0].fill_(nan)
    )
    q, k, v, bounds = batch_of(600)
    out, _ = decode_launch.run(q, k, v, mode=decode.CACHE, bounds=bounds)
    assert torch.equal(out[:512], q[:512]) and not torch.equal(out, q)


def test_new_keys_are_appended_once_and_before(running):
    launches, appended = running
    q, k, v, bounds = batch_of(600, seqlen_q=2)
    new = k.expand(-1, 2, -1, -1).contiguous()
    decode_launch.run(q, k, v, mode=decode.CACHE, bounds=bounds, k_new=new, v_new=new + 1)
    ((tensors, places),) = appended
    assert all(a is b for a, b in zip(tensors[:3], (k, v, new), strict=True))
    assert places == dict(bounds=bounds, index=None, block_table=None)
    assert {part.options[3] for part in launches} == {2} and len(launches) == 2
    launches.clear()
    appended.clear()
    decode_launch.run(q, k, v, mode=decode.CACHE, bounds=bounds)
    assert not appended and {part.options[3] for part in launches} == {0}


def test_queries_are_copied_where_they_must_and_the_scale_is_in_base_2(running):
    q, k, v, bounds = batch_of(3)
    strided = wide(q)
    strided.copy_(q)
    out, _ = decode_launch.run(strided, k, v, mode=decode.CACHE, bounds=bounds, causal=False)
    decode_launch.run(q, k, v, mode=decode.CACHE, bounds=bounds, softmax_scale=0.5)
    copied, plain = running[0]
    assert torch.equal(out, q) and out.is_contiguous()
    assert copied.q.is_contiguous() and copied.q.data_ptr() != strided.data_ptr()
    assert plain.q is q
    assert copied.options[2] is False and plain.options[2] is True
    assert copied.options[4] == pytest.approx(0.125 * 1.4426950408889634)
    assert plain.options[4] == pytest.approx(0.5 * 1.4426950408889634)
