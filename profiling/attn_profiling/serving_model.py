"""A Llama-architecture model on these kernels through transformers: tokens, memory, speed.

    python -m attn_profiling.serving_model --model FILE.gguf --out FILE [--seconds 240]

Greedy tokens of `attn_ladder` against those of `sdpa` and `eager`, alone and in batches padded on
the left, with a dynamic, a static and a bounded cache, past the bounded cache's limit. Where tokens
differ, both candidates' logits say whether it was a tie: the difference is compared with what
rounding did to the other logits of the same step. Then the memory of the cache with key heads as
they are and expanded, and prefill and decode in tokens per second; FA3 too where it is installed.

`--device cpu` (TRITON_INTERPRET=1) runs fewer and shorter prompts, and a tiny random Llama where no
file is named.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attn_profiling.serving_check import Report, _error

LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 64, 89, 128, 144, 200, 256, 377, 512, 777, 1024, 2048)
TEXT = Path(__file__).resolve().parents[2] / "LICENSE"
OURS = "attn_ladder"
FA3 = "attn_ladder_fa3"
ULPS = 2  # of the logits' number format: what a tie may differ by


@dataclass(frozen=True)
class Run:
    """What is run: sizes that differ between the real model and the tiny one."""

    new_tokens: int
    lengths: tuple[int, ...]
    prefill: tuple[tuple[int, int], ...]  # batch, tokens
    decode: tuple[tuple[int, int, int], ...]  # batch, tokens before, tokens timed
    repeats: int


REAL = Run(64, LENGTHS, ((1, 2048), (8, 2048)), ((1, 1024, 64), (16, 1024, 64)), 3)
TINY = Run(3, (1, 9), ((1, 12),), ((2, 8, 1),), 1)


def tiny_llama() -> Any:
    """A random Llama small enough for Triton's interpreter."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=192, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, head_dim=64, max_position_embeddings=256,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    return model.eval()


