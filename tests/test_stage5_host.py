"""What stage 5 decides on the host, and which tiles and keys its kernel visits, on a CPU.

The order of tiles and the key blocks are device functions of plain arithmetic, run here in Python
with a stand-in for `gl`.
"""

import itertools
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from attn_ladder import launch, tiles
from attn_ladder import stage5_everything as stage5
from attn_ladder.reference import visible

NUM_SMS = 132


def plan(batch=2, seqlen_q=512, seqlen_k=None, nheads=4, nheads_k=4, headdim=64, causal=True, **kw):
    seqlen_k = seqlen_k or seqlen_q
    sizes = (batch, seqlen_q, nheads, headdim), (batch, seqlen_k, nheads_k, headdim)
    return stage5.schedule(kw.get("config"), *sizes, causal, kw.get("num_sms", NUM_SMS))


@pytest.fixture
def cta(monkeypatch):
    """Makes the device functions those of one CTA."""

    def become(index, grid):
        stand_in = SimpleNamespace(
            program_id=lambda axis: index,
            num_programs=lambda axis: grid,
            cdiv=lambda a, b: -(-a // b),
        )
        monkeypatch.setattr(tiles, "gl", stand_in)

    return become


SHAPES = {
    "headdim 256": dict(seqlen_q=2048, batch=2, nheads=8, nheads_k=4, headdim=256),
    "headdim 256, full": dict(seqlen_q=900, nheads=8, headdim=256, causal=False),
    "pairs": dict(seqlen_q=512, batch=16, nheads=16, nheads_k=16, headdim=128),
    "an odd number of tiles": dict(seqlen_q=640, batch=3, nheads=12, nheads_k=3, headdim=128),
    "counter": dict(seqlen_q=4096, batch=2, nheads=8, nheads_k=2, headdim=128),
    "three consumers": dict(seqlen_q=8192, batch=1, nheads=5, nheads_k=5),
    "full": dict(seqlen_q=1000, batch=3, nheads=7, nheads_k=7, causal=False),
    "fewer tiles than CTAs": dict(seqlen_q=100, batch=1, nheads=3, nheads_k=1),
    "ragged, unequal": dict(seqlen_q=700, seqlen_k=300, batch=2, nheads=6, nheads_k=3),
}


def tiles_of_all_ctas(cfg, shape, grid, cta):
    """Tiles in the order of each CTA; a counter is dealt round robin."""
    for index in range(grid):
        cta(index, grid)
        end = stage5.num_tiles.fn(shape, cfg)
        own = range(index, end, grid) if cfg.schedule == "dynamic" else range(end)
        yield [stage5.tile_of.fn(i, shape, cfg) for i in own]


@pytest.mark.parametrize("case", SHAPES)
def test_every_tile_is_visited_once(cta, case):
    cfg, shape, grid = plan(**SHAPES[case])
    taken = Counter(itertools.chain(*tiles_of_all_ctas(cfg, shape, grid, cta)))
    wanted = itertools.product(range(shape.num_m), range(shape.num_heads))
    assert taken == Counter(wanted)


def test_a_missing_tile_would_be_noticed(cta):
    cfg, shape, grid = plan(**SHAPES["pairs"])
    lost = shape._replace(num_m=shape.num_m + 2)
    taken = Counter(itertools.chain(*tiles_of_all_ctas(cfg, shape, grid, cta)))
    assert taken != Counter(itertools.product(range(lost.num_m), range(lost.num_heads)))


def test_the_longest_causal_tiles_come_first_and_heads_of_a_key_head_together(cta):
    cfg, shape, _ = plan(**SHAPES["counter"])
    cta(0, 1)
    order = [stage5.tile_of.fn(i, shape, cfg) for i in range(shape.num_m * shape.num_heads)]
    rows = [m for m, _ in order[: shape.num_m * shape.heads_together]]
    assert rows == sorted(rows, reverse=True)
    assert shape.heads_together % shape.group == 0


KEYS = [(512, 512), (300, 413), (413, 300), (1, 777), (777, 1), (129, 128), (640, 1024), (1000, 37)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlens", KEYS)
def test_key_blocks_cover_the_mask_and_only_the_peeled_ones_need_it(seqlens, causal):
    seqlen_q, seqlen_k = seqlens
    cfg, shape, _ = plan(seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=causal)
    mask = visible(seqlen_q, seqlen_k, causal, "cpu")
    for m in range(shape.num_m):
        n, lowest = stage5.key_blocks.fn(m, shape, cfg)
        rows = mask[m * cfg.BLOCK_M : (m + 1) * cfg.BLOCK_M]
        visited = torch.zeros(seqlen_k, dtype=torch.bool)
        for j in range(n):
            start = lowest + j * cfg.BLOCK_N
            inside = slice(max(start, 0), max(start + cfg.BLOCK_N, 0))
            visited[inside] = True
            masked_at = {n - 1} | ({0} if cfg.ragged and causal else set())
            if j not in masked_at:
                assert start >= 0 and rows[:, inside].all() and start + cfg.BLOCK_N <= seqlen_k
        assert not (rows.any(0) & ~visited).any()
        # every row with a key has one in the first block visited, which gives its reference
        first = slice(max(lowest + (n - 1) * cfg.BLOCK_N, 0), max(lowest + n * cfg.BLOCK_N, 0))
        assert torch.equal(rows.any(1), rows[:, first].any(1))


@pytest.mark.parametrize("seqlens", [(512, 512), (512, 1024), *KEYS])
def test_each_consumer_masks_only_its_first_and_a_ragged_lowest_block(seqlens):
    """Causal tiles of 128 rows with blocks of 64 keys: a consumer skips what it does not see."""
    seqlen_q, seqlen_k = seqlens
    cfg, shape, _ = plan(seqlen_q=seqlen_q, seqlen_k=seqlen_k, headdim=256)
    mask = visible(seqlen_q, seqlen_k, True, "cpu")
    for m, consumer in itertools.product(range(shape.num_m), range(cfg.consumers)):
        n, lowest = stage5.key_blocks.fn(m, shape, cfg)
        first_row = m * cfg.BLOCK_M + 64 * consumer
        seen = stage5.seen_blocks.fn(first_row, n, lowest, shape, cfg)
        assert 1 <= seen <= n
        rows = mask[first_row : first_row + 64]
        starts = [lowest + j * cfg.BLOCK_N for j in range(seen)]
        inside = [slice(max(s, 0), max(s + cfg.BLOCK_N, 0)) for s in starts]
        assert not rows[:, inside[-1].stop :].any()
        assert torch.equal(rows.any(1), rows[:, inside[-1]].any(1))  # gives the reference
        for start, keys in list(zip(starts, inside, strict=True))[cfg.ragged : -1]:
            assert start >= 0 and rows[:, keys].all()
        if cfg.fixed_diagonal:
            assert torch.equal(rows[:, inside[-1]], torch.ones(64, 64, dtype=torch.bool).tril())


def test_the_first_consumer_would_see_a_hidden_block():
    cfg, shape, _ = plan(seqlen_q=512, headdim=256)
    n, lowest = stage5.key_blocks.fn(1, shape, cfg)
    assert [stage5.seen_blocks.fn(r, n, lowest, shape, cfg) for r in (128, 192)] == [n - 1, n]


def test_an_aligned_kernel_would_not_do_for_a_ragged_problem():
    cfg, shape, _ = plan(seqlen_q=300, seqlen_k=413)
    assert cfg.ragged
    n, lowest = stage5.key_blocks.fn(0, shape, replace(cfg, ragged=False))
    first = visible(300, 413, True, "cpu")[:128, (n - 1) * 128 :]
    assert lowest == 0 and not first.any(1).all()


def test_too_many_tiles_for_the_list_and_odd_pairs_change_the_order():
    assert plan(seqlen_q=4096)[0].schedule == "dynamic"
    assert plan(seqlen_q=4096, batch=4096, nheads=32, nheads_k=32)[0].schedule == "static"
    assert plan(seqlen_q=256, headdim=128)[0].schedule == "pairs"
    assert plan(seqlen_q=384, headdim=128)[0].schedule == "dynamic"


def test_groups_of_heads_fit_the_l2_and_are_of_equal_size():
    _, shape, _ = plan(batch=5, seqlen_q=8192, nheads=8, nheads_k=8, headdim=128)
    assert 4 * shape.seqlen_k * 128 * shape.heads_together <= 32 << 20
    groups = -(-shape.num_heads // shape.heads_together)
    assert groups * shape.heads_together - shape.num_heads < groups


WRONG = {
    "headdim": dict(headdim=80),
    "consumers": dict(consumers=4),
    "BLOCK_N": dict(BLOCK_N=176),
    "num_buffers": dict(num_buffers=1),
    "num_q_buffers": dict(num_q_buffers=0),
    "schedule": dict(schedule="random"),
    "half_diagonal": dict(half_diagonal=True, causal=False),
    "cross_tile": dict(cross_tile=True),
    "ragged": dict(ragged=True, consumers=3),
    "direct_store": dict(headdim=256, BLOCK_N=64, direct_store=False),
}


@pytest.mark.parametrize("field", WRONG)
def test_a_config_names_the_field_that_is_wrong(field):
    stage5.Config(64, True)
    values = {"headdim": 64, "causal": True, **WRONG[field]}
    with pytest.raises(ValueError, match=f"^{field}={values[field]!r}"):
        stage5.Config(**values)


def test_a_config_for_another_problem_is_refused():
    fits = stage5.Config(64, True)
    assert plan(config=fits)[0] == fits
    for problem in (dict(headdim=128), dict(causal=False), dict(seqlen_q=300)):
        with pytest.raises(ValueError, match="cannot compute"):
            plan(config=fits, **problem)


# Tensor maps and the counter.


class FakeKernel(launch.Kernel):
    def __init__(self):
        meta = dict(swizzle=3, elem_size=2, elem_type=10, block_size=[1, 64, 1, 64])
        self._maps = [meta, meta]


@pytest.fixture
def encoded(monkeypatch):
    calls = []

    def fill(pointer, swizzle, elem_size, elem_type, block, shape, strides, padding):
        calls.append((pointer, tuple(shape), tuple(strides)))
        return len(calls)

    utils = SimpleNamespace(fill_tma_descriptor=fill)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    return calls


def test_maps_are_encoded_once_for_an_address(encoded):
    q = launch.Layout(0, (2, 256, 4, 64), (65536, 256, 64, 1))
    maps = FakeKernel().tensor_maps(q, launch.Layout(1, q.shape, q.strides))
    first = maps(16, 32)
    assert first == (1, *q.shape, *q.strides, 2, *q.shape, *q.strides)
    assert maps(16, 32) is first and len(encoded) == 2
    assert maps(16, 48) != first and len(encoded) == 4
    for address in range(1000):
        maps(16 * address, 16)
    assert maps.cache_info().currsize <= 64


def test_a_stride_of_a_single_element_is_made_one_that_tma_takes(encoded):
    one = launch.Layout(0, (1, 256, 1, 64), (3, 64, 0, 1))
    FakeKernel().tensor_maps(one)(16)
    assert encoded == [(16, (1, 256, 1, 64), (16, 64, 16, 1))]


@pytest.fixture
def counter(monkeypatch):
    state = SimpleNamespace(capturing=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    pool = torch.zeros(launch.COUNTER_SLOTS, launch.COUNTER_INTS, dtype=torch.int32)
    monkeypatch.setattr(launch, "_counters", {0: (pool, {}, itertools.count())})
    return state


def test_launches_share_a_counter_only_within_a_stream(counter):
    first, second = launch.tile_counter(0, 7), launch.tile_counter(0, 8)
    assert first != second and launch.tile_counter(0, 7) == first


def test_a_captured_launch_keeps_its_counter_to_itself(counter):
    eager = launch.tile_counter(0, 7)
    counter.capturing = True
    captured = {launch.tile_counter(0, 7) for _ in range(5)}
    assert len(captured) == 5 and eager not in captured
    counter.capturing = False
    assert launch.tile_counter(0, 7) == eager and launch.tile_counter(0, 9) not in captured


def test_without_a_slot_there_is_no_counter(counter):
    counter.capturing = True
    addresses = [launch.tile_counter(0, 7) for _ in range(launch.COUNTER_SLOTS + 2)]
    assert addresses[-2:] == [0, 0] and 0 not in addresses[:-2]
    assert launch.tile_counter(1, 7) == 0  # no pool yet on this device, and none under capture
