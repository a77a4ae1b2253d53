"""Long mixtures in blocks: the join."""

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import soundfile

from edgesep import InputError, blocks, load_separator, open_bundle
from edgesep.verify import output_snr_db

DEMO = Path(str(resources.files("edgesep") / "demo"))
RNG = np.random.default_rng(0)


def sources(samples):
    return RNG.standard_normal((1, 2, samples)).astype(np.float32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("samples", [4000, 4001, 9999, 16000, 40000])
def test_a_separator_without_memory_is_joined_exactly(samples, causal):
    mixture = RNG.standard_normal((2, samples)).astype(np.float32)
    joined = blocks.separate(lambda x: np.stack([x, -2 * x], 1), (mixture,), 4000, causal=causal)
    np.testing.assert_allclose(joined, np.stack([mixture, -2 * mixture], 1), rtol=1e-6, atol=1e-6)


def test_sources_keep_their_order_when_a_block_swaps_them():
    truth = sources(30000)
    calls = []

    def separator(x):
        """Knows the answer and numbers the sources differently every time."""
        start = next(i for i in range(30000) if np.array_equal(mixture[0, i : i + 50], x[0, :50]))
        calls.append(start)
        found = truth[:, :, start : start + x.shape[1]]
        return found[:, ::-1] if len(calls) % 2 == 0 else found

    mixture = truth.sum(1)
    joined = blocks.separate(separator, (mixture,), 8000)
    assert len(calls) > 3
    np.testing.assert_allclose(joined, truth, rtol=1e-5, atol=1e-6)


def test_a_causal_separator_with_a_memory_of_half_the_overlap_is_joined_exactly():
    """A running mean over 500 samples: blocks of 4000 overlap by 1000, the fade is in the last 100 of those."""
    mixture = RNG.standard_normal((1, 15000)).astype(np.float32)

    def mean_of_the_past(x):
        return np.stack([np.convolve(x[0], np.ones(500) / 500)[: x.shape[1]]])[:, None]

    whole = mean_of_the_past(mixture)
    assert output_snr_db(blocks.separate(mean_of_the_past, (mixture,), 4000, causal=True), whole) > 120
    assert output_snr_db(blocks.separate(mean_of_the_past, (mixture,), 4000), whole) < 40


@pytest.mark.parametrize(("name", "block_s"), [("tfacm", 4), ("tdanet", 8)])
def test_the_join_is_inaudible_while_the_voices_stay_the_same(name, block_s):
    """Against the whole, a packaged separator on two voices: 18 s, three seconds of a test mixture again and again.

    Where voices change the whole itself depends on how much is heard at once: see ``benchmarks/long_files.py``.
    """
    separator = load_separator(DEMO / f"{name}.pth")
    clip, rate = soundfile.read(sorted((DEMO / "sets" / "test" / "mix_clean").iterdir())[0], dtype="float32")
    mixture = np.resize(clip, (1, 18 * rate))

    def run(x):
        return np.asarray(separator(x))

    joined = blocks.separate(run, (mixture,), block_s * rate, separator.min_samples, separator.causal)
    assert output_snr_db(joined, run(mixture)) >= 25


def test_every_block_has_the_same_length():
    lengths = set()

    def note(x):
        lengths.add(x.shape[1])
        return x[:, None]

    blocks.separate(note, (np.ones((1, 12345), np.float32),), 3000)
    assert lengths == {3000}


def test_video_is_cut_beside_the_audio():
    seen = []

    def note(x, v):
        seen.append((x[0, 0], v[0, 0, 0, 0, 0], v.shape[2]))
        return x[:, None]

    audio = np.arange(32000, dtype=np.float32)[None]
    frames = np.arange(100, dtype=np.float32)[None, None, :, None, None]
    blocks.separate(note, (audio, frames), 8000)
    assert all(abs(a / 320 - v) <= 1 and n == 25 for a, v, n in seen)


def test_blocks_of_a_bundle_and_too_short_ones(deployed):
    bundle = open_bundle(deployed[0].path)
    mixture = 0.1 * RNG.standard_normal(3 * 8000).astype(np.float32)
    whole = bundle.separate(mixture, precision="fp32")
    once = bundle.separate(mixture, precision="fp32", block_s=4.0)
    np.testing.assert_array_equal(once, whole)
    assert bundle.separate(mixture, precision="fp32", block_s=1.0).shape == whole.shape
    with pytest.raises(InputError, match="too short"):
        bundle.separate(mixture, block_s=0.0)
    assert output_snr_db(once, whole) == float("inf")