def load(path: Path, dtype: Any, device: str) -> tuple[Any, list[int]]:
    """The model of a GGUF file, and the token ids of a fixed text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**files, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(**files)
    return model.eval().to(device), tokenizer(TEXT.read_text())["input_ids"]


def register_fa3(module_name: str) -> None:
    """FA3 as an attention implementation, for sequences without padding. Raises `ImportError`."""
    import importlib

    from transformers import AttentionInterface, AttentionMaskInterface

    function = importlib.import_module(module_name).flash_attn_func

    def forward(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **_: Any
    ) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = function(q, k, v, softmax_scale=scaling, causal=True)
        return out[0] if isinstance(out, tuple) else out, None

    def no_mask(*args: Any, attention_mask: Any = None, **_: Any) -> None:
        if attention_mask is not None and not bool(attention_mask.all()):
            raise NotImplementedError("FA3 is registered here for sequences without padding only")

    AttentionInterface.register(FA3, forward)
    AttentionMaskInterface.register(FA3, no_mask)


class Runner:
    """Greedy decoding of one model with one attention implementation after the other."""

    def __init__(self, model: Any, text: list[int], run: Run) -> None:
        self.model, self.text, self.run = model, text, run
        self.device = next(model.parameters()).device

    def prompts(self, lengths: tuple[int, ...]) -> list[Any]:
        """A prompt for each length, (1, length), from different places of the text."""
        import torch

        found = []
        for i, length in enumerate(lengths):
            start = min(37 * i, max(0, len(self.text) - length))
            piece = (self.text * (1 + length // len(self.text)))[start : start + length]
            found.append(torch.tensor([piece], device=self.device))
        return found

    def padded(self, prompts: list[Any]) -> tuple[Any, Any]:
        """Prompts as one batch with padding on the left, and its mask."""
        import torch

        longest = max(prompt.shape[1] for prompt in prompts)
        pad = self.model.config.pad_token_id or 0
        ids = torch.full((len(prompts), longest), pad, device=self.device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - prompt.shape[1] :] = prompt[0]
            mask[row, longest - prompt.shape[1] :] = 1
        return ids, mask

    def greedy(self, implementation: str, ids: Any, mask: Any, cache: str) -> tuple[Any, Any]:
        """Tokens (batch, new) and their logits (batch, new, vocabulary)."""
        import torch

        from attn_ladder.integrations.transformers import BoundedCache

        count = self.run.new_tokens
        self.model.set_attn_implementation(implementation)
        arguments: dict[str, Any] = {}
        if cache == "static":
            arguments = {"cache_implementation": "static", "disable_compile": True}
        elif cache.startswith("bounded"):
            limit = ids.shape[1] + (count // 2 if cache.endswith("past") else count)
            arguments = {"past_key_values": BoundedCache(self.model.config, limit)}
        with torch.no_grad():
            done = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count,
                do_sample=False, eos_token_id=None, pad_token_id=self.model.config.pad_token_id,
                return_dict_in_generate=True, output_logits=True, **arguments,
            )  # fmt: skip
        return done.sequences[:, ids.shape[1] :], torch.stack(done.logits, 1).float()


def ulp(torch: Any, value: float, dtype: Any) -> float:
    """The distance of a number to the next one of a number format."""
    x = torch.tensor(abs(value), dtype=dtype)
    return float((torch.nextafter(x, torch.full_like(x, float("inf"))) - x).float())


def agreement(tokens: Any, logits: Any, want: Any, want_logits: Any, dtype: Any) -> dict[str, Any]:
    """How far two rows of greedy tokens agree, and what the first difference looks like.

    `margin`: by how much the reference prefers its token to ours. `rounding`: the largest
    difference of the two logits at that step. A tie is a margin within both implementations'
    rounding, 2 * `rounding`, and within ULPS of the logits' format.
    """
    import torch

    differs = (tokens != want).nonzero()
    if not len(differs):
        return {"same": True, "agree": len(want)}
    step = int(differs[0])
    ours, theirs = int(tokens[step]), int(want[step])
    margin = float(want_logits[step, theirs] - want_logits[step, ours])
    rounding = float((logits[step] - want_logits[step]).abs().max())
    unit = ulp(torch, float(want_logits[step, theirs]), dtype)
    return {
        "same": False, "agree": step, "margin": margin, "rounding": rounding, "ulp": unit,
        "tie": margin <= 2 * rounding and margin <= ULPS * unit,
    }  # fmt: skip


def token_cases(runner: Runner) -> list[tuple[str, list[Any], str]]:
    """(name, prompts that form a batch, cache), what matters most first."""
    prompts = runner.prompts(runner.run.lengths)
    short = [prompt for prompt in prompts if prompt.shape[1] <= 256]
    cases = [
        ("batch of all", prompts, "dynamic"),
        ("batch of all", prompts, "static"),
        ("batch of the short", short, "bounded"),
        ("batch of the short", short, "bounded, past"),
    ]
    middle = prompts[len(prompts) // 2]
    cases += [("alone", [middle], cache) for cache in ("static", "bounded", "bounded, past")]
    return cases + [("alone", [prompt], "dynamic") for prompt in prompts]


def check_tokens(report: Report, runner: Runner, references: tuple[str, ...], share: float) -> None:
    """Every case against every reference, a row of the report for each prompt."""
    dtype = runner.model.dtype
    known: dict[Any, Any] = {}  # the references' results, as several caches of ours share them
    for name, prompts, cache in token_cases(runner):
        if report.over(share):
            return
        ids, mask = runner.padded(prompts)
        plain = "dynamic" if cache.startswith("bounded") else cache
        try:
            tokens, logits = runner.greedy(OURS, ids, mask, cache)
            for reference in references:
                key = (reference, plain, tuple(prompt.shape[1] for prompt in prompts))
                if key not in known:
                    known[key] = runner.greedy(reference, ids, mask, plain)
                want, want_logits = known[key]
                for row, prompt in enumerate(prompts):
                    found = agreement(tokens[row], logits[row], want[row], want_logits[row], dtype)
                    entry = {
                        "case": name, "cache": cache, "against": reference,
                        "prompt_tokens": prompt.shape[1], "new_tokens": len(want[row]),
                        "dtype": str(dtype), **found,
                    }  # fmt: skip
                    report.add("token_agreement", entry)
        except Exception as error:
            report.add("token_agreement", {"case": name, "cache": cache, "error": _error(error)})


def check_memory(report: Report, runner: Runner) -> None:
    """Bytes of a dynamic cache as it is, and with key heads expanded to query heads."""
    import torch

    batch, tokens = runner.run.prefill[-1]
    ids = runner.prompts((tokens,))[0].expand(batch, -1).contiguous()
    runner.model.set_attn_implementation(OURS)
    on_gpu = runner.device.type == "cuda"

    def allocated() -> int:
        return int(torch.cuda.memory_allocated()) if on_gpu else 0

    with torch.no_grad():
        runner.model(ids[:, :2], use_cache=True)
        before = allocated()
        cache = runner.model(ids, use_cache=True, logits_to_keep=1).past_key_values
        held = allocated() - before
        config = runner.model.config
        group = config.num_attention_heads // config.num_key_value_heads
        stored = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        before = allocated()
        expanded = [x.repeat_interleave(group, dim=1) for x in stored]
        held_expanded = allocated() - before
    report.data["memory"] = {
        "batch": batch, "tokens": tokens, "group": group,
        "cache_bytes": sum(x.numel() * x.element_size() for x in stored),
        "expanded_bytes": sum(x.numel() * x.element_size() for x in expanded),
        "allocated_bytes": held, "allocated_expanded_bytes": held_expanded,
    }  # fmt: skip
    report.write()


def timed(device: Any, call: Callable[[], Any], repeats: int) -> list[float]:
    """Wall seconds of a call that is waited for, the first one left out."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    found = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        call()
        wait()
        found.append(time.perf_counter() - start)
    return found[1:]


