"""The order in which a persistent grid takes the tiles of a problem, and the keys of a tile."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TILE_LIST = gl.constexpr(1024)  # entries of the list of tiles that a CTA got from the counter


class Shape(NamedTuple):
    """The problem as the kernel sees it."""

    seqlen_q: int
    seqlen_k: int
    nheads: int
    group: int  # query heads that share a key head
    num_m: int  # tiles of a head
    num_heads: int  # batch * nheads
    heads_together: int


@gluon.jit
def list_length(num_tiles):
    """How many tiles this CTA has when all are dealt out back and forth."""
    rounds = num_tiles // gl.num_programs(0)
    place = gl.program_id(0)
    if rounds % 2 == 1:
        place = gl.num_programs(0) - 1 - place
    return rounds + (place < num_tiles - rounds * gl.num_programs(0)).to(gl.int32)


@gluon.jit
def list_entry(i, num_m, num_heads, heads_per_group):
    """(batch and head, query tile) at place `i` of this CTA's list."""
    place = gl.program_id(0)
    if i % 2 == 1:  # back and forth
        place = gl.num_programs(0) - 1 - place
    tile = i * gl.num_programs(0) + place
    group = tile // (heads_per_group * num_m)
    within = tile - group * heads_per_group * num_m
    first_head = group * heads_per_group
    num_in_group = min(heads_per_group, num_heads - first_head)
    return first_head + within % num_in_group, num_m - 1 - within // num_in_group


@gluon.jit
def num_tiles(shape, cfg: gl.constexpr):
    """How many tiles this CTA takes; with the counter, how many there are."""
    tiles = shape.num_heads * shape.num_m
    if cfg.schedule == "dynamic":
        return tiles
    if cfg.schedule == "pairs":
        return 2 * gl.cdiv(tiles // 2 - gl.program_id(0), gl.num_programs(0))
    return gl.cdiv(tiles - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def tile_of(i, shape, cfg: gl.constexpr):
    """Tile i as (block of query rows, batch * nheads + head)."""
    if cfg.schedule == "pairs":
        pair = gl.program_id(0) + gl.num_programs(0) * (i // 2)
        head = pair // (shape.num_m // 2)
        m = pair - head * (shape.num_m // 2)
        if i % 2 == 0:
            m = shape.num_m - 1 - m
    else:
        if cfg.schedule == "static":
            i = gl.program_id(0) + gl.num_programs(0) * i
        if cfg.causal:  # groups of heads, in each the longest tile first
            first = i // (shape.num_m * shape.heads_together) * shape.heads_together
            size = max(1, min(shape.heads_together, shape.num_heads - first))
            rest = i - first * shape.num_m
            head = first + rest % size
            m = shape.num_m - 1 - rest // size
        else:
            head = i // shape.num_m
            m = i - head * shape.num_m
    return m, head


@gluon.jit
def tile_list(cfg: gl.constexpr):
    """Memory for the tiles that this CTA gets from the counter."""
    LENGTH: gl.constexpr = TILE_LIST if cfg.schedule == "dynamic" else 1
    return gl.allocate_shared_memory(gl.int32, [LENGTH, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def listed_tile(i, tiles_smem, cfg: gl.constexpr):
    """The i-th tile of this CTA, as `tile_of` takes it."""
    if cfg.schedule == "dynamic":
        return gl.max(tiles_smem.index(i).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    return i


@gluon.jit
def key_blocks(m, shape, cfg: gl.constexpr):
    """(number of key blocks of a tile, at least one; first key of the lowest one).

    Blocks start at multiples of BLOCK_N, except in ragged causal tiles: there the last one ends at
    the diagonal of the tile, and the lowest one may begin before key 0, where TMA reads zeros.
    """
    lowest = 0
    keys = shape.seqlen_k
    if cfg.causal:
        keys += (m + 1) * cfg.BLOCK_M - shape.seqlen_q
        if not cfg.ragged:
            keys = min(keys, shape.seqlen_k)
    n = max((keys + cfg.BLOCK_N - 1) // cfg.BLOCK_N, 1)
    if cfg.causal and cfg.ragged:
        lowest = keys - n * cfg.BLOCK_N
    return n, lowest


@gluon.jit
def seen_blocks(row, n, lowest, shape, cfg: gl.constexpr):
    """How many of the n key blocks of a causal tile the 64 rows from `row` on see, counted from the
    lowest. Rows that see no key keep a block."""
    keys = row + 64 + shape.seqlen_k - shape.seqlen_q - lowest
    seen = min((keys + cfg.BLOCK_N - 1) // cfg.BLOCK_N, n)
    if cfg.ragged:
        seen = max(seen, 1)
    return seen
