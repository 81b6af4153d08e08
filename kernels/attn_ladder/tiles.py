"""The order in which a persistent grid takes the tiles of an attention problem."""

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
def listed_tile(i, tiles_smem, cfg: gl.constexpr):
    """The i-th tile of this CTA, as `tile_of` takes it."""
    if cfg.schedule == "dynamic":
        return gl.max(tiles_smem.index(i).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    return i
