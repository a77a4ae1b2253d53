"""Audio files in and out: any format libsndfile reads (WAV at any depth, FLAC, ...), any rate.

Shapes: signals are ``(samples,)`` float32 at a stated rate.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgesep.spec import InputError


def read(path: str | Path, rate_hz: int | None = None) -> tuple[np.ndarray, int]:
    """Read a mono or stereo file (stereo is averaged), resampled to ``rate_hz`` when given.

    Returns:
        The signal and the rate *of the file*.

    Raises:
        InputError: missing, unreadable, empty, multichannel or non-finite audio.
    """
    import soundfile

    path = Path(path)
    if not path.is_file():
        raise InputError(f"audio file {path} does not exist")
    try:
        data, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as e:
        raise InputError(f"audio file {path} cannot be read ({e.error_string}); give WAV or FLAC") from e
    if data.shape[0] == 0:
        raise InputError(f"audio file {path} is empty (0 samples)")
    if data.shape[1] > 2:
        raise InputError(
            f"audio file {path} has {data.shape[1]} channels; give mono or stereo, or pick a channel first"
        )
    if not np.isfinite(data).all():
        raise InputError(f"audio file {path} holds NaN or infinite samples; repair or re-encode it")
    signal = data.mean(axis=1, dtype=np.float32)
    return (signal if rate_hz is None else resample(signal, rate, rate_hz)), rate


def resample(signal: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Resample along the last axis."""
    if from_hz == to_hz:
        return signal
    import soxr

    moved = soxr.resample(signal.T, from_hz, to_hz)
    return np.ascontiguousarray(moved.T, dtype=np.float32)


def write(path: Path, signal: np.ndarray, rate_hz: int) -> None:
    """Write ``(samples,)`` as 32-bit float WAV, which neither clips nor rounds."""
    import soundfile

    soundfile.write(path, signal, rate_hz, subtype="FLOAT")
