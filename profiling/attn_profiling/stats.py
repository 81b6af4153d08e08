"""Intervals and tests for timings: few processes, many rounds in each.

Rounds of one process share its clock, its memory layout and its neighbours, so they are not
independent of each other; processes are. Intervals therefore come from a hierarchical bootstrap
(processes, then rounds within them; Davison and Hinkley, Bootstrap Methods, section 3.8) whose
spread is turned into an interval with Student's t at one less than the number of processes: a bare
percentile of three processes would cover far less than it says. Times and ratios of times are
positive and err by factors, so their intervals are formed on the log scale and never reach zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

LEVEL = 0.95
RESAMPLES = 1000
SEED = 20240711

Array = NDArray[np.float64]
Samples = Sequence[Sequence[float]]
"""Samples of one subject on one problem: one sequence of rounds for each process."""
_OF_BURSTS = ("gpu_us", "event_us", "clock_mhz", "power_w", "energy_mj")


@dataclass(frozen=True)
class Interval:
    """A point estimate with its 95 % interval. `df` is infinite where nothing had to be estimated
    from few."""

    value: float
    low: float
    high: float
    df: float
    n_processes: int
    n: int

    def p_at_least(self, threshold: float) -> float:
        """One-sided p-value against "the truth is below `threshold`"."""
        return self._tail(self.value - threshold, self.value - self.low)

    def p_at_most(self, threshold: float) -> float:
        """One-sided p-value against "the truth is above `threshold`"."""
        return self._tail(threshold - self.value, self.high - self.value)

    def _tail(self, distance: float, half_width: float) -> float:
        if half_width <= 0:
            return 0.0 if distance > 0 else 1.0
        return t_upper_tail(distance / half_width * t_quantile(0.5 + LEVEL / 2, self.df), self.df)


def t_upper_tail(t: float, df: float) -> float:
    """P(T > t) of Student's distribution; the normal one for infinite `df`."""
    return float(stdtr(df, -t))


def t_quantile(p: float, df: float) -> float:
    """The value that Student's distribution stays below with probability `p`."""
    return float(stdtrit(df, p))


@dataclass(frozen=True)
class Replicates:
    """A point estimate with its bootstrap replicates, of `n` samples in `n_processes` processes."""

    value: float
    drawn: Array
    n_processes: int
    n: int

    def map(self, function: Callable[..., Any], *others: Replicates) -> Replicates:
        """The same function of estimate and replicates, of this and of others."""
        return Replicates(
            float(function(self.value, *(o.value for o in others))),
            np.asarray(function(self.drawn, *(o.drawn for o in others))),
            min(r.n_processes for r in (self, *others)),
            self.n,
        )

    def interval(self) -> Interval:
        """The estimate, of a time or a ratio of times, with its 95 % interval on the log scale.

        Raises `ValueError` where it or a replicate is not positive.
        """
        if self.value <= 0 or (self.drawn <= 0).any():
            raise ValueError(
                f"value={self.value} and its replicates must be positive; a quantity that can be"
                " zero needs linear_interval"
            )
        factor = math.exp(self._half_width(np.log(self.drawn)))
        return self._between(self.value / factor, self.value * factor)

    def linear_interval(self) -> Interval:
        """The estimate, of a quantity that can be zero, with a symmetric 95 % interval."""
        half = self._half_width(self.drawn)
        return self._between(self.value - half, self.value + half)

    @property
    def _df(self) -> float:
        return self.n_processes - 1 if self.n_processes > 1 else math.inf

    def _between(self, low: float, high: float) -> Interval:
        return Interval(self.value, low, high, self._df, self.n_processes, self.n)

    def _half_width(self, drawn: Array) -> float:
        """Half of the width of the 95 % interval that replicates give, on their own scale.

        The spread of the replicates is enlarged by sqrt(P / (P - 1)), since resampling P processes
        shrinks their variance by (P - 1) / P, and multiplied by the quantile of Student's t at
        P - 1. With one process nothing is known between processes, and the interval speaks of that
        process only (normal quantile).
        """
        df = self._df
        enlarge = math.sqrt(1 + 1 / df) if df < math.inf else 1.0
        return t_quantile(0.5 + LEVEL / 2, df) * enlarge * float(np.std(drawn))


