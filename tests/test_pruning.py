"""Pruning: a pruned separator is the original without some channels, for every architecture; what is refused."""

import copy
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import shallow
from torch import nn

from edgesep import BuildError, InputError, graph, load_separator
from edgesep.calibration import MixtureSet
from edgesep.passes.base import Context
from edgesep.passes.prune import Prune
from edgesep.runtimes import runtime
from edgesep.separators import iianet, lip, spmamba, tdanet, tfacm
from edgesep.separators.base import resize
from edgesep.separators.segments import LastNorm
from edgesep.verify import output_snr_db

UCONV = {"out_channels": 16, "in_channels": 32, "num_blocks": 2, "upsampling_depth": 3, "enc_kernel_size": 4}
SPECTRAL = {"n_srcs": 2, "n_fft": 64, "stride": 32, "n_layers": 2, "attn_n_head": 2, "attn_approx_qk_dim": 66}
MADE = {
    "TDANet": lambda: tdanet.create({**UCONV, "num_sources": 2}, 8000),
    "IIANet": lambda: iianet.create(
        {**UCONV, "num_sources": 1, "vpre_channels": 24, "vin_channels": 16, "vout_channels": 16}, 8000
    ),
    "SPMamba": lambda: spmamba.create({**SPECTRAL, "emb_dim": 8, "emb_ks": 2, "emb_hs": 2}, 8000),
    "TFACM": lambda: tfacm.create({**SPECTRAL, "emb_dim": 16, "emb_ks": 4, "lstm_hidden_units": 16}, 8000),
}


@pytest.fixture(scope="module", params=sorted(MADE))
def separator(request):
    torch.manual_seed(3)
    made = MADE[request.param]()
    with torch.no_grad():  # no two weights alike, no bias zero: every slice can be told from the others
        for p in made.module.parameters():
            p.add_(0.05 * torch.randn(p.shape, dtype=torch.float64).to(p))
    return made


@pytest.fixture
def context(separator, mixtures, tmp_path):
    if len(separator.inputs) > 1:  # the front-end makes its embedding; its mouths are shown by the packaged set
        mixtures = Path(resources.files("edgesep")) / "demo" / "sets" / "calibration"
        separator = replace(separator, front_end=lip.create({"stem": 3}, 0))
        mixture_set = MixtureSet.open(mixtures, 8000, separator.sources, mouth=True)
        mixture_set = replace(mixture_set, rows=mixture_set.rows[:2])
        return Context(separator, mixture_set, mixture_set, tmp_path)
    mixture_set = MixtureSet.open(mixtures, 8000, separator.sources)
    return Context(separator, mixture_set, mixture_set, tmp_path)


def kept(whole: torch.Tensor, part: torch.Tensor) -> list[torch.Tensor]:
    """For each axis the indices of ``whole`` that are left in ``part``."""
    found = []
    for axis in range(part.ndim):
        line = part.movedim(axis, -1).reshape(-1, part.shape[axis])[0]
        places = [(whole == value).nonzero() for value in line]
        assert all(len(p) == 1 for p in places), "values are not unique"
        found.append(torch.stack([p[0, axis] for p in places]))
    return found


class Masked(nn.Module):
    """A norm over the channels that are left; the others are zero."""

    def __init__(self, norm, channels, left):
        super().__init__()
        self.norm, self.channels, self.left = norm, channels, left

    def forward(self, x):
        axis = 1 if isinstance(self.norm, nn.GroupNorm) else -1
        whole = torch.zeros_like(x)
        return whole.index_copy(axis, self.left, self.norm(x.index_select(axis, self.left)))


def masked(original: nn.Module, pruned: nn.Module) -> nn.Module:
    """The original at its own size with what pruning removed set to zero and left out of the norms."""
    module, before, after = copy.deepcopy(original), dict(original.named_parameters()), dict(pruned.named_parameters())
    for name, parameter in module.named_parameters():
        if before[name].shape != after[name].shape:
            with torch.no_grad():
                parameter.zero_()
                parameter[torch.meshgrid(*kept(before[name], after[name]), indexing="ij")] = after[name]
    for name, norm in list(module.named_modules()):
        key = f"{name}.gamma" if isinstance(norm, LastNorm) else f"{name}.weight"
        if not isinstance(norm, nn.GroupNorm | nn.LayerNorm | LastNorm) or before[key].shape == after[key].shape:
            continue
        axis = 1 if isinstance(norm, LastNorm) else 0
        parent, _, leaf = name.rpartition(".")
        small = Masked(pruned.get_submodule(name), before[key].shape[axis], kept(before[key], after[key])[axis])
        setattr(module.get_submodule(parent), leaf, small)
    return module


def test_a_pruned_separator_is_the_original_with_the_removed_channels_masked(separator, context):
    pruned = Prune(0.3, importance="l1")(separator, context).separator
    inputs = separator.example_inputs(4003, batch=2)
    with torch.inference_mode():
        expected = masked(separator.module, pruned.module)(*inputs).numpy()
        got = pruned.module(*inputs).numpy()
        whole = separator.module(*inputs).numpy()
    assert output_snr_db(got, expected) >= 100
    assert output_snr_db(got, whole) < 60, "pruning changed nothing"


