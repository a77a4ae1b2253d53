"""The selective scan: the native kernels and the torch forms against the float64 reference."""

import numpy as np
import pytest
import torch

from edgesep import kernels
from edgesep.ops import selective_scan as op
from edgesep.ops import selective_scan_torch as in_torch
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


def tensors(inputs):
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in inputs.items()}


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def instruction_set(request):
    library = kernels.core()
    before = library.edgesep_instruction_set()
    if library.edgesep_use(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    library.edgesep_use(before)


@pytest.mark.parametrize("length", [1, 2, 37, 130, 4096])
@pytest.mark.parametrize(("channels", "state"), [(1, 16), (16, 16), (37, 1), (23, 5), (50, 64)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.usefixtures("instruction_set")
def test_kernel_equals_the_reference(length, channels, state, reverse):
    inputs = case(2, length, channels, state)
    start = np.random.default_rng(1).standard_normal((2, channels, state)).astype(np.float32)
    y, last = in_torch.scan_op(
        **tensors(inputs), initial_state=torch.from_numpy(start), delta_softplus=True, reverse=reverse
    )
    expected, end = op.reference(**inputs, initial_state=start, delta_softplus=True, reverse=reverse)
    assert output_snr_db(y.numpy(), expected) >= 110
    assert output_snr_db(last.numpy(), end) >= 110


@pytest.mark.parametrize("shift", [-30.0, -12.0, 12.0])
@pytest.mark.usefixtures("instruction_set")
def test_kernel_with_tiny_and_large_steps(shift):
    inputs = case()
    inputs["delta"] = inputs["delta"] + np.float32(shift)
    y, _ = in_torch.scan_op(**tensors(inputs), delta_softplus=True)
    assert output_snr_db(y.numpy(), op.reference(**inputs, delta_softplus=True)[0]) >= 110


@pytest.mark.usefixtures("instruction_set")
def test_kernel_with_denormal_inputs():
    inputs = case() | {"D": np.zeros(11, np.float32)}
    inputs["u"] = inputs["u"] * np.float32(1e-38)
    y, _ = in_torch.scan_op(**tensors(inputs), delta_softplus=True)
    expected, _ = op.reference(**inputs, delta_softplus=True)
    assert np.isfinite(y.numpy()).all()
    assert np.abs(y.numpy() - expected).max() <= 1e-38


@pytest.mark.parametrize("name", ["u", "delta", "z"])
@pytest.mark.usefixtures("instruction_set")
def test_nan_stays_in_its_row(name):
    inputs = case(channels=37)
    clean, _ = in_torch.scan_op(**tensors(inputs), delta_softplus=True)
    inputs[name][1, 5, 20] = np.nan
    y, _ = in_torch.scan_op(**tensors(inputs), delta_softplus=True)
    assert torch.isnan(y[1, 5, 20])
    others = torch.ones(37, dtype=bool)
    others[20] = False
    torch.testing.assert_close(y[:, :, others], clean[:, :, others])
    torch.testing.assert_close(y[0], clean[0])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_those_of_the_recurrence(monkeypatch, native, channels, reverse):
    if not native:
        monkeypatch.setattr(kernels, "core_if_possible", lambda: None)
    inputs = {k: v.requires_grad_() for k, v in tensors(case(2, 9, channels, 4)).items()}

    def plain(u, delta, A, B, C, D, z, delta_bias):
        dt = torch.nn.functional.softplus(delta + delta_bias)
        h, rows = 0, []
        for t in reversed(range(u.shape[1])) if reverse else range(u.shape[1]):
            h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
            rows.append((h * C[:, t, None]).sum(-1))
        rows = torch.stack(rows[::-1] if reverse else rows, 1)
        return (rows + D * u) * torch.nn.functional.silu(z)

    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    y, _ = in_torch.scan_op(**inputs, delta_softplus=True, reverse=reverse)
    ours = torch.autograd.grad(y.square().sum(), list(inputs.values()))
    theirs = torch.autograd.grad(plain(**exact).square().sum(), list(exact.values()))
    for a, b in zip(ours, theirs, strict=True):
        assert output_snr_db(a.numpy(), b.numpy()) >= 100


def test_without_a_compiler_the_loop_gives_the_same(monkeypatch):
    inputs = case()
    monkeypatch.setattr(kernels, "core_if_possible", lambda: None)
    y, _ = in_torch.scan_op(**tensors(inputs), delta_softplus=True)
    assert output_snr_db(y.numpy(), op.reference(**inputs, delta_softplus=True)[0]) >= 110


def test_threads_split_rows_without_a_trace(monkeypatch):
    inputs = tensors(case(5, 20, 37))
    alone, _ = in_torch.scan_op(**inputs, delta_softplus=True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    torch.testing.assert_close(in_torch.scan_op(**inputs, delta_softplus=True)[0], alone, rtol=0, atol=0)


def test_other_number_types_are_named():
    inputs = tensors(case())
    with pytest.raises(ValueError, match=r"C is torch.float64"):
        in_torch.scan_op(**{**inputs, "C": inputs["C"].double()})


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
