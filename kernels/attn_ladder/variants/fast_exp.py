"""The top stage with a quarter of its exp2 on the FMA pipe instead of the MUFU.

exp2(x) = 2^n · p(f) with n the integer nearest to x and f = x - n in [-1/2, 1/2] (Cody and Waite,
1980), p a polynomial of degree 3 (minimax, relative error 9e-5, below the rounding of P to 16
bits), as FlashAttention-4 does where the MUFU is the narrowest pipe. Ten instructions instead of
one, so it pays only where issue slots are to spare.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attn_ladder import stage5_everything
from attn_ladder.stage import Variant
from attn_ladder.variants._copied import copied

VARIANT = Variant(
    title="Top stage with polynomial exp2",
    of="stage5",
    changes="one exp2 of four is a polynomial on the FMA pipe",
)

POLYNOMIAL = """{ .reg .f32 x, r, f, p; .reg .b32 e, b; .reg .pred q;
setp.lt.f32 q, $4, 0fC2FC0000;
max.ftz.f32 x, $4, 0fC2FC0000;
min.ftz.f32 x, x, 0f43000000;
add.rn.ftz.f32 r, x, 0f4B400000;
sub.rn.ftz.f32 f, r, 0f4B400000;
sub.rn.ftz.f32 f, x, f;
fma.rn.ftz.f32 p, f, 0f3D61FBB1, 0f3E786F0E;
fma.rn.ftz.f32 p, p, f, 0f3F31798D;
fma.rn.ftz.f32 p, p, f, 0f3F7FFB49;
mov.b32 e, r;
shl.b32 e, e, 23;
mov.b32 b, p;
add.s32 b, b, e;
selp.b32 b, 0, b, q;
mov.b32 $0, b; }
"""
ASM = gl.constexpr(POLYNOMIAL + "\n".join(f"ex2.approx.ftz.f32 ${i}, ${i + 4};" for i in (1, 2, 3)))


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise(
        ASM, "=f,=f,=f,=f,f,f,f,f", [x], dtype=gl.float32, is_pure=True, pack=4
    )


_stage = copied(stage5_everything, "fast_exp", exp2=exp2)
forward = _stage.forward
unsupported = _stage.unsupported
offline = _stage.offline
