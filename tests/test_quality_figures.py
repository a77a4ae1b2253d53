"""SI-SNR and what is derived from it, against values worked out by hand."""

import numpy as np
import pytest
import torch

from edgesep import VerificationError, training, verify
from edgesep.spec import Criteria

RNG = np.random.default_rng(5)
A, B = RNG.standard_normal((2, 4000))
REFERENCES = np.stack([A, B])


def noisy(reference: np.ndarray, snr_db: float) -> np.ndarray:
    """Orthogonal zero-mean noise of exactly that SNR."""
    reference = reference - reference.mean()
    noise = RNG.standard_normal(reference.size)
    noise -= noise.mean()
    noise -= (noise @ reference) / (reference @ reference) * reference
    return reference + noise * np.sqrt(reference @ reference / (noise @ noise)) * 10 ** (-snr_db / 20)


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 20.0])
@pytest.mark.parametrize("gain", [1.0, 0.01, -3.0])
def test_si_snr_is_the_snr_whatever_the_gain_and_offset(snr_db, gain):
    assert verify.si_snr_db(gain * noisy(A, snr_db) + 0.5, A) == pytest.approx(snr_db, abs=1e-3)


def test_torch_and_numpy_agree():
    estimates = np.stack([noisy(A, 7), noisy(B, 3)])
    ours = training.si_snr_db(torch.from_numpy(estimates), torch.from_numpy(REFERENCES)).numpy()
    np.testing.assert_allclose(ours, verify.si_snr_db(estimates, REFERENCES), atol=1e-6)


def test_best_assignment_is_found():
    estimates = np.stack([noisy(B, 12), noisy(A, 10)])
    assert verify.pit_si_snr_db(estimates, REFERENCES) == pytest.approx(11, abs=1e-2)
    torch_db = training.pit_db(
        torch.from_numpy(estimates[None]), torch.from_numpy(REFERENCES[None]), training.si_snr_db
    )
    assert float(torch_db) == pytest.approx(11, abs=1e-2)


def test_output_snr():
    assert verify.output_snr_db(REFERENCES, REFERENCES) == float("inf")
    assert verify.output_snr_db(REFERENCES * 1.01, REFERENCES) == pytest.approx(40, abs=1e-6)


def test_nan_and_wrong_shapes_fail():
    broken = REFERENCES.copy()
    broken[0, 7] = np.nan
    with pytest.raises(VerificationError, match="1 NaN"):
        verify.output_snr_db(broken, REFERENCES)
    with pytest.raises(VerificationError, match="shape"):
        verify.output_snr_db(REFERENCES[:1], REFERENCES)


def test_quality_of_a_known_degradation():
    items = [(((A + B)[None],), REFERENCES, np.stack([noisy(A, 20), noisy(B, 20)])) for _ in range(6)]
    found = verify.quality(lambda _: np.stack([noisy(A, 19), noisy(B, 17)])[None], items)
    assert found.si_snr_db == pytest.approx(18, abs=1e-2)
    assert found.drop_db == pytest.approx(2, abs=1e-2)
    assert found.drop_low_db <= found.drop_db <= found.drop_high_db
    assert found.si_snri_db == pytest.approx(
        18 - float(np.mean(verify.si_snr_db(np.stack([A + B] * 2), REFERENCES))), abs=1e-2
    )


def test_worst_share_takes_at_least_one():
    assert verify.worst_share([1.0, 5.0, 2.0], 0.05) == 5.0
    assert verify.worst_share([float(i) for i in range(100)], 0.05) == 97.0


def test_interval_is_deterministic_and_covers_the_mean():
    values = list(RNG.standard_normal(50) + 3)
    low, high = verify.bootstrap_interval(values)
    assert (low, high) == verify.bootstrap_interval(values)
    assert low < 3 < high
    assert high - low < 1


def quality(**changed):
    zero = dict.fromkeys(verify.Quality.__dataclass_fields__, 0.0)
    return verify.Quality(**{**zero, "output_snr_db": 100.0, **changed})


def test_every_missed_criterion_is_named():
    limits = Criteria(max_si_snr_drop_db=0.3, min_output_snr_db=80, max_rtf=0.5)
    assert verify.misses(quality(), 100, 0.1, "fp32", limits) == []
    assert len(verify.misses(quality(drop_db=0.31, output_snr_db=79), 100, 0.6, "fp32", limits)) == 3
    assert verify.misses(quality(output_snr_db=20), 20, 0.1, "int8", limits) == []
    assert len(verify.misses(quality(drop_db=float("nan")), 100, 0.1, "int8", limits)) == 1
    assert len(verify.misses(quality(), 79.0, 0.1, "fp32", limits)) == 1
