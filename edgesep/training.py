"""The training loop and losses that the demo program and the ``finetune`` pass share.

Shapes: estimates and references are ``(batch, sources, samples)``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

#: (inputs of the separator, mixture (batch, samples) first; sources (batch, sources, samples)) of a step; the same step
#: gives the same batch, so that an interrupted run continues as if it had not been interrupted.
Batches = Callable[[int], tuple[tuple[Tensor, ...], Tensor]]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (mixture, estimates, references) → scalar


def snr_db(estimates: Tensor, references: Tensor, eps: float = 1e-8) -> Tensor:
    """SNR in dB over the last axis; unlike SI-SNR it also asks for the right level."""
    noise = (estimates - references).square().sum(-1)
    return 10 * torch.log10((references.square().sum(-1) + eps) / (noise + eps))


def si_snr_db(estimates: Tensor, references: Tensor, eps: float = 1e-8) -> Tensor:
    """Scale-invariant SNR in dB over the last axis, zero mean (arXiv 1811.02508)."""
    e = estimates - estimates.mean(-1, keepdim=True)
    r = references - references.mean(-1, keepdim=True)
    target = (e * r).sum(-1, keepdim=True) / (r.square().sum(-1, keepdim=True) + eps) * r
    return 10 * torch.log10((target.square().sum(-1) + eps) / ((e - target).square().sum(-1) + eps))


def pit_db(estimates: Tensor, references: Tensor, metric: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mean over sources of ``metric`` under the best assignment of each mixture, ``(batch,)``."""
    sources = references.shape[1]
    pairs = metric(estimates[:, :, None], references[:, None])  # (batch, estimate, reference)
    scores = [
        torch.stack([pairs[:, i, j] for i, j in enumerate(order)]).mean(0)
        for order in itertools.permutations(range(sources))
    ]
    return torch.stack(scores).amax(0)


def _levelled(db: Tensor) -> Tensor:
    """Negative mean, levelled off at 30 dB so that easy mixtures do not crowd out the hard ones."""
    return (10 * torch.log10(10 ** (-db / 10) + 1e-3)).mean()


def pit_snr_loss(_: Tensor, estimates: Tensor, references: Tensor) -> Tensor:
    """Negative SNR under the best assignment of estimates to references."""
    return _levelled(pit_db(estimates, references, snr_db))


def snr_loss(_: Tensor, estimates: Tensor, references: Tensor) -> Tensor:
    """Negative SNR of estimates in the references' order."""
    return _levelled(snr_db(estimates, references).mean(1))


@dataclass
class Progress:
    """State of a run, saved with its weights."""

    step: int = 0
    best_db: float = -math.inf
    curve: tuple[tuple[int, float, float], ...] = ()  # (step, mean loss since the last row, validation dB)


def fit(
    module: nn.Module,
    batches: Batches,
    steps: int,
    validate: Callable[[nn.Module], float],
    *,
    loss: Loss = pit_snr_loss,
    lr: float = 1e-3,
    warmup: int = 200,
    every: int = 500,
    clip: float = 5.0,
    patience: int | None = None,
    state_path: Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
    on_validation: Callable[[Progress, nn.Module], None] | None = None,
) -> Progress:
    """Train in place with AdamW (warm-up, then cosine to zero); leaves the best validated weights in ``module``.

    Args:
        validate: score in dB, higher is better; called every ``every`` steps and at the end.
        patience: stop after this many validations without a better score.
        state_path: where the run is saved at each validation; if it exists, the run continues from there.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=1e-4)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    progress, best = Progress(), {k: v.clone() for k, v in module.state_dict().items()}
    stale, total, count = 0, 0.0, 0
    if state_path is not None and state_path.exists():
        saved = torch.load(state_path, weights_only=True)
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        best, stale = saved["best"], saved["stale"]
        progress = Progress(saved["step"], saved["best_db"], tuple(map(tuple, saved["curve"])))
    for step in range(progress.step, steps):
        module.train()
        for group in optimizer.param_groups:
            group["lr"] = lr * rate(step)
        inputs, sources = batches(step)
        value = loss(inputs[0], module(*inputs), sources)
        optimizer.zero_grad()
        value.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), clip)
        if torch.isfinite(norm):  # one bad batch must not end a run of hours
            optimizer.step()
        total, count = total + value.item(), count + 1
        if on_step is not None:
            on_step(step + 1, value.item())
        if (step + 1) % every and step + 1 != steps:
            continue
        module.eval()
        with torch.no_grad():
            score = validate(module)
        progress.step = step + 1
        progress.curve = (*progress.curve, (step + 1, total / count, score))
        total, count, stale = 0.0, 0, stale + 1
        if score > progress.best_db:
            progress.best_db, stale = score, 0
            best = {k: v.clone() for k, v in module.state_dict().items()}
        if state_path is not None:
            _save(state_path, module, optimizer, progress, best, stale)
        if on_validation is not None:
            on_validation(progress, module)
        if patience is not None and stale >= patience:
            break
    module.load_state_dict(best)
    module.eval()
    return progress


def _save(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    best: dict[str, Tensor],
    stale: int,
) -> None:
    state = {
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "best": best,
        "stale": stale,
        "step": progress.step,
        "best_db": progress.best_db,
        "curve": [list(row) for row in progress.curve],
    }
    beside = path.with_suffix(".tmp")
    torch.save(state, beside)
    beside.replace(path)