CAPTURED_STEPS = 3  # what `captured` itself stores in the cache


def captured(model: Any, ids: Any, steps: int) -> Callable[[], Any]:
    """One decode step with a static cache as a CUDA graph; returns its replay, of which `steps` can
    be made: each stores a token more, and the cache would be overrun."""
    import torch
    from transformers import StaticCache

    before = ids.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=before + CAPTURED_STEPS + steps)
    model(ids, past_key_values=cache, logits_to_keep=1)
    token, position = ids[:, -1:].contiguous(), torch.full_like(ids[:, :1], before)

    def step() -> Any:
        return model(token, position_ids=position, past_key_values=cache).logits

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()
    return lambda: (graph.replay(), kept)


def check_speed(report: Report, runner: Runner, implementations: list[str]) -> None:
    """Prefill and decode of every implementation, tokens per second of wall time, in turns."""
    import torch

    model, run = runner.model, runner.run

    def add(kind: str, implementation: str, batch: int, before: int, tokens: int,
            call: Callable[[], Any]) -> None:  # fmt: skip
        row: dict[str, Any] = {
            "kind": kind, "implementation": implementation, "batch": batch, "before": before,
            "dtype": str(model.dtype),
        }  # fmt: skip
        try:
            with torch.no_grad():
                model.set_attn_implementation(implementation)
                seconds = timed(runner.device, call, run.repeats)
            row |= {"seconds": seconds, "tokens": tokens}
            row["tokens_per_s"] = batch * tokens / statistics.median(seconds)
        except Exception as error:
            row["error"] = _error(error)
        report.add("speed", row)

    def batch_of(batch: int, tokens: int) -> Any:
        return runner.prompts((tokens,))[0].expand(batch, -1).contiguous()

    for batch, tokens in run.prefill:
        ids = batch_of(batch, tokens)
        for name in implementations:
            if report.over():
                return
            add("prefill", name, batch, 0, tokens,
                lambda ids=ids: model(ids, logits_to_keep=1))  # type: ignore[misc]  # fmt: skip
    for batch, before, count in run.decode:
        ids = batch_of(batch, before)
        for name in implementations:
            if report.over():
                return

            def steps(ids: Any = ids, count: int = count) -> None:
                cache = model(ids, logits_to_keep=1).past_key_values
                token = ids[:, -1:]
                for _ in range(count):
                    done = model(token, past_key_values=cache)
                    token = done.logits[:, -1:].argmax(-1)

            add("prefill and decode, eager", name, batch, before, count, steps)
            if runner.device.type != "cuda" or name == FA3:
                continue
            try:
                model.set_attn_implementation(name)
                with torch.no_grad():
                    replay = captured(model, ids, (run.repeats + 1) * count)
            except Exception as error:
                report.add(
                    "speed",
                    {"kind": "decode, graph", "implementation": name, "batch": batch,
                     "before": before, "error": _error(error)},
                )  # fmt: skip
                continue

            def replays(replay: Callable[[], Any] = replay, count: int = count) -> None:
                for _ in range(count):
                    replay()

            add("decode, graph", name, batch, before, count, replays)