def test_the_share_is_reached_and_what_must_stay_stays(separator, context):
    result = Prune(0.3)(separator, context)
    pruned = result.separator
    assert 0.3 <= result.report["macs_removed_share"] < 0.5
    assert pruned.parameters < separator.parameters
    for name in separator.keep_shape:
        axis = 1 if isinstance(separator.module.get_submodule(name), nn.ConvTranspose2d) else 0  # of its outputs
        before, after = (s.module.get_submodule(name).weight.shape[axis] for s in (separator, pruned))
        assert before == after
    inputs = separator.example_inputs(3001)
    assert pruned.module(*inputs).shape == separator.module(*inputs).shape
    again = copy.deepcopy(separator.module)
    resize(again, pruned.module.state_dict())
    torch.testing.assert_close(again(*inputs), pruned.module(*inputs))


def test_a_share_of_the_parameters_can_be_asked_for(separator, context):
    result = Prune(0.2, of="parameters")(separator, context)
    assert result.separator.parameters <= 0.8 * sum(p.numel() for p in separator.module.parameters())


@pytest.mark.slow  # minutes of tracing
def test_pruned_separators_export(separator, context, tmp_path):
    pruned = Prune(0.3)(separator, context).separator
    graph.export_onnx(pruned, pruned.module, tmp_path / "pruned.onnx")
    from edgesep.ops import onnx_forms

    onnx_forms.write_form(tmp_path / "pruned.onnx", tmp_path / "pruned.onnx")
    inputs = pruned.example_inputs(3001)
    feeds = {s.name: x.numpy() for s, x in zip(pruned.inputs, inputs, strict=True)}
    with runtime("onnxruntime").Runner(tmp_path, ["pruned.onnx"], "fp32") as runner:
        assert output_snr_db(runner.run(feeds)["estimates"], pruned.module(*inputs).detach().numpy()) >= 80


def test_gradients_tell_other_channels_from_norms(context, separator):
    by_norm, by_gradient = (Prune(0.3, importance=i)(separator, context).separator for i in ("l2", "taylor"))
    same = [
        torch.equal(a, b)
        for a, b in zip(by_norm.module.parameters(), by_gradient.module.parameters(), strict=True)
        if a.shape == b.shape
    ]
    assert not all(same)
    assert all(p.grad is None for p in separator.module.parameters()), "the original stays as it is"


@pytest.mark.slow  # an export for each width that is tried
def test_latency_can_be_asked_for(mixtures, tmp_path):
    torch.manual_seed(1)
    wide = tdanet.create({**UCONV, "in_channels": 256, "num_sources": 2}, 8000)
    mixture_set = MixtureSet.open(mixtures, 8000)
    report = Prune(0.2, of="latency")(wide, Context(wide, mixture_set, mixture_set, tmp_path)).report
    assert report["removed_share"] >= 0.2


@pytest.mark.parametrize("share", [0.0, 1.0, -0.2])
def test_impossible_shares_are_refused(share):
    with pytest.raises(InputError, match="between 0 and 1"):
        Prune(share)


def test_unknown_measures_are_refused():
    with pytest.raises(InputError, match="use macs, parameters or latency"):
        Prune(of="joules")


def test_a_share_out_of_reach_is_said(golden, mixtures, tmp_path):
    released = load_separator(golden("tdanetbest_small").checkpoint)
    mixture_set = MixtureSet.open(mixtures, released.sample_rate_hz)
    with pytest.raises(BuildError, match="out of reach"):
        Prune(0.9, importance="l2")(released, Context(released, mixture_set, mixture_set, tmp_path))


def test_a_group_that_would_cut_a_protected_size_is_refused(separator, context, monkeypatch):
    def careless(_, source, __):
        module = copy.deepcopy(source.module)
        layer = module.get_submodule(source.keep_shape[0])
        layer.weight = nn.Parameter(
            layer.weight[:, :-1] if isinstance(layer, nn.ConvTranspose2d) else layer.weight[:-1]
        )
        return module

    monkeypatch.setattr(Prune, "_along_widths", careless)
    monkeypatch.setattr(Prune, "_along_graph", careless)
    monkeypatch.setattr("edgesep.passes.prune._macs_left", lambda _: lambda _: 0.1)
    with pytest.raises(BuildError, match="which must stay"):
        Prune(0.3)(replace(separator), context)


def test_channel_counts_are_multiples_of_what_vectors_want(separator, context):
    pruned = Prune(0.3, round_to=8)(separator, context).separator
    if separator.widths:
        assert all(w.size % 8 == 0 for w in separator.widths(pruned.module))
    else:
        sizes = [m.out_channels for n, m in pruned.module.named_modules() if n.endswith("proj_1x1.conv")]
        assert np.all(np.array(sizes) % 8 == 0)


def test_lengths_stay_dynamic_in_every_export_of_a_process(golden, tmp_path):
    separator = load_separator(shallow(golden("tfacm_released_small"), tmp_path))
    separator.module.requires_grad_(True)
    for _ in range(2):  # the first used to leave the second an unrolled LSTM
        graph.export_onnx(separator, separator.module, tmp_path / "model.onnx")
        sizes = onnx.load(tmp_path / "model.onnx").graph.input[0].type.tensor_type.shape.dim
        assert [d.dim_param for d in sizes] == ["batch", "samples"]
