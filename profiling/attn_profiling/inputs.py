"""Inputs that are fresh: random, never zeros, at another address for every call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attn_ladder.problem import Problem

Tensors = tuple[Any, Any, Any]


def dtype_of(torch: Any, problem: Problem) -> Any:
    """The torch dtype of a problem."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[problem.dtype]


def shapes(problem: Problem) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of Q, and of K and V."""
    return (
        (problem.batch, problem.seqlen_q, problem.nheads, problem.headdim),
        (problem.batch, problem.seqlen_k, problem.nheads_k, problem.headdim),
    )


def draw(torch: Any, problem: Problem, seed: int, device: str) -> Tensors:
    """Q, K and V from a standard normal distribution."""
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = dtype_of(torch, problem)
    q_shape, k_shape = shapes(problem)
    q, k, v = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype)
        for shape in (q_shape, k_shape, k_shape)
    )
    return q, k, v


GROWTH = 40.0
GROWTH_KEYS = 128


def strided(inputs: Tensors) -> Tensors:
    """The same values as views of larger tensors, with NaN around each: no dimension but the last
    is contiguous, and all strides are multiples of 16 bytes."""

    def view(x: Any) -> Any:
        batch, seqlen, nheads, headdim = x.shape
        room = x.new_full((batch, seqlen + 1, nheads + 1, headdim), float("nan"))
        room[:, :seqlen, :nheads] = x
        return room[:, :seqlen, :nheads]

    q, k, v = inputs
    return view(q), view(k), view(v)


def grown(inputs: Tensors) -> Tensors:
    """The same inputs with scores that grow by orders of magnitude along a row.

    Queries are GROWTH times as large, and GROWTH_KEYS consecutive keys a hundredth: the first,
    middle or last of the sequence, in turn over the key heads. A kernel that takes its softmax
    relative to the maximum of those keys leaves the range of its number format.
    """
    q, k, v = inputs
    k = k.clone()
    keys = min(GROWTH_KEYS, k.shape[1])
    starts = (0, (k.shape[1] - keys) // 2 // keys * keys, k.shape[1] - keys)
    for place, start in enumerate(starts):
        k[:, start : start + keys, place::3] *= 0.01
    return q * GROWTH, k, v


class Rotation:
    """`count` sets of inputs, no two at the same address.

    They are windows on one random buffer for each of Q, K and V, each window a token further, so
    many sets cost the memory of one.
    """

    def __init__(self, torch: Any, problem: Problem, count: int, seed: int, device: str) -> None:
        if count < 1:
            raise ValueError(f"{count=} must be at least 1")
        self.count = count
        generator = torch.Generator(device=device).manual_seed(seed)
        dtype = dtype_of(torch, problem)
        q_shape, k_shape = shapes(problem)
        self._windows = []
        for shape in (q_shape, k_shape, k_shape):
            step = shape[2] * shape[3]
            size = shape[0] * shape[1] * step
            buffer = torch.randn(
                size + (count - 1) * step, generator=generator, device=device, dtype=dtype
            )
            self._windows.append(
                [buffer[i * step : i * step + size].view(shape) for i in range(count)]
            )
        for windows in self._windows:
            if len({window.data_ptr() for window in windows}) != count:
                raise RuntimeError("two sets of inputs share an address; they would be reused")

    def __getitem__(self, index: int) -> Tensors:
        q, k, v = (windows[index % self.count] for windows in self._windows)
        return q, k, v


def bound(
    forward: Callable[..., Any],
    rotation: Rotation,
    causal: bool,
    config: Mapping[str, Any] | None,
) -> Callable[[int], Any]:
    """A call of a subject with everything fixed but the number of its inputs.

    A subject's own default configuration is not passed: a control binds its dose there.
    """
    chosen = {} if config is None else {"config": config}

    def call(i: int) -> Any:
        q, k, v = rotation[i]
        return forward(q, k, v, causal=causal, **chosen)

    return call
