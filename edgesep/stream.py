"""Separation hop by hop: what feeds a streaming graph, and the ``Stream`` that takes blocks of any size.

Shapes: samples ``(n,)``, estimates ``(sources, n)``, float32. Needs numpy and one runtime.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from edgesep import blocks, video
from edgesep.spec import InputError, StreamSpec, UnsupportedError

if TYPE_CHECKING:
    from edgesep.bundle import Bundle

Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


class Calls(Protocol):
    """What a ``Stream`` drives."""

    @property
    def call_samples(self) -> int: ...
    @property
    def delay_samples(self) -> int: ...
    def reset(self) -> None: ...
    def call(self, samples: np.ndarray) -> np.ndarray: ...


class Hops:
    """Call after call of a streaming graph, with its states.

    Once bound, the arrays of ``feeds`` stay the same ones for ever.

    Args:
        bind: (feeds) → what runs the graph on them (a runner's ``bound``, which may hold states in another type).
    """

    def __init__(self, bind: Callable[[dict[str, np.ndarray]], Run], spec: StreamSpec):
        self.spec = spec
        self.mixture = np.zeros((1, spec.call_samples), np.float32)
        self.feeds = {"mixture": self.mixture, **{state.name: state.start() for state in spec.states}}
        self.frame = 0
        self.run = bind(self.feeds)
        self.states = {state.name: self.feeds[state.name] for state in spec.states}
        # A state begins as rows of one kind: the first stands for all.
        self._rows = {name: array[(0,) * (array.ndim - 1)].copy() for name, array in self.states.items()}

    @property
    def call_samples(self) -> int:
        return self.spec.call_samples

    @property
    def delay_samples(self) -> int:
        return self.spec.delay_samples

    def reset(self) -> None:
        """Back to the start of a stream."""
        for name, array in self.states.items():
            array[...] = self._rows[name]
        self.frame = 0

    def call(self, samples: np.ndarray) -> np.ndarray:
        """``(call_samples,)`` → ``(sources, call_samples)``, late by ``delay_samples``; the array is reused."""
        self.mixture[0] = samples
        made = self.run(self.feeds)
        for state in self.spec.states:
            held, new = self.states[state.name], made[f"next_{state.name}"]
            if state.ring_axis is None:
                np.copyto(held, new)
            else:
                self._write(held, new, state.ring_axis)
        self.frame += self.spec.hops_per_call
        estimates: np.ndarray = made["estimates"][0]
        return estimates

    def _write(self, ring: np.ndarray, new: np.ndarray, axis: int) -> None:
        """New frames go where the oldest ones lie."""
        length, count = ring.shape[axis], new.shape[axis]
        at = self.frame % length
        fitting = min(count, length - at)
        before = (slice(None),) * axis
        ring[(*before, slice(at, at + fitting))] = new[(*before, slice(0, fitting))]
        if fitting < count:
            ring[(*before, slice(0, count - fitting))] = new[(*before, slice(fitting, count))]


def whole(hops: Hops, mixture: np.ndarray) -> np.ndarray:
    """A whole mixture ``(n,)`` from the start of a stream, delay taken out → ``(sources, n)``."""
    spec = hops.spec
    hops.reset()
    calls = -(-(mixture.size + spec.delay_samples) // spec.call_samples)
    padded = np.zeros(calls * spec.call_samples, np.float32)
    padded[: mixture.size] = mixture
    parts = [hops.call(block).copy() for block in padded.reshape(calls, -1)]
    return np.concatenate(parts, 1)[:, spec.delay_samples : spec.delay_samples + mixture.size]


def measured_look_ahead(hops: Hops) -> int:
    """How far ahead of a sample the latest input lies that it depends on, found by changing the future.

    For every place within a call: from there on the input is another one; the first estimate that moves tells.
    """
    spec = hops.spec
    rng = np.random.default_rng(0)
    calls = 4 + -(-spec.algorithmic_latency_samples // spec.call_samples)
    mixture = (0.1 * rng.standard_normal(calls * spec.call_samples)).astype(np.float32)
    before = whole(hops, mixture)
    ahead = []
    for start in range((calls - 2) * spec.call_samples, (calls - 1) * spec.call_samples):
        changed = mixture.copy()
        changed[start:] = 0.5 * rng.standard_normal(mixture.size - start)
        moved = np.flatnonzero((whole(hops, changed) != before).any(axis=0))
        ahead.append(start - int(moved[0]))
    return max(ahead)


def spec_of(bundle: Bundle) -> StreamSpec:
    """What a bundle's streaming graphs promise.

    Raises:
        UnsupportedError: it has none.
    """
    given = bundle.manifest["separator"].get("stream")
    if not given:
        raise UnsupportedError(
            f"{bundle.path} separates whole mixtures; a causal separator streams if its recipe has a [stream] section"
        )
    return StreamSpec.from_json(given)


_NO_VIDEO = np.zeros((0, video.CROP, video.CROP), np.uint8)


class Stream:
    """Separates audio as it comes.

    ``process`` takes blocks of any size and returns what is ready, so that all it returned, joined, lags behind all it
    was given by ``latency_samples`` and by less than one call. A hop with NaN or infinite samples is taken as silence
    and counted in ``silenced_hops``.

    Args:
        bundle: an opened bundle that was built with a ``[stream]`` section.
        runtime, precision: which artifact; by default the first that can run here.
        threads: of the runtime.
        block_s: for bundles that separate whole mixtures: go on in overlapping blocks of so many seconds, joined as in
            ``blocks``; the latency is then a whole block.

    Raises:
        UnsupportedError: the bundle does not stream, or no artifact of it can run here.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        runtime: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
        block_s: float | None = None,
    ):
        self.sources, self.sample_rate_hz = bundle.sources, bundle.sample_rate_hz
        artifact = bundle.artifact(runtime, precision)
        self._identity = f"{bundle.manifest['digest']} {artifact.name}"
        self._stack = contextlib.ExitStack()
        self._calls: Calls
        self._shown: video.Shown | None = None
        if block_s is None:
            spec = spec_of(bundle)
            self._calls = Hops(self._stack.enter_context(artifact.runner(threads)).bound, spec)
            self.hop_samples = spec.hop_samples
        else:
            separating = self._stack.enter_context(bundle.separating(artifact, threads))
            block = bundle.block_samples(block_s)
            beside: dict[str, Callable[[int], tuple[np.ndarray, ...]]] = {}
            if bundle.manifest["separator"]["front_end"]:
                shown = self._shown = video.Shown(block, bundle.sample_rate_hz)
                beside["beside"] = lambda end: (shown.until(end),)
            self._calls = blocks.Online(separating, block, bundle.sources, bundle.causal, **beside)
            self.hop_samples = self._calls.call_samples
        self.call_samples = self._calls.call_samples
        self.reset()

    @property
    def latency_samples(self) -> int:
        """By how much the samples that come out lag behind those that went in."""
        return self._calls.delay_samples

    def reset(self) -> None:
        """Forget everything heard; may be called in the middle of a stream."""
        self._calls.reset()
        if self._shown is not None:
            self._shown.reset()
        self._waiting = np.zeros(0, np.float32)
        self.silenced_hops = 0

    def watch(self, frames: np.ndarray) -> None:
        """Mouth video ``(frames, height, width)`` uint8, 25 a second, before the audio that it accompanies.

        Raises:
            InputError: the separator takes audio alone.
        """
        if self._shown is None:
            raise InputError("this separator takes audio alone; leave out the mouth video")
        self._shown.add(frames)

    def process(self, block: np.ndarray, sample_rate_hz: int | None = None) -> np.ndarray:
        """``(n,)`` float samples → ``(sources, m)``, all that is ready; m is n where n is a multiple of the call.

        Raises:
            InputError: not one channel, or another sample rate than the bundle's.
        """
        if sample_rate_hz not in (None, self.sample_rate_hz):
            raise InputError(
                f"the block is at {sample_rate_hz} Hz, this stream runs at {self.sample_rate_hz} Hz; resample it"
            )
        block = np.asarray(block, np.float32)
        if block.ndim != 1:
            raise InputError(f"a block must be (samples,), one channel; got {block.shape}")
        waiting = np.concatenate([self._waiting, block]) if self._waiting.size else block
        size = self.call_samples
        calls = waiting.size // size
        out = np.empty((self.sources, calls * size), np.float32)
        for k in range(calls):
            out[:, k * size : (k + 1) * size] = self._calls.call(self._clean(waiting[k * size : (k + 1) * size]))
        self._waiting = waiting[calls * size :].copy()
        return out

    def _clean(self, samples: np.ndarray) -> np.ndarray:
        """Hops that are not finite are silence; one alone would live on in every state."""
        if np.isfinite(samples).all():
            return samples
        hops = samples.reshape(-1, self.hop_samples).copy()
        bad = ~np.isfinite(hops).all(axis=1)
        hops[bad] = 0
        self.silenced_hops += int(np.count_nonzero(bad))
        return hops.reshape(-1)

    def flush(self) -> np.ndarray:
        """The rest, ``(sources, m)``, as if silence followed; then the stream starts anew."""
        owed = self._waiting.size + self.latency_samples
        calls = -(-owed // self.call_samples)
        silence = np.zeros(calls * self.call_samples - self._waiting.size, np.float32)
        rest = self.process(silence)[:, :owed]
        silenced = self.silenced_hops
        self.reset()
        self.silenced_hops = silenced
        return rest

    def separate(
        self, mixture: np.ndarray, mouth: np.ndarray | None = None, tick: Callable[[int], None] = lambda _: None
    ) -> np.ndarray:
        """A whole ``(n,)`` from the start of a stream, latency taken out → ``(sources, n)``.

        Args:
            mouth: the wanted speaker's, for audio-visual separators.
            tick: called with the samples done, about once a second of audio.
        """
        self.reset()
        if mouth is not None:
            self.watch(mouth)
        if self._shown is not None:  # the last block reaches beyond the video, as it does beyond the audio
            self._shown.add(np.repeat(mouth[-1:], self._shown.wanted, 0) if mouth is not None else _NO_VIDEO)
        parts = []
        for start in range(0, mixture.size, self.sample_rate_hz):
            parts.append(self.process(mixture[start : start + self.sample_rate_hz]))
            tick(start)
        parts.append(self.flush())
        return np.concatenate(parts, 1)[:, self.latency_samples :]

    def save_state(self, path: str | Path) -> None:
        """Write the state of the stream to an ``.npz`` file."""
        hops = self._stateful()
        about = {"identity": self._identity, "frame": hops.frame}
        np.savez(path, about=json.dumps(about), waiting=self._waiting, allow_pickle=False, **hops.states)

    def _stateful(self) -> Hops:
        if not isinstance(self._calls, Hops):
            raise UnsupportedError("a stream in blocks has no state but its last block; begin it anew")
        return self._calls

    def load_state(self, path: str | Path) -> None:
        """Go on where ``save_state`` was called.

        Raises:
            InputError: the file is none of this bundle's and artifact's; the stream is as it was.
        """
        hops = self._stateful()
        try:
            with np.load(path) as data:
                about = json.loads(str(data["about"]))
                held = {name: data[name] for name in data.files}
        except (OSError, ValueError, KeyError) as e:
            raise InputError(f"{path} is no state of a stream of this bundle ({e})") from e
        if about["identity"] != self._identity:
            raise InputError(f"{path} is the state of another bundle or artifact: {about['identity']}")
        for name, array in hops.states.items():
            array[...] = held[name]
        hops.frame, self._waiting = about["frame"], held["waiting"]

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
