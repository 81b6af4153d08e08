"""Greedy tokens of a model with one attention implementation against those of others.

Where tokens differ, the same weights in fp32 say whether it was a tie (`agreement`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from attn_profiling.serving_check import Report, _error

OURS = "attn_ladder"
REFERENCES = ("sdpa", "eager")
FACTOR = 2  # times the references' error: what a tie may differ by, as in the rule of FA3's tests


def ulp(torch: Any, value: float, dtype: Any) -> float:
    """The distance of a number to the next one of a number format."""
    x = torch.tensor(abs(value), dtype=dtype)
    return float((torch.nextafter(x, torch.full_like(x, float("inf"))) - x).float())


class Judge:
    """What the step after some tokens gives in fp32 with the same weights, and what the references
    make of it in the model's number format."""

    def __init__(self, runner: Any) -> None:
        import torch

        self.model = runner.model
        # as a module: transformers' own `float` refuses models that come from a GGUF file
        self.exact: Any = torch.nn.Module.float(copy.deepcopy(runner.model))
        self.exact.set_attn_implementation("eager")

    def __call__(self, ids: Any) -> tuple[Any, list[Any]]:
        """Logits (vocabulary) after ids (1, tokens), in fp32 and of each reference, in fp32 and
        without a cache."""
        import torch

        with torch.no_grad():
            exact = self.exact(ids, logits_to_keep=1).logits[0, -1]
            found = []
            for reference in REFERENCES:
                self.model.set_attn_implementation(reference)
                found.append(self.model(ids, logits_to_keep=1).logits[0, -1].float())
        return exact, found


def agreement(
    tokens: Any, logits: Any, want: Any, want_logits: Any, dtype: Any,
    judge: Callable[[int], tuple[Any, list[Any]]],
) -> dict[str, Any]:  # fmt: skip
    """How far two rows of greedy tokens agree, and what the first difference looks like.

    `margin`: by how much the reference prefers its token to ours; `rounding`: the largest
    difference of the two logits at that step; `ulp`: a unit of their number format.
    `judge(step)` gives the exact logits there and those of both references. `exact_margin` is what
    the former make of the margin. `logit_error` and `reference_error` are the largest distance of
    a logit from the exact one, ours and the largest of a reference.

    A tie: the exact margin and our error are both within FACTOR * `reference_error`.
    """
    import torch

    differs = (tokens != want).nonzero()
    if not len(differs):
        return {"same": True, "agree": len(want)}
    step = int(differs[0])
    ours, theirs = int(tokens[step]), int(want[step])
    exact, references = judge(step)

    def largest(found: Any) -> float:
        return float((found - exact).abs().max())

    error, bound = largest(logits[step]), max(map(largest, [want_logits[step], *references]))
    exact_margin = float(exact[theirs] - exact[ours])
    return {
        "same": False,
        "agree": step,
        "margin": float(want_logits[step, theirs] - want_logits[step, ours]),
        "rounding": float((logits[step] - want_logits[step]).abs().max()),
        "ulp": ulp(torch, float(want_logits[step, theirs]), dtype),
        "exact_margin": exact_margin,
        "logit_error": error,
        "reference_error": bound,
        "tie": abs(exact_margin) <= FACTOR * bound and error <= FACTOR * bound,
    }


def token_cases(runner: Any) -> list[tuple[str, list[Any], str]]:
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


def check_tokens(report: Report, runner: Any, share: tuple[int, int] = (0, 1)) -> None:
    """Every case, or a share (k of n) of them, against every reference, and the references against
    each other: a row of the report for each prompt."""
    import torch

    dtype = runner.model.dtype
    known: dict[Any, Any] = {}  # the references' results, as several caches of ours share them
    judge = Judge(runner)

    def compare(
        name: str, cache: str, prompts: list[Any], implementation: str, reference: str,
        ours: Any, theirs: Any,
    ) -> None:  # fmt: skip
        (tokens, logits), (want, want_logits) = ours, theirs
        for row, prompt in enumerate(prompts):

            def at(step: int, row: int = row, prompt: Any = prompt) -> tuple[Any, list[Any]]:
                return judge(torch.cat([prompt, want[row : row + 1, :step]], 1))

            found = agreement(tokens[row], logits[row], want[row], want_logits[row], dtype, at)
            entry = {
                "case": name, "cache": cache, "implementation": implementation,
                "against": reference, "prompt_tokens": prompt.shape[1],
                "new_tokens": len(want[row]), "dtype": str(dtype), **found,
            }  # fmt: skip
            report.add("token_agreement", entry)

    for name, prompts, cache in shared(token_cases(runner), *share):
        if report.over():
            return
        ids, mask = runner.padded(prompts)
        plain = "dynamic" if cache.startswith("bounded") else cache
        lengths = tuple(prompt.shape[1] for prompt in prompts)
        try:
            ours = runner.greedy(OURS, ids, mask, cache)
            for reference in REFERENCES:
                key = (reference, plain, lengths)
                if key not in known:
                    known[key] = runner.greedy(reference, ids, mask, plain)
                compare(name, cache, prompts, OURS, reference, ours, known[key])
            if plain == cache:
                theirs = [known[reference, plain, lengths] for reference in REFERENCES]
                compare(name, cache, prompts, *REFERENCES, *theirs)
        except Exception as error:
            row = {"case": name, "cache": cache, "dtype": str(dtype), "error": _error(error)}
            report.add("token_agreement", row)


def shared(cases: list[Any], k: int, n: int) -> list[Any]:
    """The k-th of n parts: the first one has what shares references, the others the rest."""
    if n == 1:
        return cases
    together = [case for case in cases if case[::2] != ("alone", "dynamic")]
    rest = [case for case in cases if case[::2] == ("alone", "dynamic")]
    return together if k == 0 else rest[k - 1 :: n - 1]
