"""A compiled kernel is found again whatever else the process has run."""

import pytest

from attn_ladder.stage import load
from attn_profiling import compile_cache


def key(name: str) -> str:
    """What Triton's cache knows the kernel of a subject by."""
    module = load(name)
    return str(getattr(module, "_stage", module).attention_kernel.cache_key)


@pytest.mark.parametrize(
    "name", ["stage3", "stage4", "stage5", "mask_all", "no_warp_specialization"]
)
def test_the_key_of_a_kernel_does_not_depend_on_what_was_called_before(name):
    alone = []
    for before in ([], ["stage5", "stage4"], ["no_warp_specialization", "fast_exp"]):
        compile_cache.forget_hashes()
        for other in before:
            compile_cache.forget_hashes()
            key(other)
        compile_cache.forget_hashes()
        alone.append(key(name))
    assert len(set(alone)) == 1


def test_without_forgetting_it_does():
    compile_cache.forget_hashes()
    first = key("mask_all")
    compile_cache.forget_hashes()
    key("stage5")
    assert key("mask_all") != first
