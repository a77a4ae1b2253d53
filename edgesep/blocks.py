"""Long mixtures in bounded memory: overlapping blocks, cross-faded, with the order of the sources carried on.

Shapes: mixture ``(batch, samples)``, crops ``(batch, 1, frames, height, width)``, estimates ``(batch, sources,
samples)``. Blocks overlap by a quarter; the last one ends with the mixture, so that all have the same length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

OVERLAP = 0.25  # of a block


def separate(
    run: Callable[..., np.ndarray],
    inputs: tuple[np.ndarray, ...],
    block: int,
    shortest: int = 1,
    causal: bool = False,
) -> np.ndarray:
    """Separate block by block and join.

    Neighbours are joined in their overlap with weights that add up to one (raised cosine). A separator may number
    its sources differently in every block: each block is put into the order that correlates best with the block
    before, over the overlap.

    A block knows least at its edges, so the weights change over all of the overlap. A causal separator knows as much
    at the end of a block as anywhere, and at the start of one nothing: there the fade is the overlap's last tenth,
    and what comes before only gives the new block a past (26.8 instead of 23.7 dB to the whole, blocks of 4 s).

    Args:
        run: separates one block.
        block: samples of a block, at least twice ``shortest``.
        causal: whether no estimate depends on what follows.
    """
    mixture = inputs[0]
    samples = mixture.shape[1]
    if samples <= block:
        return run(*inputs)
    overlap = max(int(block * OVERLAP), min(shortest, block // 2))
    starts = [*range(0, samples - block, block - overlap), samples - block]
    done: np.ndarray | None = None
    end = 0
    for start in starts:
        part = run(*(_cut(x, start, block, samples) for x in inputs))
        if done is None:
            done = np.zeros((*part.shape[:2], samples), part.dtype)
            done[:, :, :block] = part
        else:
            shared = end - start
            part = _ordered(part, done[:, :, start:end])
            fade = _fade(shared, shared // 10 if causal else shared)
            done[:, :, start:end] += fade * (part[:, :, :shared] - done[:, :, start:end])
            done[:, :, end : start + block] = part[:, :, shared:]
        end = start + block
    assert done is not None  # there are at least two blocks
    return done


def _fade(overlap: int, length: int) -> np.ndarray:
    """Weights ``(overlap,)`` of the later block: none, then rising over the last ``length`` samples."""
    rising = (np.arange(overlap, dtype=np.float32) - (overlap - length) + 0.5) / max(length, 1)
    return 0.5 - 0.5 * np.cos(np.pi * rising.clip(0, 1))


def _cut(x: np.ndarray, start: int, block: int, samples: int) -> np.ndarray:
    """The block's part of the mixture, or of video frames that run beside it."""
    if x.ndim == 2:
        return x[:, start : start + block]
    rate = x.shape[2] / samples
    first, count = round(start * rate), max(1, round(block * rate))
    first = min(first, x.shape[2] - count)
    return x[:, :, first : first + count]


def _ordered(part: np.ndarray, before: np.ndarray) -> np.ndarray:
    """``part`` with each item's sources in the order of ``before``, which it overlaps at its start."""
    shared = part[:, :, : before.shape[2]].astype(np.float64)
    likeness = np.einsum("bit,bjt->bij", before.astype(np.float64), shared)
    orders = list(itertools.permutations(range(part.shape[1])))
    out = np.empty_like(part)
    for b, pairs in enumerate(likeness):
        best = max(orders, key=lambda order: sum(pairs[i, j] for i, j in enumerate(order)))
        out[b] = part[b, list(best)]
    return out


class Online:
    """Overlapping blocks of audio as it comes: each call takes a block's new part and returns as much, late.

    A sample leaves when the block after the one that it came in with has been faded in, so outputs lag behind the
    inputs of their call by the overlap, and behind the microphone by a whole block.

    Args:
        run: separates one block, ``(1, samples)`` and what ``beside`` gives.
        block: samples of a block.
        causal: as in ``separate``.
        beside: further inputs of the block that ends with this sample of the stream.
    """

    def __init__(
        self,
        run: Callable[..., np.ndarray],
        block: int,
        sources: int,
        causal: bool = False,
        beside: Callable[[int], tuple[np.ndarray, ...]] = lambda _: (),
    ):
        self.run, self.block, self.sources, self.beside = run, block, sources, beside
        self.delay_samples = int(block * OVERLAP)
        self.call_samples = block - self.delay_samples
        self.fade = _fade(self.delay_samples, self.delay_samples // 10 if causal else self.delay_samples)
        self.reset()

    def reset(self) -> None:
        self.heard = np.zeros((1, self.block), np.float32)
        self.tail = np.zeros((1, self.sources, self.delay_samples), np.float32)
        self.end = 0

    def call(self, samples: np.ndarray) -> np.ndarray:
        """``(call_samples,)`` → ``(sources, call_samples)``."""
        self.heard = np.concatenate([self.heard[:, self.call_samples :], samples[None]], 1)
        self.end += self.call_samples
        if not self.heard.any():  # silence has no sources to tell apart
            part = np.zeros((1, self.sources, self.block), np.float32)
        else:
            part = _ordered(self.run(self.heard, *self.beside(self.end)), self.tail)
        part[:, :, : self.delay_samples] = self.tail + self.fade * (part[:, :, : self.delay_samples] - self.tail)
        self.tail = part[:, :, self.call_samples :].copy()
        estimates: np.ndarray = part[0, :, : self.call_samples]
        return estimates