@cache
def _indices(lengths: tuple[int, ...]) -> NDArray[np.int64]:
    """Bootstrap positions into the concatenated rounds of processes of these lengths, one resample
    a row.

    Depends on the lengths only: problems measured alike are resampled alike, so what processes have
    in common across problems stays in common when a median over problems is formed. Unequal lengths
    are cut to the shortest.
    """
    rng = np.random.default_rng(SEED)
    processes, rounds = len(lengths), min(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    chosen = rng.integers(0, processes, size=(RESAMPLES, processes))
    within = rng.random(size=(RESAMPLES, processes, rounds))
    position = starts[chosen][:, :, None] + (
        within * np.asarray(lengths)[chosen][:, :, None]
    ).astype(np.int64)
    flat: NDArray[np.int64] = position.reshape(RESAMPLES, -1)
    return flat


def _medians(drawn: Array) -> Array:
    """Row medians; `np.median` is several times slower on many short rows."""
    n = drawn.shape[1]
    low, high = (n - 1) // 2, n // 2
    parted = np.partition(drawn, (low, high), axis=1)
    return 0.5 * (parted[:, low] + parted[:, high])


def burst_means(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Samples of one subject in which the bursts of a process are one: their mean.

    The clock swings with a period of a few bursts, and only a process's bursts together have met it
    in every phase. Readings that are missing (None) do not count; a process without any has None.
    """
    means = dict(sample)
    for name in _OF_BURSTS:
        if name in sample:
            known = [[x for x in process if x is not None] for process in sample[name]]
            means[name] = [[float(np.mean(found))] if found else [None] for found in known]
    return means


def replicates(samples: Samples) -> Replicates:
    """The median of all samples, with its bootstrap replicates."""
    arrays = [np.asarray(process, dtype=np.float64) for process in samples]
    if not arrays or any(a.size == 0 for a in arrays):
        raise ValueError("samples must hold at least one process with at least one round")
    flat = np.concatenate(arrays)
    if not np.isfinite(flat).all():
        raise ValueError("samples must be finite numbers")
    drawn = _medians(flat[_indices(tuple(a.size for a in arrays))])
    return Replicates(float(np.median(flat)), drawn, len(arrays), flat.size)


def ratio_replicates(ours: Samples, peer: Samples) -> Replicates:
    """`peer / ours`: the median over rounds of paired ratios, with its bootstrap replicates.

    Rounds are paired where both subjects have the same number in every process (they were
    interleaved); otherwise the ratio of medians, with the same processes drawn for both.
    """
    if len(ours) != len(peer):
        raise ValueError(
            f"{len(ours)} processes of one subject against {len(peer)} of the other; both need the"
            " same"
        )
    if any(value <= 0 for samples in (ours, peer) for process in samples for value in process):
        raise ValueError("samples of a ratio must be positive")
    if all(len(a) == len(b) for a, b in zip(ours, peer, strict=True)):
        both = zip(ours, peer, strict=True)
        return replicates([np.divide(b, a) for a, b in both])  # type: ignore[misc]
    a, b = replicates(ours), replicates(peer)
    return Replicates(b.value / a.value, b.drawn / a.drawn, a.n_processes, a.n)


def median_interval(samples: Samples) -> Interval:
    """The median of all samples with its interval."""
    return replicates(samples).interval()


def ratio_interval(ours: Samples, peer: Samples) -> Interval:
    """The paired ratio `peer / ours` (> 1: ours is faster) with its interval."""
    return ratio_replicates(ours, peer).interval()


def over_problems(
    problems: Sequence[Replicates], reduce: Callable[..., Array] = np.median
) -> Replicates:
    """A reduction (median, minimum) over problems, with its replicates.

    The problems are fixed: the interval speaks of measuring these again, not of other problems.
    """
    if not problems:
        raise ValueError("problems is empty; nothing to reduce")
    return Replicates(
        float(reduce(np.asarray([p.value for p in problems]), axis=0)),
        np.asarray(reduce(np.stack([p.drawn for p in problems]), axis=0)),
        min(p.n_processes for p in problems),
        sum(p.n for p in problems),
    )


def over_values(values: Sequence[float]) -> Interval:
    """The median of one value for each problem, with its interval over problems.

    For counters, which are read once a problem: here the problems are the sample.
    """
    return replicates([[v] for v in values]).linear_interval()


def noise_floor(aa_ratios: Sequence[float]) -> float:
    """How far from 1 a ratio of a kernel to itself was found: the largest departure of the A/A
    pairs."""
    if not aa_ratios:
        raise ValueError("aa_ratios is empty; the noise floor needs at least one A/A pair")
    return max(abs(r - 1) for r in aa_ratios)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values that keep the chance of any false rejection at the level (Holm 1979)."""
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: (item[1], item[0]))):
        running = max(running, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = running
    return adjusted
