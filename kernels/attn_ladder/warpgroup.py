"""What one warpgroup does on sm_90 that Gluon has no word for: layouts, rings, instructions."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere.async_copy import mbarrier_arrive
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.constexpr_function
def row_layout(columns):
    """Layout of a product of one warpgroup, [64, columns] in fp32: a thread has parts of 2 rows."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def store_layout(columns):
    """`row_layout`, but lanes and registers exchange one bit of the column, which takes shuffles: a
    thread has 4 columns in a row (8 bytes), four lanes have 16, a whole sector of memory."""
    registers = [[0, 1], [0, 2], [8, 0]]
    registers += [[0, 16 << i] for i in range((columns // 16).bit_length() - 1)]
    lanes = [[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, columns])


@gluon.jit
def unary(INSTRUCTION: gl.constexpr, x):
    return gl.inline_asm_elementwise(INSTRUCTION, "=f,f", [x], gl.float32, is_pure=True, pack=1)


@gluon.jit
def exp2(x):
    return unary("ex2.approx.ftz.f32 $0, $1;", x)


@gluon.jit
def pin(l_i):
    """Keep the softmax above the wait that follows. ptxas would hoist the wait, but not across an
    edge of the control flow, here an exit that is never taken (sums are not negative)."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred q; setp.lt.f32 q, $4, 0f00000000; @q exit;"
        " mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7; }",
        "=f,=f,=f,=f,f,f,f,f", [l_i], dtype=gl.float32, is_pure=False, pack=4,
    )  # fmt: skip


@gluon.jit
def opaque(x):
    """x, but nothing is known of it when the program is compiled."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def thread_sums(x):
    """[64, columns] to [64, 8]: sums within each thread, without a shuffle."""
    return gl.sum(gl.reshape(x, [64, x.shape[1] // 8, 8]), 1)


@gluon.constexpr_function
def turn_asm(operation, index):
    return f"bar.{operation} {8 + index}, 256; mov.b32 $0, $1;"


@gluon.constexpr_function
def after(index, cfg):
    return (index + 1) % cfg.consumers


@gluon.jit
def take_turn(OPERATION: gl.constexpr, INDEX: gl.constexpr, cfg: gl.constexpr):
    """Wait for the turn of consumer INDEX (`sync`) or hand it on to it (`arrive`), on a hardware
    barrier of two consumers that Triton leaves free."""
    if cfg.ping_pong:
        thread = gl.full([128], 0, gl.int32, gl.BlockedLayout([1], [32], [4], [0]))
        gl.inline_asm_elementwise(
            turn_asm(OPERATION, INDEX), "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.constexpr_function
def meet_asm(consumers):
    return f"bar.sync {8 + consumers}, {128 * consumers}; mov.b32 $0, $1;"


@gluon.jit
def meet(CONSUMERS: gl.constexpr):
    """Wait until all consumers are here, on a hardware barrier after those of their turns."""
    thread = gl.full([128], 0, gl.int32, gl.BlockedLayout([1], [32], [4], [0]))
    gl.inline_asm_elementwise(
        meet_asm(CONSUMERS), "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def either(a, b):
    return a | b


@gluon.jit
def barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def make_ring(desc, DEPTH: gl.constexpr, ARRIVALS: gl.constexpr):
    """Buffers for tiles of a descriptor, their *_ready_bar, and *_empty_bar with ARRIVALS."""
    SHAPE: gl.constexpr = desc.block_type.shape
    smem = gl.allocate_shared_memory(
        desc.dtype, [DEPTH, SHAPE[0], SHAPE[1], SHAPE[2], SHAPE[3]], desc.layout
    )
    return smem, barriers(DEPTH, 1), barriers(DEPTH, ARRIVALS)


@gluon.jit
def fill(desc, coord, ring, slot, phase):
    """Load a tile into a slot of a ring once it is free."""
    smem, ready_bar, empty_bar = ring
    mbarrier.wait(empty_bar.index(slot), phase ^ 1)
    mbarrier.expect(ready_bar.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, coord, ready_bar.index(slot), smem.index(slot))


@gluon.jit
def release(ring, slot):
    """Free a slot: all 128 threads arrive. Gluon's own arrive costs a `bar.sync`; this one, meant
    for asynchronous copies, does not, and arrives at once where none is outstanding."""
    mbarrier_arrive(ring[2].index(slot), increment_count=False)