def table(data: dict[str, Any]) -> str:
    """The short report."""
    lines = []
    rows = data["token_agreement"]
    for key in dict.fromkeys((r["case"], r["cache"], r.get("against")) for r in rows):
        group = [r for r in rows if (r["case"], r["cache"], r.get("against")) == key]
        errors = [r["error"] for r in group if "error" in r]
        same = sum(r.get("same", False) for r in group)
        ties = sum(r.get("tie", False) for r in group)
        lines.append(
            f"{key[0]:20} {key[1]:14} {key[2] or '':6}: {same} of {len(group)} prompts the same,"
            f" {ties} ties, {len(group) - same - ties - len(errors)} different"
            + "".join(f"; {error}" for error in errors)
        )
        for row in group:
            if not row.get("same", True):
                lines.append(
                    f"    {row['prompt_tokens']} tokens: differs at {row['agree']}, margin"
                    f" {row['margin']:.4g}, rounding {row['rounding']:.4g}, ulp {row['ulp']:.4g}"
                )
    if "memory" in data:
        memory = data["memory"]
        lines.append(
            f"cache: {memory['cache_bytes'] / 1e6:.1f} MB, expanded"
            f" {memory['expanded_bytes'] / 1e6:.1f} MB"
        )
    for row in data["speed"]:
        rate = f"{row['tokens_per_s']:.0f} tokens/s" if "tokens_per_s" in row else row["error"]
        lines.append(
            f"{row['kind']:26} batch {row['batch']:3} after {row['before']:5}"
            f" {row['implementation']:16} {rate}"
        )
    for word in ("fa3", "error", "stopped"):
        if data.get(word):
            lines.append(f"{word}: {data[word]}")
    return "\n".join([*lines, f"{data['elapsed_s']:.1f} s"])


def main(arguments: list[str] | None = None) -> int:
    """Run everything; 1 where a token differs without a tie, or something failed."""
    parser = argparse.ArgumentParser(prog="python -m attn_profiling.serving_model")
    parser.add_argument("--model", type=Path, help="a GGUF file of a Llama-architecture model")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--seconds", type=float, default=240.0, help="stop after so many")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--fa3", default=os.environ.get("ATTN_LADDER_FA3_MODULE", "fa3_fwd_interface")
    )
    options = parser.parse_args(arguments)
    tiny = options.device == "cpu" and options.model is None
    if options.model is None and not tiny:
        parser.error("--model names a GGUF file")
    faulthandler.dump_traceback_later(options.seconds + 120, exit=True)
    import torch
    import transformers

    from attn_ladder.integrations.transformers import register

    report = Report(options.out, options.seconds)
    report.data = {
        "stopped": None, "token_agreement": [], "speed": [],
        "facts": {"torch": torch.__version__, "transformers": transformers.__version__},
        "model": str(options.model), "dtype": options.dtype,
    }  # fmt: skip
    try:
        register()
        if tiny:
            model, text = tiny_llama(), list(range(2, 97))
        else:
            model, text = load(options.model, getattr(torch, options.dtype), options.device)
        runner = Runner(model, text, TINY if options.device == "cpu" else REAL)
        implementations = [OURS, "sdpa"]
        if options.device == "cuda":
            report.data["facts"]["gpu"] = torch.cuda.get_device_name()
            try:
                register_fa3(options.fa3)
                implementations.append(FA3)
            except Exception as error:
                report.data["fa3"] = _error(error)
        check_speed(report, runner, implementations)
        check_memory(report, runner)
        check_tokens(report, runner, ("sdpa", "eager"), 1.0)
    except Exception as error:
        report.data["error"] = _error(error)
    report.write()
    print(table(report.data))
    faulthandler.cancel_dump_traceback_later()
    rows = report.data["token_agreement"]
    wrong = [r for r in rows if "error" in r or not (r["same"] or r["tie"])]
    return int(bool(wrong) or "error" in report.data or not rows)


if __name__ == "__main__":
    sys.exit(main())
