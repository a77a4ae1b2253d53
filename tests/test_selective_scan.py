"""The selective scan: the torch forms against the float64 reference."""

import numpy as np
import pytest
import torch

from edgesep.ops import selective_scan as op
from edgesep.verify import output_snr_db


def case(batch=3, length=37, channels=11, state=16, seed=0):
    r = np.random.default_rng(seed)
    made = {
        "u": r.standard_normal((batch, length, channels)),
        "delta": r.standard_normal((batch, length, channels)) - 2,
        "A": -np.exp(r.uniform(-1, 2, (channels, state))),
        "B": r.standard_normal((batch, length, state)),
        "C": r.standard_normal((batch, length, state)),
        "D": r.standard_normal(channels),
        "z": r.standard_normal((batch, length, channels)),
        "delta_bias": r.standard_normal(channels),
    }
    return {k: v.astype(np.float32) for k, v in made.items()}


@pytest.mark.parametrize("length", [1, 2, 37, 130])
@pytest.mark.parametrize("gradients", [False, True])
def test_torch_equals_the_reference(length, gradients):
    inputs = case(length=length)
    expected, _ = op.reference(**inputs, delta_softplus=True)
    with torch.set_grad_enabled(gradients):
        y = op.selective_scan(**{k: torch.from_numpy(v) for k, v in inputs.items()})
    assert output_snr_db(y.numpy(), expected) >= 110


def test_gradients_are_those_of_the_recurrence():
    inputs = {k: torch.from_numpy(v).double().requires_grad_() for k, v in case(2, 9, 3, 4).items()}

    def plain(u, delta, A, B, C, D, z, delta_bias):
        dt = torch.nn.functional.softplus(delta + delta_bias)
        h, rows = 0, []
        for t in range(u.shape[1]):
            h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
            rows.append((h * C[:, t, None]).sum(-1))
        return (torch.stack(rows, 1) + D * u) * torch.nn.functional.silu(z)

    ours = torch.autograd.grad(op.selective_scan(**inputs).square().sum(), list(inputs.values()))
    theirs = torch.autograd.grad(plain(**inputs).square().sum(), list(inputs.values()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_reverse_is_the_scan_of_the_flipped_sequence():
    inputs = case()
    forward, last = op.reference(**inputs, delta_softplus=True, reverse=True)
    over_time = {"u", "delta", "B", "C", "z"}
    flipped = {k: v[:, ::-1] if k in over_time else v for k, v in inputs.items()}
    again, last_again = op.reference(**flipped, delta_softplus=True)
    np.testing.assert_allclose(forward, again[:, ::-1])
    np.testing.assert_allclose(last, last_again)


def test_two_halves_with_the_state_handed_over_equal_the_whole():
    inputs = case(length=20)
    whole, last = op.reference(**inputs, delta_softplus=True)
    over_time = {"u", "delta", "B", "C", "z"}
    state, parts = None, []
    for part in (slice(0, 7), slice(7, 20)):
        y, state = op.reference(
            **{k: v[:, part] if k in over_time else v for k, v in inputs.items()},
            initial_state=state,
            delta_softplus=True,
        )
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole)
    np.testing.assert_allclose(state, last)


def test_shapes_that_do_not_fit_are_named():
    inputs = case()
    with pytest.raises(ValueError, match="B has shape"):
        op.reference(**{**inputs, "B": inputs["B"][:, :3]})
