"""A Llama-architecture model on these kernels through transformers: tokens, memory, speed.

    python -m attn_profiling.serving_model --model FILE.gguf --out FILE [--seconds 240]

Prefill and decode in tokens per second, FA3 too where it is installed, and the memory of the cache
with key heads as they are and expanded. Then greedy tokens of `attn_ladder` against those of `sdpa`
and `eager`, and of these two against each other, in bf16 and fp16, alone and in batches padded on
the left, with a dynamic, a static and a bounded cache, past the bounded cache's limit. Where tokens
differ, the same weights in fp32 say whether it was a tie (`serving_tokens.agreement`).

`--device cpu` (TRITON_INTERPRET=1) runs fewer and shorter prompts, and a tiny random Llama where no
file is named.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attn_profiling.serving_check import Report, _error
from attn_profiling.serving_tokens import OURS, check_tokens

LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 64, 89, 128, 144, 200, 256, 377, 512, 777, 1024, 2048)
TEXT = Path(__file__).resolve().parents[2] / "LICENSE"
FA3 = "attn_ladder_fa3"
DTYPES = ("bfloat16", "float16")
GRACE_S = 30.0  # in which a process ends what it has begun
SHARES = 3  # processes side by side for the tokens of a number format: the host is the limit


@dataclass(frozen=True)
class Run:
    """What is run: sizes that differ between the real model and the tiny one."""

    new_tokens: int
    lengths: tuple[int, ...]
    prefill: tuple[tuple[int, int], ...]  # batch, tokens
    decode: tuple[tuple[int, int, int], ...]  # batch, tokens before, tokens timed
    repeats: int


REAL = Run(64, LENGTHS, ((1, 2048), (8, 2048)), ((1, 1024, 64), (16, 1024, 64)), 5)
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


def tokens_side_by_side(report: Report, options: argparse.Namespace) -> None:
    """`check_tokens` in processes of their own, for every number format; none outlives this one."""
    parts = [(dtype, k) for dtype in DTYPES for k in range(SHARES)]
    files = [options.out.with_name(f"{options.out.name}.{dtype}.{k}") for dtype, k in parts]
    left = max(1.0, report.seconds - report.elapsed() - GRACE_S)  # then a worker leaves the rest
    command = [sys.executable, "-m", "attn_profiling.serving_model", "--device", options.device]
    command += ["--model", str(options.model), "--seconds", f"{left:g}"]
    workers: list[subprocess.Popen[bytes]] = []
    errors = []
    try:
        for (dtype, k), path in zip(parts, files, strict=True):
            path.unlink(missing_ok=True)
            more = ["--dtype", dtype, "--tokens", f"{k}/{SHARES}", "--out", str(path)]
            workers.append(subprocess.Popen([*command, *more]))
        end = time.monotonic() + left + GRACE_S
        for worker, (dtype, k), path in zip(workers, parts, files, strict=True):
            try:
                code: int | None = worker.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
            found = json.loads(path.read_text()) if path.is_file() else {"token_agreement": []}
            path.unlink(missing_ok=True)
            report.data["token_agreement"] += found["token_agreement"]
            said = [found[word] for word in ("error", "stopped") if found.get(word)]
            if code is None:
                said.append(f"did not end within {left + GRACE_S:.0f} s")
            elif code not in (0, 1) or not found["token_agreement"]:
                said.append(f"ended with exit status {code}")
            errors += [f"tokens in {dtype}, part {k}: {text}" for text in said]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    if errors:
        report.data["error"] = "; ".join(errors)
    report.write()


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


def timed_in_turn(
    device: Any, calls: dict[str, Callable[[], Any]], choose: Callable[[str], Any], repeats: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """(wall seconds, errors) of calls that are waited for, by name.

    Each is made once before, and then once a round, in random order, so that what the host does
    besides falls on all of them alike. `choose` prepares for a name, unmeasured. What fails is left
    out from then on.
    """
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    found: dict[str, list[float]] = {name: [] for name in calls}
    errors: dict[str, str] = {}
    order = random.Random(0)
    for _ in range(repeats + 1):
        names = [name for name in calls if name not in errors]
        for name in order.sample(names, len(names)):
            try:
                choose(name)
                wait()
                start = time.perf_counter()
                calls[name]()
                wait()
                found[name].append(time.perf_counter() - start)
            except Exception as error:
                errors[name] = _error(error)
    return {name: taken[1:] for name, taken in found.items() if name not in errors}, errors


CAPTURED_STEPS = 3  # what `captured` itself stores in the cache


def captured(model: Any, ids: Any, steps: int) -> Callable[[], Any]:
    """One decode step with a static cache as a CUDA graph; returns what replays it `steps` times,
    each of which stores a token more, from the end of `ids` on."""
    import torch
    from transformers import StaticCache

    before = ids.shape[1]
    room = before + max(CAPTURED_STEPS, steps)
    cache = StaticCache(config=model.config, max_cache_len=room)
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

    def replays() -> Any:
        rewind(cache, before)
        for _ in range(steps):
            graph.replay()
        return kept

    return replays


def rewind(cache: Any, tokens: int) -> None:
    """Have a static cache hold its first tokens only; their number is on the device."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(tokens)


