"""Hugging Face transformers on these kernels: a tiny random Llama under Triton's interpreter.

The cases run in one subprocess, this file run as a script; the masks are checked in this process.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if __name__ != "__main__" and importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

NEW_TOKENS = 3
WARNING = "the cache limit of 13 tokens is reached"


def llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=192, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, head_dim=64, max_position_embeddings=256,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(2, 97, (2, 12))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 5)):
        ids[row, :padding] = mask[row, :padding] = 0
    return model, ids, mask


def tokens() -> dict:
    """Greedy tokens against those of `eager`, and how often each operator ran."""
    import torch
    from transformers import StaticCache

    from attn_ladder import serving
    from attn_ladder.integrations.transformers import BoundedCache, register

    register()
    register()
    model, ids, mask = llama()
    launches = []
    launch = serving.kernels.launch
    serving.kernels.launch = lambda *a, **k: launches.append(a[1].shape) or launch(*a, **k)

    def generate(implementation, ids=ids, mask=mask, **arguments):
        model.set_attn_implementation(implementation)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            do_sample=False, **arguments,
        )  # fmt: skip
        return out[:, ids.shape[1] :].tolist()

    want = generate("eager")
    done = {}
    for name, arguments in {
        "dynamic cache": {},
        "static cache": {"cache_implementation": "static", "disable_compile": True},
        "bounded cache": {"past_key_values": BoundedCache(model.config, 32)},
        "past the limit": {"past_key_values": BoundedCache(model.config, 13)},
    }.items():
        launches.clear()
        done[name] = [generate("attn_ladder", **arguments) == want, len(launches)]
    done["heads"] = launches[-1][2]  # the last call's key heads
    plain = generate("attn_ladder", ids[:1], mask[:1])
    done["one prompt without padding"] = [plain == want[:1], len(launches)]
    alone = generate("attn_ladder", ids[1:2, 5:], mask[1:2, 5:])
    done["alone"] = alone == want[1:2]
    done["without its padding mask"] = generate("attn_ladder", ids, torch.ones_like(mask)) == want

    def step(implementation, compiled):
        model.set_attn_implementation(implementation)
        cache = StaticCache(config=model.config, max_cache_len=16)
        longer = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        forward = model.forward
        if compiled:
            forward = torch.compile(forward, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            position = (longer.cumsum(1) - 1)[:, -1:]
            given = {"attention_mask": longer, "position_ids": position, "past_key_values": cache}
            return forward(ids[:, -1:], **given).logits

    compiled = step("attn_ladder", True)
    done["compiled"] = [
        torch.equal(compiled, step("attn_ladder", False)),
        torch.allclose(compiled, step("eager", False), atol=1e-4),
    ]
    model.set_attn_implementation("attn_ladder")
    try:
        model(ids, attention_mask=mask)
        done["gradients"] = "accepted"
    except NotImplementedError as error:
        done["gradients"] = str(error)
    return done


def operators() -> dict:
    """`opcheck` of every operator, and of one whose fake implementation is wrong."""
    import torch

    import attn_ladder

    assert attn_ladder.attention_varlen  # the first use registers the operators

    ints = lambda *x: torch.tensor(x, dtype=torch.int32)
    ops = torch.ops.attn_ladder
    q, k, v = torch.randn(2, 1, 2, 64), torch.randn(2, 20, 1, 64), torch.randn(2, 20, 1, 64)
    new = torch.randn(2, 1, 1, 64)
    bounds = torch.tensor([[0, 20, 19], [3, 17, 16]], dtype=torch.int32)
    packed = (q[:, 0], k[0], v[0], ints(0, 1, 2), ints(0, 5, 20), 1, True, None)
    done = {}
    for name, arguments in {
        "dense": (q, k, v, False, None),
        "ranged": (q, k, v, bounds, None),
        "decode": (q, k, v, new, new, ints(5, 19), None, None, True, None),
        "varlen": packed,
    }.items():
        result = torch.library.opcheck(getattr(ops, name), arguments)
        done[name] = set(result.values()) == {"SUCCESS"}

    def appended(compiled):
        cache = k.clone(), v.clone()

        def step(*tensors):
            return attn_ladder.attention_with_kvcache(
                *tensors, k=new, v=new, cache_seqlens=ints(5, 19)
            )

        if compiled:
            step = torch.compile(step, fullgraph=True, backend="aot_eager")
        return step(q, *cache), *cache

    pairs = list(zip(appended(True), appended(False), strict=True))
    done["compiled append"] = all(torch.equal(a, b) for a, b in pairs)
    done["appended"] = not torch.equal(pairs[1][0], k)

    @torch.library.custom_op("attn_ladder_test::wrong", mutates_args=())
    def wrong(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @wrong.register_fake
    def _(x):
        return x.new_empty(x.shape[0] + 1)

    try:
        torch.library.opcheck(wrong, (torch.ones(3),))
        done["wrong"] = True
    except Exception:
        done["wrong"] = False
    return done


def run(what: str) -> tuple[dict, str]:
    done = subprocess.run(
        [sys.executable, __file__, what],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def outcome():
    return run("tokens")


@pytest.mark.parametrize(
    "name", ["dynamic cache", "static cache", "bounded cache", "past the limit"]
)
def test_greedy_tokens_equal_those_of_eager(outcome, name):
    same, launches = outcome[0][name]
    assert same
    assert launches == 2 * NEW_TOKENS  # these kernels ran, in both layers, at every step


def test_a_prompt_without_padding_runs_the_prefill_kernel(outcome):
    same, launches = outcome[0]["one prompt without padding"]
    assert same
    assert launches == 2 * NEW_TOKENS + 2 * (NEW_TOKENS - 1)  # those of "past the limit" before


def test_a_padded_prompt_gives_the_tokens_it_gives_alone(outcome):
    assert outcome[0]["alone"]


def test_a_dropped_padding_mask_would_be_seen(outcome):
    assert not outcome[0]["without its padding mask"]


def test_key_heads_are_not_expanded(outcome):
    assert outcome[0]["heads"] == 1


def test_the_end_of_the_cache_is_told_once(outcome):
    assert outcome[1].count(WARNING) == 1


def test_a_compiled_step_has_no_graph_break_and_the_same_bits(outcome):
    assert outcome[0]["compiled"] == [True, True]


def test_gradients_are_refused(outcome):
    assert "q.requires_grad=True" in outcome[0]["gradients"]


def test_operators_pass_opcheck_and_compile_and_a_wrong_one_does_not():
    done, _ = run("operators")
    assert not done.pop("wrong")
    assert all(done.values()), done


def test_masks_become_ranges_of_keys():
    import torch

    from attn_ladder.integrations.transformers import EVERY_KEY, key_range
    from attn_ladder.reference import visible

    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    ranges = key_range(3, 5, 5, attention_mask=mask)
    assert ranges.shape == (3, 1, 1, 3) and ranges.dtype == torch.int32
    keys, queries = torch.arange(5), torch.arange(5)[:, None]
    for row, (first, end, position) in enumerate(ranges.view(3, 3).tolist()):
        seen = (keys >= first) & (keys < end) & (keys <= position + queries)
        assert torch.equal(seen, visible(5, 5, True, "cpu") & mask[row])
    assert key_range(3, 5, 5, attention_mask=torch.ones_like(mask)) is None
    assert key_range(1, 5, 5) is None
    static = key_range(2, 1, 16, q_offset=torch.tensor(6))
    assert static.view(2, 3).tolist() == [[0, 7, 6]] * 2
    from transformers.masking_utils import bidirectional_mask_function

    full = key_range(1, 5, 5, mask_function=bidirectional_mask_function)
    assert full.view(3).tolist() == [0, 5, EVERY_KEY]


def test_masks_that_no_range_expresses_are_refused():
    import torch
    from transformers.masking_utils import sliding_window_causal_mask_function

    from attn_ladder.integrations.transformers import attention_forward, key_range

    holes = torch.tensor([[1, 0, 1, 1, 1]], dtype=torch.bool)
    for arguments, message in (
        ({"attention_mask": holes}, "padding between tokens"),
        ({"mask_function": sliding_window_causal_mask_function(2)}, "mask_function="),
        ({"use_vmap": True}, "use_vmap=True"),
        ({"local_size": 4}, "local_size=4"),
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, r"attention_mask\.shape=\(1, 1, 5, 5\)"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            key_range(1, 5, 5, **arguments)

    from attn_ladder import serving

    q = torch.ones(1, 2, 5, 64, dtype=torch.float16)
    module = torch.nn.Module()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "INTERPRETED", True)
        for arguments, message in (
            ({"attention_mask": torch.ones(1, 1, 5, 5, dtype=torch.bool)}, "torch.bool"),
            ({"attention_mask": None, "softcap": 30.0}, "softcap=30.0"),
            ({"attention_mask": None, "dropout": 0.1}, "dropout=0.1"),
        ):
            with pytest.raises(NotImplementedError, match=message):
                attention_forward(module, q, q, q, **arguments)
        with pytest.raises(NotImplementedError, match="attention_mask=None with 1 queries"):
            attention_forward(module, q[:, :, :1], q, q, None)


@pytest.mark.parametrize("package", [False, True])
def test_transformers_imports_beside_the_folder_kernels(tmp_path, package):
    """Its own import looks for a package `kernels`; ours is a folder without `__init__.py`."""
    (tmp_path / "kernels").mkdir()
    if package:
        (tmp_path / "kernels" / "__init__.py").write_text("raise RuntimeError('executed')\n")
    code = (
        "import transformers\n"
        "from transformers import LlamaForCausalLM\n"
        "from attn_ladder.integrations.transformers import register; register(); print('fine')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path if package else ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["", str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
    )
    assert ("fine" in run.stdout) is not package, run.stderr[-2000:]


if __name__ == "__main__":
    print(json.dumps({"tokens": tokens, "operators": operators}[sys.argv[1]]()))
