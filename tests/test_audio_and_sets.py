"""Audio files and mixture sets: what is read, what is refused."""

import numpy as np
import pytest
import soundfile
from conftest import write_set

from edgesep import InputError, audio
from edgesep.calibration import MixtureSet

RNG = np.random.default_rng(0)
SIGNAL = (0.1 * RNG.standard_normal(4000)).astype(np.float32)


@pytest.mark.parametrize(("name", "subtype"), [("a.wav", "PCM_24"), ("a.wav", "FLOAT"), ("a.flac", "PCM_16")])
def test_depths_and_formats_are_read(tmp_path, name, subtype):
    soundfile.write(tmp_path / name, SIGNAL, 8000, subtype=subtype)
    read, rate = audio.read(tmp_path / name)
    assert rate == 8000
    np.testing.assert_allclose(read, SIGNAL, atol=2e-5)


def test_stereo_is_averaged(tmp_path):
    soundfile.write(tmp_path / "st.wav", np.stack([SIGNAL, 3 * SIGNAL], 1), 8000, subtype="FLOAT")
    np.testing.assert_allclose(audio.read(tmp_path / "st.wav")[0], 2 * SIGNAL, atol=1e-6)


def test_other_rates_are_resampled(tmp_path):
    t = np.arange(16000) / 16000
    soundfile.write(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 440 * t), 16000, subtype="FLOAT")
    read, rate = audio.read(tmp_path / "tone.wav", 8000)
    assert (rate, read.size) == (16000, 8000)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    assert 10 * np.log10((expected[200:-200] ** 2).sum() / ((read - expected)[200:-200] ** 2).sum()) > 60


def test_unusable_audio_is_refused(tmp_path):
    cases = {
        "8 channels": np.zeros((100, 8)),
        "empty": np.zeros(0),
        "NaN": np.array([0.1, np.nan, 0.2]),
    }
    for reason, data in cases.items():
        soundfile.write(tmp_path / "bad.wav", data, 8000, subtype="FLOAT")
        with pytest.raises(InputError, match=reason):
            audio.read(tmp_path / "bad.wav")
    (tmp_path / "text.wav").write_text("hello")
    with pytest.raises(InputError, match="cannot be read"):
        audio.read(tmp_path / "text.wav")


def test_folder_and_csv_hold_the_same_mixtures(mixtures, tmp_path):
    folder = MixtureSet.open(mixtures, 8000)
    rows = ["mixture_path,source_1_path,source_2_path"]
    rows += [",".join(str(mixtures / d / f"{i}.wav") for d in ("mix_clean", "s1", "s2")) for i in range(4)]
    (tmp_path / "set.csv").write_text("\n".join(rows))
    listed = MixtureSet.open(tmp_path / "set.csv", 8000)
    assert len(folder) == len(listed) == 4
    assert folder.digest() == listed.digest()
    np.testing.assert_array_equal(folder[2].sources, listed[2].sources)


def test_mixture_is_the_sum_of_its_sources(mixtures):
    for item in MixtureSet.open(mixtures, 8000):
        np.testing.assert_allclose(item.mixture, item.sources.sum(0), atol=1e-6)


def test_empty_and_missing_sets(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        MixtureSet.open(tmp_path / "none", 8000)
    with pytest.raises(InputError, match="no folder mix"):
        MixtureSet.open(tmp_path, 8000)
    (tmp_path / "mix").mkdir()
    with pytest.raises(InputError, match="is empty"):
        MixtureSet.open(tmp_path, 8000)
    (tmp_path / "bad.csv").write_text("a,b\n")
    with pytest.raises(InputError, match="lacks the column"):
        MixtureSet.open(tmp_path / "bad.csv", 8000)


@pytest.mark.parametrize(
    ("signal", "rate", "message"),
    [
        (SIGNAL[:100], 8000, "has 100 samples"),
        (np.tile(SIGNAL, 4), 16000, "has 16000 Hz"),
        (np.zeros(6400, np.float32), 8000, "is silent"),
    ],
)
def test_references_that_do_not_fit(tmp_path, signal, rate, message):
    root = write_set(tmp_path / "set", mixtures=1)
    soundfile.write(root / "s2" / "0.wav", signal, rate, subtype="FLOAT")
    with pytest.raises(InputError, match=message):
        MixtureSet.open(root, 8000)[0]


def test_missing_reference(tmp_path):
    root = write_set(tmp_path / "set", mixtures=1)
    (root / "s1" / "0.wav").unlink()
    with pytest.raises(InputError, match="has no reference"):
        MixtureSet.open(root, 8000)
