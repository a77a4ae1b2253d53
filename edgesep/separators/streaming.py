"""What a module needs to run hop by hop: state by name, taken from one call and kept for the next.

A separator's modules are written once. For a whole utterance they get ``None`` and the past is zero; in a stream they
get ``Carried``. A first run without given states tells which there are, with their shapes and initial values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from edgesep.spec import StateSpec


class Carried:
    """States of one call.

    Attributes:
        specs: every state that was taken, by full name, where none were given.
        next: what was kept, by full name.
    """

    def __init__(self, given: Mapping[str, Tensor] | None = None):
        self.given, self.prefix = given, ""
        self.specs: dict[str, StateSpec] = {}
        self.next: dict[str, Tensor] = {}

    def under(self, prefix: str) -> Carried:
        """The same states, with names below ``prefix``."""
        part = Carried(self.given)
        part.prefix, part.specs, part.next = f"{self.prefix}{prefix}_", self.specs, self.next
        return part

    def take(
        self, name: str, shape: tuple[int, ...], initial: Tensor | None = None, ring_axis: int | None = None
    ) -> Tensor:
        """The state as the last call left it; ``initial`` (last axis) at the start of a stream, or zeros."""
        full = f"state_{self.prefix}{name}"
        if self.given is not None:
            return self.given[full]
        start = 0.0 if initial is None else tuple(float(v) for v in initial)
        self.specs[full] = StateSpec(full, shape, initial=start, ring_axis=ring_axis)
        return torch.from_numpy(self.specs[full].start())

    def keep(self, name: str, value: Tensor) -> None:
        self.next[f"state_{self.prefix}{name}"] = value

    def extend(self, name: str, x: Tensor, count: int, axis: int) -> Tensor:
        """``x`` with the ``count`` elements before it along ``axis``; its own last ones are kept."""
        if not count:
            return x
        shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])
        whole = torch.cat([self.take(name, shape), x], axis)
        self.keep(name, whole.narrow(axis, x.shape[axis], count))
        return whole

    def ring(self, name: str, new: Tensor, length: int, axis: int = 2) -> Tensor:
        """The last ``length`` elements along ``axis``, in the order of a ring; ``new`` ones are kept for the caller."""
        shape = (*new.shape[:axis], length, *new.shape[axis + 1 :])
        self.keep(name, new)
        return self.take(name, shape, ring_axis=axis)


@dataclass(frozen=True)
class Call:
    """What all parts of a separator share within one call of ``N`` frames.

    Attributes:
        boundary: ``(1,)``, index of the frame that a segment begins with; N where none does.
        ended: whether a segment has ended within this call.
        hidden: ``(N, context + N)``, added to attention scores: 0, or minus infinity for what a frame must not see.
    """

    carried: Carried
    boundary: Tensor
    ended: Tensor
    hidden: Tensor

    def under(self, prefix: str) -> Self:
        return replace(self, carried=self.carried.under(prefix))


def clock(carried: Carried, frames: int, segment: int, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """``boundary``, ``ended`` and ``hidden`` of ``Call``, from a counter that is carried.

    The counter ``(3,)`` holds the frame within its segment, the slot of the ring that comes next, and how many slots
    are filled. They wrap, so a stream may run for ever.
    """
    now = carried.take("clock", (3,))
    at, slot, filled = now.split(1)
    limits = torch.tensor([segment, context, context], dtype=now.dtype)
    later = now + frames
    wrapped = torch.where(later >= limits, later - limits, later)
    carried.keep("clock", torch.cat([wrapped[:2], torch.minimum(later, limits)[2:]]))

    boundary = torch.where(at == 0, at, segment - at).clamp(max=frames).long()
    ended = (boundary < frames) & (filled > 0)
    age = slot - 1 - torch.arange(context, dtype=torch.float32)
    age = torch.where(age < 0, age + context, age)
    seen = torch.minimum(filled, context - 1 - torch.arange(frames, dtype=torch.float32))
    old = torch.zeros(()).masked_fill(age >= seen[:, None], float("-inf"))
    own = torch.full((frames, frames), float("-inf")).triu(1)
    return boundary, ended, torch.cat([old, own], 1)
