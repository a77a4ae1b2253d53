"""Causal convolution and the U-Conv unit: native kernels against the reference, forwards and backwards."""

import numpy as np
import pytest
import torch

from edgesep import kernels
from edgesep.ops import causal_conv, causal_conv_torch, conv_norm_torch
from edgesep.separators.uconv import ConvNorm, Fusion
from edgesep.verify import output_snr_db


@pytest.mark.parametrize(("channels", "taps", "length"), [(16, 4, 40), (37, 4, 1), (5, 1, 9), (20, 8, 5)])
@pytest.mark.parametrize("reverse", [False, True])
def test_causal_convolution_equals_the_reference(channels, taps, length, reverse):
    r = np.random.default_rng(0)
    shapes = {"x": (2, length, channels), "weight": (channels, taps), "bias": (channels,)}
    inputs = {k: r.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    tensors = [torch.from_numpy(v).requires_grad_() for v in inputs.values()]
    y = causal_conv_torch.conv_op(*tensors, reverse)
    assert output_snr_db(y.detach().numpy(), causal_conv.reference(**inputs, reverse=reverse)) >= 110
    exact = [v.detach().double().requires_grad_() for v in tensors]
    ours = torch.autograd.grad(y.square().sum(), tensors)
    theirs = torch.autograd.grad(causal_conv_torch.plain(*exact, reverse).square().sum(), exact)
    for a, b in zip(ours, theirs, strict=True):
        assert output_snr_db(a.numpy(), b.numpy()) >= 100


def test_causal_convolution_looks_back_only():
    x = torch.randn(1, 20, 16)
    weight, bias = torch.randn(16, 4), torch.randn(16)
    before = causal_conv_torch.conv_op(x, weight, bias)
    x[:, 12:] += 1
    torch.testing.assert_close(causal_conv_torch.conv_op(x, weight, bias)[:, :12], before[:, :12], rtol=0, atol=0)


def test_causal_convolution_names_what_does_not_fit():
    with pytest.raises(ValueError, match="weight has shape"):
        causal_conv_torch.conv_op(torch.randn(1, 4, 8), torch.randn(8, 9), torch.randn(8))


def both_ways(module, *inputs):
    """Output and gradients: in float64 by torch, in float32 by the kernels."""
    found = []
    for dtype in (torch.float64, torch.float32):
        copy = module.to(dtype).train()
        given = [x.to(dtype).to(memory_format=torch.channels_last).requires_grad_() for x in inputs]
        y = copy(*given)
        named = {**{str(i): x for i, x in enumerate(given)}, **dict(copy.named_parameters())}
        weight = torch.arange(y.numel(), dtype=dtype).reshape(y.shape).sin()
        grads = torch.autograd.grad((y * weight).sum(), list(named.values()))
        found.append({"output": y.detach(), **dict(zip(named, grads, strict=True))})
    return found


@pytest.mark.parametrize("channels", [16, 21])
@pytest.mark.parametrize(("taps", "stride"), [(1, 1), (5, 1), (5, 2), (3, 1)])
@pytest.mark.parametrize("act", [None, "prelu"])
@pytest.mark.parametrize("frames", [2, 3, 40])
def test_depthwise_unit(channels, taps, stride, act, frames):
    torch.manual_seed(0)
    unit = ConvNorm(channels, channels, taps, stride, channels, act=torch.nn.PReLU() if act else None)
    exact, ours = both_ways(unit, torch.randn(2, channels, 1, frames))
    for name, value in exact.items():
        assert output_snr_db(ours[name].numpy(), value.numpy()) >= 80, name


def test_pointwise_unit():
    torch.manual_seed(0)
    exact, ours = both_ways(ConvNorm(12, 20, 1, act=torch.nn.PReLU()), torch.randn(2, 12, 1, 33))
    for name, value in exact.items():
        if name != "conv.bias":  # the norm behind it takes a constant away: its gradient is rounding
            assert output_snr_db(ours[name].numpy(), value.numpy()) >= 80, name


@pytest.mark.parametrize(("frames", "coarse"), [(40, 20), (41, 21), (20, 20), (10, 20)])
def test_fusion(frames, coarse):
    torch.manual_seed(0)
    exact, ours = both_ways(Fusion(20, 5), torch.randn(2, 20, 1, frames), torch.randn(2, 20, 1, coarse))
    for name, value in exact.items():
        assert output_snr_db(ours[name].numpy(), value.numpy()) >= 80, name


def test_kernels_are_for_training_only():
    unit = ConvNorm(8, 8, 5, groups=8)
    x = torch.randn(1, 8, 1, 9)
    assert conv_norm_torch.wanted(unit.train(), x)
    assert not conv_norm_torch.wanted(unit.eval(), x)
    with torch.no_grad():
        assert not conv_norm_torch.wanted(unit.train(), x)


def test_the_build_is_found_again(monkeypatch):
    first = kernels.build()
    monkeypatch.setattr(kernels, "tool", lambda _: pytest.fail("compiled again"))
    assert kernels.build() == first


def test_missing_compiler_is_named(monkeypatch):
    from edgesep import UnsupportedError

    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UnsupportedError, match=r"no-such-compiler.*install"):
        kernels.compiler()


def test_kernels_that_do_not_compile_leave_nothing(monkeypatch, tmp_path):
    from edgesep import BuildError

    monkeypatch.setenv("EDGESEP_CACHE", str(tmp_path / "cache"))
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "CMakeLists.txt").write_text("cmake_minimum_required(VERSION 3.20)\nproject(x CXX)\nbroken(\n")
    monkeypatch.setattr(kernels, "SOURCES", sources)
    with pytest.raises(BuildError, match="did not compile"):
        kernels.build()
    assert not list((tmp_path / "cache").iterdir())
