"""Quality of a runner against the float original: SI-SNR and its drop, and the SNR between the two outputs.

Shapes: estimates and references are ``(sources, samples)``; all figures are in dB.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgesep.spec import Criteria, VerificationError

EPS = 1e-8
#: (mixture (batch, samples), further inputs) → (batch, sources, samples)
Separate = Callable[..., np.ndarray]
Inputs = tuple[np.ndarray, ...]


def si_snr_db(estimates: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Scale-invariant SNR in dB along the last axis, zero mean, eps 1e-8 (arXiv 1811.02508)."""
    e = np.asarray(estimates, np.float64) - np.mean(estimates, -1, keepdims=True, dtype=np.float64)
    r = np.asarray(references, np.float64) - np.mean(references, -1, keepdims=True, dtype=np.float64)
    target = (e * r).sum(-1, keepdims=True) / ((r * r).sum(-1, keepdims=True) + EPS) * r
    ratio = ((target**2).sum(-1) + EPS) / (((e - target) ** 2).sum(-1) + EPS)
    return np.asarray(10 * np.log10(ratio))


def output_snr_db(output: np.ndarray, reference: np.ndarray) -> float:
    """SNR in dB of a whole output against the original's output; inf when they are equal.

    Raises:
        VerificationError: other shape, NaN or infinite values.
    """
    if output.shape != reference.shape:
        raise VerificationError(f"output has shape {output.shape}, the original's has {reference.shape}")
    if not np.isfinite(output).all():
        raise VerificationError(f"output holds {np.count_nonzero(~np.isfinite(output))} NaN or infinite values")
    noise = float(np.square(output.astype(np.float64) - reference).sum())
    power = float(np.square(reference.astype(np.float64)).sum())
    if noise == 0:
        return float("inf")
    return 10 * float(np.log10(power / noise)) if power > 0 else float("-inf")


def pit_si_snr_db(estimates: np.ndarray, references: np.ndarray) -> float:
    """Mean SI-SNR over sources in dB under the best assignment."""
    pairs = si_snr_db(estimates[:, None], references[None])  # (estimate, reference)
    orders = itertools.permutations(range(len(references)))
    return max(float(np.mean([pairs[i, j] for i, j in enumerate(order)])) for order in orders)


@dataclass(frozen=True)
class Quality:
    """Quality of one artifact over a mixture set, in dB.

    Attributes:
        mixtures: how many mixtures the figures stand on.
        si_snr_db: mean SI-SNR (best assignment per mixture).
        si_snri_db: mean improvement over the mixture itself.
        drop_db: mean SI-SNR lost against the float original on the same mixtures; negative is a gain.
        drop_worst5_db: mean drop of the worst 5 % (at least one mixture).
        drop_low_db: lower end of the paired bootstrap 95 % interval of the mean drop.
        drop_high_db: upper end.
        output_snr_db: lowest SNR of an output against the original's output.
    """

    mixtures: int
    si_snr_db: float
    si_snri_db: float
    drop_db: float
    drop_worst5_db: float
    drop_low_db: float
    drop_high_db: float
    output_snr_db: float

    def to_json(self) -> dict[str, Any]:
        return {k: round(v, 4) if isinstance(v, float) and np.isfinite(v) else v for k, v in asdict(self).items()}


def quality(
    separate: Separate,
    items: Iterable[tuple[Inputs, np.ndarray, np.ndarray]],
    tick: Callable[[], None] = lambda: None,
) -> Quality:
    """Run ``separate`` over (inputs of batch 1, sources, original's estimates) and judge it.

    Args:
        tick: called after each mixture.

    Raises:
        VerificationError: an output of the wrong shape or with NaN.
    """
    scores, drops, gains, snrs = [], [], [], []
    for inputs, sources, original in items:
        mixture, estimates = inputs[0][0], separate(*inputs)[0]
        snrs.append(output_snr_db(estimates, original))
        score = pit_si_snr_db(estimates, sources)
        scores.append(score)
        drops.append(pit_si_snr_db(original, sources) - score)
        gains.append(score - float(np.mean(si_snr_db(np.broadcast_to(mixture, sources.shape), sources))))
        tick()
    low, high = bootstrap_interval(drops)
    return Quality(
        mixtures=len(scores),
        si_snr_db=float(np.mean(scores)),
        si_snri_db=float(np.mean(gains)),
        drop_db=float(np.mean(drops)),
        drop_worst5_db=worst_share(drops, 0.05),
        drop_low_db=low,
        drop_high_db=high,
        output_snr_db=min(snrs),
    )


def worst_share(values: Sequence[float], share: float) -> float:
    """Mean of the largest ``share`` of the values, at least one."""
    count = max(1, round(share * len(values)))
    return float(np.mean(np.sort(values)[-count:]))


def bootstrap_interval(values: Sequence[float], rounds: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean; seeded, so that the same values give the same interval."""
    rng = np.random.default_rng(0)
    means = rng.choice(np.asarray(values), (rounds, len(values))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def shapes_snr_db(separate: Separate, cases: Iterable[tuple[Inputs, np.ndarray]]) -> float:
    """Lowest output SNR over (inputs, original's estimates) of several lengths and batch sizes."""
    return min(output_snr_db(separate(*inputs), original) for inputs, original in cases)


def misses(
    quality: Quality, shapes_db: float | None, rtf: float | None, precision: str, criteria: Criteria
) -> list[str]:
    """What an artifact fails, one sentence each; empty when it may be released."""
    said = []
    if criteria.max_si_snr_drop_db is not None and not quality.drop_db <= criteria.max_si_snr_drop_db:
        said.append(f"SI-SNR drop {quality.drop_db:.3f} dB, allowed {criteria.max_si_snr_drop_db} dB")
    if criteria.worst5_drop_db is not None and not quality.drop_worst5_db <= criteria.worst5_drop_db:
        said.append(f"worst 5 % lose {quality.drop_worst5_db:.3f} dB, allowed {criteria.worst5_drop_db} dB")
    if criteria.min_output_snr_db is not None and precision == "fp32":
        lowest = quality.output_snr_db if shapes_db is None else min(quality.output_snr_db, shapes_db)
        if not lowest >= criteria.min_output_snr_db:
            said.append(f"output SNR {lowest:.1f} dB, required {criteria.min_output_snr_db} dB")
    if criteria.max_rtf is not None and rtf is not None and not rtf <= criteria.max_rtf:
        said.append(f"real-time factor {rtf:.3f}, allowed {criteria.max_rtf}")
    return said
