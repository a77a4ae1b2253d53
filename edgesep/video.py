"""Mouth video as the lip front-end wants it. Costs numpy only.

Shapes: a video is ``(frames, height, width)`` uint8 grey, 25 frames a second, the mouth in the middle; crops are
``(1, frames, 88, 88)`` float32.

What happens to video that does not cover the audio (``fit``): it may be up to ``TOLERANCE_S`` plus 5 % shorter or
longer. Shorter video ends with its last frame frozen, longer video is cut. Video that starts late is told so
(``late_s``): grey frames stand in front. Frozen video is used as it is. No video at all is refused.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from edgesep.spec import InputError

FRAMES_PER_S, CROP = 25, 88
MEAN, STD = 0.421, 0.165  # grey level of mouth crops over the corpus the published front-end was trained on
TOLERANCE_S = 0.2


def read(path: Path) -> np.ndarray:
    """Read a ``.npz`` with an array ``data`` (the layout of the LRS2 and LRW tools) or a ``.npy``.

    Raises:
        InputError: missing or damaged file, or not a grey video.
    """
    if not path.is_file():
        raise InputError(f"mouth video {path} does not exist; give a .npz (array data) or .npy of (frames, 88, 88)")
    try:
        with path.open("rb") as f:
            loaded = np.load(f)
            video = loaded["data"] if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise InputError(
            f"mouth video {path} cannot be read ({type(e).__name__}); give a .npz with data or .npy"
        ) from e
    if video.ndim != 3 or video.dtype != np.uint8 or 0 in video.shape or min(video.shape[1:]) < CROP:
        raise InputError(
            f"mouth video {path} has shape {video.shape} {video.dtype}, expected (frames, height, width) uint8, at"
            f" least {CROP} high and wide"
        )
    return video


def frames_for(samples: int, rate_hz: int) -> int:
    """How many frames accompany that many samples."""
    return max(1, round(samples / rate_hz * FRAMES_PER_S))


def crops(video: np.ndarray) -> np.ndarray:
    """``(frames, height, width)`` uint8 → the middle as normalised ``(1, frames, 88, 88)``."""
    top, left = ((n - CROP) // 2 for n in video.shape[1:])
    middle = video[:, top : top + CROP, left : left + CROP].astype(np.float32)
    return ((middle / 255 - MEAN) / STD)[None]


def fit(made: np.ndarray, samples: int, rate_hz: int, late_s: float = 0.0) -> np.ndarray:
    """Bring crops ``(1, frames, 88, 88)`` to the audio's length (see the module's note).

    Args:
        late_s: how much later than the audio the video starts.

    Raises:
        InputError: the video is far shorter or longer than the audio: another frame rate, or another recording.
    """
    wanted = frames_for(samples, rate_hz)
    grey = np.zeros((1, round(late_s * FRAMES_PER_S), *made.shape[2:]), np.float32)
    made = np.concatenate([grey, made], 1)
    have = made.shape[1]
    if abs(have - wanted) > TOLERANCE_S * FRAMES_PER_S + 0.05 * wanted:
        raise InputError(
            f"mouth video has {have} frames, {samples / rate_hz:.2f} s of audio need {wanted} at {FRAMES_PER_S} frames"
            f" a second ({TOLERANCE_S} s + 5 % off at most); convert it to {FRAMES_PER_S} frames a second"
        )
    frozen = np.repeat(made[:, -1:], max(0, wanted - have), axis=1)
    return np.concatenate([made, frozen], 1)[:, :wanted]


class Shown:
    """Mouth video as it comes, of which the newest frames accompany the newest audio."""

    def __init__(self, samples: int, rate_hz: int):
        self.rate_hz, self.wanted = rate_hz, frames_for(samples, rate_hz)
        self.reset()

    def reset(self) -> None:
        self.newest = np.zeros((1, 0, CROP, CROP), np.float32)
        self.count = 0

    def add(self, frames: np.ndarray) -> None:
        """``(frames, height, width)`` uint8; frames far ahead of the audio are kept until it has come."""
        self.newest = np.concatenate([self.newest, crops(frames)], 1)
        self.count += frames.shape[0]

    def until(self, sample: int) -> np.ndarray:
        """Crops ``(1, 1, frames, 88, 88)`` of the block that ends with this sample; grey before the first frame.

        Raises:
            InputError: the video is further behind than ``fit`` allows.
        """
        end = round(sample / self.rate_hz * FRAMES_PER_S)
        missing = max(0, end - self.count)
        if missing > TOLERANCE_S * FRAMES_PER_S + 0.05 * self.wanted:
            raise InputError(f"{self.count} frames of mouth video were shown, {sample / self.rate_hz:.2f} s need {end}")
        first = self.count - self.newest.shape[1]  # number of the oldest frame that is kept
        used = self.newest[:, max(0, end - self.wanted - first) : max(0, end - first)]
        self.newest, grey = self.newest[:, max(0, end - self.wanted - first) :], self.wanted - used.shape[1] - missing
        frozen = np.repeat(used[:, -1:], missing, axis=1)
        return np.concatenate([np.zeros((1, max(0, grey), CROP, CROP), np.float32), used, frozen], 1)[
            None, :, -self.wanted :
        ]