def check_speed(report: Report, runner: Runner, implementations: list[str]) -> None:
    """Prefill and decode of every implementation, tokens per second of wall time, in turns."""
    import torch

    model, run = runner.model, runner.run

    def measure(kind: str, batch: int, before: int, tokens: int, repeats: int,
                calls: dict[str, Callable[[], Any]], errors: dict[str, str]) -> None:  # fmt: skip
        with torch.no_grad():
            found, more = timed_in_turn(
                runner.device, calls, model.set_attn_implementation, repeats
            )
        for name in [*calls, *errors]:
            row: dict[str, Any] = {
                "kind": kind, "implementation": name, "batch": batch, "before": before,
                "dtype": str(model.dtype),
            }  # fmt: skip
            if name in found:
                row |= {"seconds": found[name], "tokens": tokens, "in_turn": True}
                row["tokens_per_s"] = batch * tokens / statistics.median(found[name])
            else:
                row["error"] = {**errors, **more}[name]
            report.add("speed", row)

    def batch_of(batch: int, tokens: int) -> Any:
        return runner.prompts((tokens,))[0].expand(batch, -1).contiguous()

    for batch, tokens in run.prefill:
        ids = batch_of(batch, tokens)
        if report.over():
            return

        def prefill(ids: Any = ids) -> Any:
            return model(ids, logits_to_keep=1)

        measure("prefill", batch, 0, tokens, 4 * run.repeats,
                dict.fromkeys(implementations, prefill), {})  # fmt: skip
    for batch, before, count in run.decode:
        ids = batch_of(batch, before)
        if report.over():
            return

        def steps(ids: Any = ids, count: int = count) -> None:
            cache = model(ids, logits_to_keep=1).past_key_values
            token = ids[:, -1:]
            for _ in range(count):
                done = model(token, past_key_values=cache)
                token = done.logits[:, -1:].argmax(-1)

        measure("prefill and decode, eager", batch, before, count, run.repeats,
                dict.fromkeys(implementations, steps), {})  # fmt: skip
        if runner.device.type != "cuda":
            continue
        replays: dict[str, Callable[[], Any]] = {}
        errors: dict[str, str] = {}
        for name in implementations:
            if name == FA3:
                continue
            try:
                model.set_attn_implementation(name)
                with torch.no_grad():
                    replays[name] = captured(model, ids, count)
            except Exception as error:
                errors[name] = _error(error)
        measure("decode, graph", batch, before, count, 4 * run.repeats, replays, errors)


def table(data: dict[str, Any]) -> str:
    """The short report."""
    lines = []
    rows = data["token_agreement"]
    columns = ("dtype", "implementation", "case", "cache", "against")

    def place(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(name, "")).removeprefix("torch.") for name in columns)

    for key in dict.fromkeys(map(place, rows)):
        group = [r for r in rows if place(r) == key]
        errors = [r["error"] for r in group if "error" in r]
        same = sum(r.get("same", False) for r in group)
        ties = sum(r.get("tie", False) for r in group)
        lines.append(
            f"{key[0]:8} {key[1]:11} {key[2]:18} {key[3]:13} {key[4]:5}:"
            f" {same} of {len(group)} prompts the same, {ties} ties,"
            f" {len(group) - same - ties - len(errors)} different"
            + "".join(f"; {error}" for error in errors)
        )
        for row in group:
            if not row.get("same", True):
                lines.append(
                    f"    {row['prompt_tokens']} tokens: differs at {row['agree']}, margin"
                    f" {row['margin']:.4g}, exact {row['exact_margin']:.4g}, error"
                    f" {row['logit_error']:.4g}, the references' {row['reference_error']:.4g}"
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
    parser.add_argument("--tokens", help="K/N: only tokens, the K-th of N parts of the cases")
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
        if options.tokens:
            k, n = map(int, options.tokens.split("/"))
            check_tokens(report, runner, (k, n))
        else:
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
            if options.device == "cpu":
                check_tokens(report, runner)
            else:
                tokens_side_by_side(report, options)
    except Exception as error:
        report.data["error"] = _error(error)
    report.write()
    if not options.tokens:
        print(table(report.data))
    faulthandler.cancel_dump_traceback_later()
    rows = report.data["token_agreement"]
    ours = [r for r in rows if r.get("implementation", OURS) == OURS]
    wrong = [r for r in ours if "error" in r or not (r["same"] or r["tie"])]
    return int(bool(wrong) or "error" in report.data or not rows)


if __name__ == "__main__":
    sys.exit(main())
