"""What the top stage's kernel is compiled for, and what is chosen for a problem."""

from dataclasses import dataclass, replace
from typing import Any

from triton.experimental.gluon import language as gl

from attn_ladder.tiles import TILE_LIST, Shape


@dataclass(frozen=True)
class Config:
    """What the kernel is compiled for; a consumer is one warpgroup with 64 query rows."""

    headdim: int
    causal: bool
    ragged: bool = False  # seqlen_k or a diagonal is no multiple of BLOCK_N
    consumers: int = 2
    BLOCK_N: int = 128
    num_buffers: int = 2  # depth of the rings of K and V
    num_q_buffers: int = 1
    q_in_registers: bool = True
    ping_pong: bool = True  # the consumers take turns to issue products
    overlap: str = "own"  # softmax runs under the consumer's own P·V, or only under "others"
    half_diagonal: bool = False  # the first consumer skips the hidden half of the diagonal block
    cross_tile: bool = False  # the next tile's first product runs under the epilogue
    direct_store: bool = False  # O is written from registers, without a buffer
    mask_all: bool = False  # every block is masked, as if none were known to be visible
    producer_warps: int = 1
    schedule: str = "static"  # or "pairs" of a long and a short tile, or "dynamic"
    l2_bytes: int = 32 << 20  # keys and values of the heads that are processed together

    def __post_init__(self) -> None:
        for fits, name, needs in (
            (self.headdim in (64, 128, 256), "headdim", "to be 64, 128 or 256"),
            (self.consumers in (2, 3), "consumers", "to be 2 or 3"),
            (self.BLOCK_N in (64, 128), "BLOCK_N", "to be 64 or 128"),
            (self.num_buffers >= 2, "num_buffers", "to be at least 2"),
            (self.num_q_buffers >= 1, "num_q_buffers", "to be at least 1"),
            (self.producer_warps in (1, 2, 4), "producer_warps", "to be 1, 2 or 4"),
            (self.schedule in ("static", "pairs", "dynamic"), "schedule", "a known order"),
            (self.overlap in ("own", "others"), "overlap", "to be own or others"),
            (self.ping_pong or self.overlap == "own", "overlap", "ping_pong to be others"),
            (self.consumers == 2 or not (self.ragged and self.causal),
             "ragged", "two consumers if causal"),
            (self.fixed_diagonal and self.BLOCK_N == 128 or not self.half_diagonal,
             "half_diagonal", "128 x 128 tiles, causal and not ragged"),
            (self.num_buffers * self.BLOCK_N >= self.BLOCK_M or not self.direct_store,
             "direct_store", "64 keys in the ring of V for each consumer"),
            (self.headdim < 256 or self.direct_store, "direct_store", "to be set at headdim 256"),
            (not (self.cross_tile and self.causal), "cross_tile", "causal=False"),
            (self.causal or self.schedule == "static", "schedule", "to be static if not causal"),
        ):  # fmt: skip
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)!r} needs {needs}: {self}")

    @property
    def BLOCK_M(self) -> int:
        return 64 * self.consumers

    @property
    def fixed_diagonal(self) -> bool:
        """Whether the mask of the diagonal block is the same in every tile."""
        return self.causal and not self.ragged and self.consumers == 2


def choose_config(headdim: int, causal: bool, seqlen_k: int, ragged: bool = False) -> Config:
    """The fastest configuration of those measured; CONTRIBUTING says what each choice is worth."""
    two = dict(num_buffers=3, num_q_buffers=2, overlap="others")
    three = dict(two, consumers=3, q_in_registers=False)
    if headdim == 256:
        order = "pairs" if causal else "static"
        memory = dict(BLOCK_N=64, q_in_registers=False, direct_store=True)
        return Config(256, causal, ragged, schedule=order, **memory)
    if headdim == 128 and not causal:
        return Config(128, False, ragged, q_in_registers=not ragged)
    if headdim == 128 and (ragged or seqlen_k > 2048):
        whole = dict(half_diagonal=not ragged, schedule="dynamic")
        return Config(128, True, ragged, q_in_registers=False, **whole)
    if headdim == 128:
        pairs = dict(half_diagonal=True, schedule="pairs", l2_bytes=16 << 20)
        return Config(128, True, num_q_buffers=2, q_in_registers=False, **pairs)
    if causal and seqlen_k > 4096 and not ragged:  # 192 rows use a key block
        return Config(64, True, schedule="dynamic", **three)
    if causal:
        l2_bytes = (8 if seqlen_k <= 512 else 16) << 20
        whole = dict(half_diagonal=not ragged, schedule="dynamic", l2_bytes=l2_bytes)
        return Config(64, True, ragged, **whole, **two)
    if seqlen_k <= 1024 or ragged:
        return Config(64, False, ragged, q_in_registers=ragged, cross_tile=True, **two)
    return Config(64, False, cross_tile=True, **three)


def schedule(
    config: Config | None,
    q_size: tuple[int, ...],
    k_size: tuple[int, ...],
    causal: bool,
    num_sms: int,
) -> tuple[Config, Shape, int]:
    """Configuration, shape and number of CTAs for q and k of these sizes.

    Raises `ValueError` if a given `config` cannot compute them.
    """
    batch, seqlen_q, nheads, headdim = q_size
    seqlen_k, nheads_k = k_size[1], k_size[2]
    offset = seqlen_k - seqlen_q
    ragged = seqlen_k % 128 != 0 or (causal and (offset < 0 or offset % 128 != 0))
    cfg = config or choose_config(headdim, causal, seqlen_k, ragged)
    if (cfg.headdim, cfg.causal) != (headdim, causal) or (ragged and not cfg.ragged):
        raise ValueError(f"config={cfg} cannot compute {headdim=} {causal=} {ragged=}")
    num_m = -(-seqlen_q // cfg.BLOCK_M)
    num_heads = batch * nheads
    tiles = num_m * num_heads
    if cfg.schedule == "pairs" and num_m % 2:
        cfg = replace(cfg, schedule="dynamic", num_q_buffers=1)  # its list takes the room
    if cfg.schedule == "dynamic" and tiles > num_sms * (TILE_LIST.value - 1):
        cfg = replace(cfg, schedule="static")
    group = nheads // nheads_k
    heads = min(num_heads, max(1, cfg.l2_bytes // (4 * seqlen_k * headdim)) * group)
    heads = -(-num_heads // -(-num_heads // heads))  # groups of equal size: a short last one hurts
    heads = min(num_heads, -(-heads // group) * group)
    shape = Shape(seqlen_q, seqlen_k, nheads, group, num_m, num_heads, heads)
    return cfg, shape, min(num_sms, tiles // 2 if cfg.schedule == "pairs" else tiles)


def signature(cfg: Config, dtype: str) -> dict[str, Any]:
    """The types of the kernel's arguments but `cfg`; "bf16" or "fp16" tensors."""
    element = {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]
    layout = gl.NVMMASharedLayout.get_default_for([1, 64, 1, cfg.headdim], element)
    rows = dict(q=64, k=cfg.BLOCK_N, v=cfg.BLOCK_N, o=64, k_redo=64, v_redo=64)
    types: dict[str, Any] = {
        f"{name}_desc": f"tensordesc<{dtype}[1, {n}, 1, {cfg.headdim}],{layout!r}>"
        for name, n in rows.items()
    }
    types |= {"o_ptr": f"*{dtype}", "lse_ptr": "*fp32", "counter_ptr": "*i32"}
    types["qk_scale"] = "fp32"
    types["shape"] = Shape(*["i32"] * len(Shape._fields))
    return types
