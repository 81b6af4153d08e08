"""The barriers, rings and turns of stage 5, run as written, in Python, in random orders.

The device functions are executed with stand-ins: a tensor remembers which blocks it came from, a
ring slot what was loaded into it. A wrong block, a slot that is overwritten while a product reads
it, two turns at once, and a deadlock are errors.
"""

import random
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from attn_ladder import stage5_everything as stage5
from attn_ladder import tiles


class Fault(Exception):
    pass


class Scheduler:
    """Runs threads one at a time and picks the next one at random among those that can go on."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.waiting, self.loads, self.faults = {}, [], []

    def run(self, functions):
        self.wake = {i: threading.Semaphore(0) for i in range(len(functions))}
        self.local = threading.local()
        self.idle = threading.Semaphore(0)
        threads = [
            threading.Thread(target=self.body, args=(i, f), daemon=True)
            for i, f in enumerate(functions)
        ]
        self.waiting = dict.fromkeys(range(len(threads)), lambda: True)
        for thread in threads:
            thread.start()
        while self.waiting and not self.faults:
            ready = [i for i, can in self.waiting.items() if can()] + ["load"] * bool(self.loads)
            if not ready:
                self.faults.append(Fault(f"deadlock of {sorted(self.waiting)}"))
                break
            chosen = self.random.choice(ready)
            if chosen == "load":
                self.loads.pop(0)()
                continue
            del self.waiting[chosen]
            self.wake[chosen].release()
            self.idle.acquire()
        if self.faults:
            raise self.faults[0]

    def body(self, i, function):
        self.local.number = i
        self.wake[i].acquire()
        try:
            function()
        except Exception as fault:
            self.faults.append(fault)
        self.idle.release()

    def until(self, condition):
        i = self.local.number
        self.waiting[i] = condition
        self.idle.release()
        self.wake[i].acquire()


class Tensor:
    """Remembers the block of its scores, or the blocks that were added to an accumulator."""

    type = SimpleNamespace(layout=None)
    dtype = None

    def __init__(self, tag=None, value=0):
        self.tag, self.value = tag, value

    def to(self, dtype):
        return self

    def __getitem__(self, key):
        return self

    def __add__(self, other):
        tag = self.tag or getattr(other, "tag", None)
        return Tensor(tag, self.value + getattr(other, "value", other))


for name in "sub mul truediv rsub rmul rtruediv radd and or lshift ge le eq".split():
    setattr(Tensor, f"__{name}__", lambda self, other: Tensor(self.tag))


class Slot:
    def __init__(self, ring, number):
        self.ring, self.number = ring, number

    def same(self, *args, **kwargs):
        return self

    reshape = permute = slice = same

    @property
    def state(self):
        return self.ring.content[self.number], self.ring.version[self.number]

    @property
    def tag(self):
        return self.state[0]

    def load(self, layout):
        return Tensor(self.tag)


class Ring:
    dtype = None

    def __init__(self, kind, depth):
        self.kind = kind
        self.content, self.version = [None] * depth, [0] * depth

    def index(self, number):
        return Slot(self, number)


class Barriers:
    def __init__(self, depth, arrivals):
        self.phase, self.pending, self.arrivals = [0] * depth, [arrivals] * depth, arrivals

    def index(self, number):
        return self, number

    def arrive(self, number):
        self.pending[number] -= 1
        if self.pending[number] == 0:
            self.phase[number] += 1
            self.pending[number] = self.arrivals


class Cta:
    """One CTA of a grid; other CTAs take tiles from the counter at random."""

    def __init__(self, cfg, shape, grid, index, seed):
        self.cfg, self.shape, self.index, self.grid = cfg, shape, index, grid
        self.scheduler = Scheduler(seed)
        self.turn = [0] * cfg.consumers
        self.products = [[] for _ in range(cfg.consumers + 1)]
        self.stored, self.counter, self.listed = [], 0, {}

    def wait(self, bar, phase, pred=True):
        bars, number = bar
        if pred:
            self.scheduler.until(lambda: bars.phase[number] & 1 != phase)

    def arrive(self, bar, count=1):
        bars, number = bar
        bars.arrive(number)

    def fill(self, desc, coord, ring, slot, phase):
        smem, ready, empty = ring
        self.wait(empty.index(slot), phase ^ 1)
        smem.content[slot] = (desc, *coord)
        smem.version[slot] += 1
        self.scheduler.loads.append(lambda: ready.arrive(slot))

    def take_turn(self, operation, index, cfg):
        if cfg.ping_pong and operation == "arrive":
            self.turn[index] += 1
            if self.turn[index] > 1:
                raise Fault(f"consumer {index} was given two turns")
        elif cfg.ping_pong:
            self.scheduler.until(lambda: self.turn[index] == 1)
            self.turn[index] = 0

    def multiply(self, a, b, acc, use_acc=True, is_async=True):
        read = [(x, x.state) for x in (a, b) if isinstance(x, Slot)]
        self.products[self.scheduler.local.number].append(read)
        if b.ring.kind == "k":
            return Tensor(("scores", a.tag, b.tag))
        blocks = acc.tag or ()
        if a.tag:
            _, q, k = a.tag
            if (k[1], k[2], k[3]) != (b.tag[1], b.tag[2], b.tag[3]):
                raise Fault(f"P of {k} times {b.tag}")
            blocks = (*blocks, (q, k))
        return Tensor(blocks)

    def complete(self, outstanding, deps):
        products = self.products[self.scheduler.local.number]
        while len(products) > outstanding:
            for slot, state in products.pop(0):
                if slot.state != state:
                    raise Fault(f"{state} was overwritten by {slot.state}")
        return deps[0] if len(deps) == 1 else tuple(deps)

    def atomic_add(self, pointer, value, sem):
        if pointer == "done":
            return 0
        self.counter += 1 + self.scheduler.random.randrange(self.grid)
        return self.counter

    def run(self, monkeypatch):
        cfg, shape = self.cfg, self.shape

        def ignore(*args, **kwargs):
            return Tensor()

        def same(x, *args, **kwargs):
            return x

        class Language:
            static_range = range

            def __getattr__(self, name):
                return ignore

        gl = Language()
        gl.program_id, gl.num_programs = lambda axis: self.index, lambda axis: self.grid
        gl.cdiv, gl.reduce = lambda a, b: -(-a // b), lambda *args: 0
        gl.where = lambda c, a, b: (a if c else b) if isinstance(c, bool) else Tensor()
        gl.convert_layout = gl.max = gl.sum = gl.reshape = same
        gl.atomic_add, gl.store = self.atomic_add, ignore
        monkeypatch.setattr(tiles, "gl", gl)
        fakes = dict(
            gl=gl, fill=self.fill, take_turn=self.take_turn, warpgroup_mma=self.multiply,
            warpgroup_mma_wait=self.complete, after=lambda i, c: (i + 1) % c.consumers,
            release=lambda ring, slot: ring[2].arrive(slot), row_layout=ignore, thread_sums=same,
            exp2=same, pin=same, hide=same, hide_diagonal=same, either=None,
            tma=SimpleNamespace(store_wait=ignore),
            mbarrier=SimpleNamespace(wait=self.wait, arrive=self.arrive),
            listed_tile=lambda i, smem, c: self.listed[i] if c.schedule == "dynamic" else i,
            store_tile=lambda acc, l, m_i, m, head, WG, *rest: self.stored.append(
                (m, head, WG, acc.tag)
            ),
        )  # fmt: skip
        for name in ("tile_of", "num_tiles"):
            fakes[name] = getattr(tiles, name).fn
        for name in DEVICE_FUNCTIONS:
            fakes[name] = getattr(stage5, name).fn
        for name, fake in fakes.items():
            monkeypatch.setattr(stage5, name, fake)
        consumers = cfg.consumers
        slots = consumers * cfg.num_q_buffers
        rings = [
            (Ring(kind, n), Barriers(n, 1), Barriers(n, arrivals))
            for kind, n, arrivals in (
                ("q", slots, 1),
                ("k", cfg.k_buffers, consumers),
                ("v", cfg.num_buffers, consumers),
            )
        ]
        smem = SimpleNamespace(
            index=lambda i: SimpleNamespace(store=lambda x: self.listed.update({i: x.value}))
        )
        listing = (smem, Barriers(8, 1))
        counter = Counter()
        given = ((), SimpleNamespace(dtype=None), rings, (Barriers(3, 1), Barriers(3, 1)), listing)
        given += (0, shape, 1.0)
        load = (("q", "k", "v"), rings, listing, counter, shape)
        functions = [lambda w=w: stage5.softmax_partition(given, w, cfg) for w in range(consumers)]
        self.scheduler.run([*functions, lambda: stage5.load_partition(load, cfg)])
        if any(self.turn):
            raise Fault(f"turns left: {self.turn}")
        return self.stored


class Counter:
    def to(self, dtype):
        return 1

    def __add__(self, other):
        return "done"


DEVICE_FUNCTIONS = [
    "key_blocks", "load_q", "load_partition", "blocks_of_rows", "pass_blocks", "first_scores",
    "first_softmax", "await_products", "key_step", "boundary_step", "softmax_partition",
]  # fmt: skip


def verify(cfg, shape, grid, index, seed, monkeypatch):
    """Every row of every tile meets every block it sees once, with the right Q."""
    with monkeypatch.context() as patch:
        stored = Cta(cfg, shape, grid, index, seed).run(patch)
    per_consumer = {w: [(m, h) for m, h, x, _ in stored if x == w] for w in range(cfg.consumers)}
    assert len(set(map(tuple, per_consumer.values()))) == 1 and per_consumer[0]
    for m, head, w, blocks in stored:
        b, h = divmod(head, shape.nheads)
        end = shape.seqlen_k
        if cfg.causal:
            row_end = m * cfg.BLOCK_M + 64 * w + 64
            end = min(end, row_end + shape.seqlen_k - shape.seqlen_q)
        starts = range(0, end, cfg.BLOCK_N)
        q = ("q", b, m * cfg.BLOCK_M + 64 * w, h, 0)
        assert [k for _, k in blocks] == [
            ("k", b, start, h // shape.group, 0) for start in reversed(starts)
        ]
        assert {used for used, _ in blocks} == {q}
    return per_consumer[0]


TWO = dict(headdim=128, consumers=2)
THREE = dict(headdim=64, consumers=3, num_buffers=3, num_q_buffers=2, q_in_registers=False)
BASES = {
    "full": dict(TWO, causal=False),
    "full-3": dict(THREE, causal=False),
    "causal": dict(TWO, causal=True),
    "half": dict(TWO, causal=True, half_diagonal=True, fixed_diagonal=True),
    "causal-3": dict(THREE, causal=True),
    "causal-3-shallow": dict(THREE, causal=True, num_buffers=2),
}
OPTIONS = {
    "apart": dict(),
    "apart-early": dict(early_q=True),
    "step": dict(boundary="step"),
    "step-early": dict(boundary="step", early_q=True),
    "step-early-k3": dict(boundary="step", early_q=True, num_k_buffers=3),
    "step-others": dict(boundary="step", overlap="others", early_q=True),
    "step-others-scores": dict(boundary="step", overlap="others", turn="scores", early_q=True),
    "step-others-issued": dict(boundary="step", overlap="others", turn="issued"),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("base", BASES)
def test_every_block_is_used_once_in_any_order_of_events(base, option, monkeypatch):
    values = {**BASES[base], **OPTIONS[option]}
    orders = ("static", "pairs", "dynamic") if values["causal"] else ("static",)
    for order in orders:
        for seqlen_q, seqlen_k in ((768, 768), (256, 512), (128, 128)):
            config = stage5.Config(**values, schedule=order)
            sizes = (2, seqlen_q, 4, config.headdim), (2, seqlen_k, 2, config.headdim)
            cfg, shape, grid = stage5.schedule(config, *sizes, config.causal, 3)
            for seed in range(2):
                verify(cfg, shape, grid, seed % grid, seed, monkeypatch)


def test_a_cta_without_a_tile_ends(monkeypatch):
    config = stage5.Config(**BASES["causal-3"], boundary="step")
    sizes = (1, 128, 1, 64), (1, 128, 1, 64)
    shape = stage5.schedule(config, *sizes, True, 132)[1]
    with monkeypatch.context() as patch:
        assert Cta(config, shape, 2, 1, 0).run(patch) == []


@pytest.mark.parametrize("wrong", ["early release", "a turn too few", "a shared slot of Q"])
def test_a_wrong_protocol_is_seen(wrong, monkeypatch):
    config = stage5.Config(**BASES["causal-3"], boundary="step", overlap="others")
    sizes = (2, 768, 4, 64), (2, 768, 4, 64)
    cfg, shape, grid = stage5.schedule(config, *sizes, True, 3)
    real = stage5.pass_blocks.fn

    def no_turn(number, it, k_ring, v_ring, WG, cfg):
        return real(number, it, k_ring, v_ring, WG, replace(cfg, ping_pong=False, overlap="own"))

    def early(s, acc, k_ring, k_slot, v_ring, slot, WG, cfg):
        k_ring[2].arrive(k_slot)
        v_ring[2].arrive(slot)
        stage5.take_turn("arrive", (WG + 1) % cfg.consumers, cfg)
        stage5.take_turn("sync", WG, cfg)
        stage5.take_turn("arrive", WG, cfg)
        stage5.take_turn("sync", WG, cfg)
        stage5.warpgroup_mma_wait(0, [s, acc])
        return s, acc

    replaced = {
        "early release": ("await_products", early),
        "a turn too few": ("pass_blocks", no_turn),
    }
    if wrong in replaced:
        name, function = replaced[wrong]
        monkeypatch.setattr(stage5, name, SimpleNamespace(fn=function))
    else:
        function = stage5.load_q.fn
        swapped = SimpleNamespace(fn=lambda t, ti, *rest: function(t, ti ^ 1, *rest))
        monkeypatch.setattr(stage5, "load_q", swapped)
    with pytest.raises((Fault, AssertionError)):
        for seed in range(20):
            verify(cfg, shape, grid, 0, seed, monkeypatch)
