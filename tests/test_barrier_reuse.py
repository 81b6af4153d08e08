"""What touches the words of an mbarrier is found in PTX, in whatever form it is written."""

import pytest

from attn_ladder.offline import barrier_reuse

BARRIER = """
mov.b32 \t%r1, global_smem;
add.s32 \t%r2, %r1, 1024;
mbarrier.init.shared::cta.b64 [%r2], 1;
"""
LOAD = "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
STORE = "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group"
TOUCH = [
    "ld.shared.b32 %r4, [global_smem+1028];",
    "st.shared.v4.b32 [global_smem+1016], {%r4, %r5, %r6, %r7};",
    "st.shared.b8 [%r2+7], %r4;",
    "@%p1 st.shared.b32 [ %r2 + 0 ], %r4;",
    "atom.acquire.shared.cta.add.u32 %r4, [%r2], 1;",
    "red.shared.add.u32 [%r2], 1;",
    "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r2+-8], {%r4, %r5, %r6, %r7};",
    f"{LOAD} [%r2], [%rd4, {{%r4, %r5}}], [%r9];",
    f"{STORE} [%rd3, {{%r4, %r5}}], [%r2];",
    "add.u32 %r3, %r1, 1028;\nld.shared.b32 %r4, [%r3];",
    "or.b32 %r3, %r1, 1024;\nst.shared.b32 [%r3], %r4;",
    "xor.b32 %r3, %r2, %r7;\nst.shared.b32 [%r3], %r4;",
    "mad.lo.s32 %r3, %r6, 4, %r2;\nst.shared.b32 [%r3], %r4;",
    "shl.b32 %r8, %r6, 2;\nadd.s32 %r3, %r2, %r8;\nst.shared.b32 [%r3], %r4;",
]
PASS = [
    "st.shared.b32 [%r2+8], %r4;",
    "st.shared.v2.b32 [global_smem+1016], {%r4, %r5};",
    "ld.global.b32 %r4, [%rd2+1024];",
    "mbarrier.try_wait.parity.shared.b64 p, [%r2], %r4;",
    "cp.async.mbarrier.arrive.noinc.shared.b64 [%r2];",
    f"{LOAD} [%r1], [%rd4, {{%r4, %r5}}], [%r2];",
    "ld.shared.b8 %r4, [%r2+4];",
]


@pytest.mark.parametrize("access", TOUCH)
def test_what_touches_a_barrier_is_found(access):
    (found,) = barrier_reuse(BARRIER + access + "\n")
    assert found == access.splitlines()[-1].removesuffix(";")


@pytest.mark.parametrize("access", PASS)
def test_what_does_not_is_let_pass(access):
    assert barrier_reuse(BARRIER + access + "\n") == []
