"""From the sound card through a stream and back, with sounddevice (an extra: ``pip install edgesep[live]``)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from edgesep.spec import InputError, UnsupportedError
from edgesep.stream import Stream


def play(stream: Stream, source: int, say: Callable[[str], None]) -> None:
    """Separate the default input device, play one source on the default output device, until interrupted.

    The card runs at the stream's rate in blocks of one call; where a call is late, the card reports an underflow, and
    these are counted.

    Args:
        source: which estimate to play, from 1.

    Raises:
        InputError: there is no such source.
        UnsupportedError: no sounddevice, or no sound card that takes this rate.
    """
    if not 1 <= source <= stream.sources:
        raise InputError(f"source {source} does not exist, this bundle separates {stream.sources}")
    try:
        import sounddevice
    except (ImportError, OSError) as e:  # OSError: the package is there, PortAudio is not
        raise UnsupportedError(
            "live streaming needs sounddevice and PortAudio (pip install edgesep[live]; apt install libportaudio2)"
        ) from e
    trouble: deque[str] = deque(maxlen=1000)

    def callback(heard: np.ndarray, played: np.ndarray, frames: int, _: Any, status: Any) -> None:
        if status:
            trouble.append(str(status))
        ready = stream.process(heard[:, 0])
        played[:, 0] = ready[source - 1, :frames] if ready.shape[1] == frames else 0

    try:
        with sounddevice.Stream(
            samplerate=stream.sample_rate_hz,
            blocksize=stream.call_samples,
            channels=1,
            dtype="float32",
            latency="low",
            callback=callback,
        ) as card:
            ms = 1e3 * (stream.latency_samples + stream.call_samples) / stream.sample_rate_hz
            say(f"streaming: {ms:.1f} ms in the separator, {1e3 * sum(card.latency):.1f} ms in the card; Ctrl-C ends")
            while card.active:
                sounddevice.sleep(200)
    except KeyboardInterrupt:
        say(f"ended; {len(trouble)} blocks were late, {stream.silenced_hops} hops silenced")
    except (sounddevice.PortAudioError, ValueError) as e:
        raise UnsupportedError(
            f"no sound card takes {stream.sample_rate_hz} Hz mono in and out ({e}); stream a file instead"
        ) from e
