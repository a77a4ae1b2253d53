"""Every way a checkpoint can be wrong has one line that says so."""

import os

import pytest
import torch

from edgesep import InputError, load_separator


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_separator(tmp_path / "none.pth")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_file(golden, tmp_path, share):
    whole = golden("tdanet_small").checkpoint.read_bytes()
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match="damaged"):
        load_separator(cut)


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_pickle_with_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(1)}, "extra": Harmful()}, "evil.pth")
    with pytest.raises(InputError, match="Python code"):
        load_separator("evil.pth")
    assert not (tmp_path / "harmed").exists()


def test_text_file(tmp_path):
    (tmp_path / "notes.pth").write_text("not a checkpoint")
    with pytest.raises(InputError, match=r"notes\.pth"):
        load_separator(tmp_path / "notes.pth")


def test_state_dict_of_another_model(tmp_path):
    torch.save({"fc.weight": torch.ones(3, 3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="which separator"):
        load_separator(tmp_path / "other.pth")
    with pytest.raises(InputError, match="no TDANet"):
        load_separator(tmp_path / "other.pth", name="TDANet")


def test_unknown_separator_lists_the_known_ones(golden):
    with pytest.raises(InputError, match=r"known are .*TDANet"):
        load_separator(golden("tdanet_small").checkpoint, name="ConvTasNet")


def test_missing_and_extra_weights_are_listed(golden, tmp_path):
    state = dict(golden("tdanet_small").state)
    del state["bottleneck.bias"]
    state["surprise"] = torch.ones(2)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"1 missing \(bottleneck.bias\); 1 unexpected \(surprise\)"):
        load_separator(tmp_path / "w.pth", golden("tdanet_small").conf)


def changed(conf, **audio):
    net = conf["audionet"]
    return {**conf, "audionet": {**net, "audionet_config": {**net["audionet_config"], **audio}}}


def test_configuration_that_contradicts_the_weights(golden):
    g = golden("tdanet_small")
    with pytest.raises(InputError, match=r"in_channels = 64, but the weights .* have 32"):
        load_separator(g.checkpoint, changed(g.conf, in_channels=64))


def test_checkpoint_of_another_sample_rate(golden):
    g = golden("tdanet_small")
    conf = {**g.conf, "datamodule": {"data_config": {"sample_rate": 16000}}}
    with pytest.raises(InputError, match="another sample rate"):
        load_separator(g.checkpoint, conf)


def test_bare_state_dict_without_configuration_asks_for_it(golden, tmp_path):
    torch.save(golden("tdanet_small").state, tmp_path / "w.pth")
    with pytest.raises(InputError, match="sample rate"):
        load_separator(tmp_path / "w.pth")


def test_broken_yaml(golden, tmp_path):
    (tmp_path / "conf.yml").write_text("a: [")
    with pytest.raises(InputError, match="not valid YAML"):
        load_separator(golden("tdanet_small").checkpoint, tmp_path / "conf.yml")


@pytest.mark.parametrize(
    ("fixture", "name"),
    [
        ("tdanet_small", "SPMamba"),
        ("tdanet_small", "IIANet"),
        ("iianet_small", "TDANet"),
        ("spmamba_small", "TFACMCausal"),
        ("tfacm_released_small", "SPMamba"),
        ("lip_frontend", "TFACMCausal"),
    ],
)
def test_another_architecture_than_the_named_one(golden, tmp_path, fixture, name):
    torch.save(golden(fixture).state, tmp_path / "w.pth")
    conf = {"datamodule": {"data_config": {"sample_rate": 8000}}}
    with pytest.raises(InputError, match=r"w\.pth"):
        load_separator(tmp_path / "w.pth", conf, name=name)


@pytest.mark.parametrize(("fixture", "n_fft"), [("spmamba_small", 64), ("tfacm_released_small", 32)])
def test_a_window_that_contradicts_the_weights(golden, fixture, n_fft):
    g = golden(fixture)
    with pytest.raises(InputError, match=rf"n_fft = 128, but the weights .* have {n_fft};"):
        load_separator(g.checkpoint, changed(g.conf, n_fft=128))


def test_variants_are_named_and_belong_to_separators_that_have_them(golden):
    tfacm = golden("tfacm_released_small").checkpoint
    assert load_separator(tfacm, variant="causal").causal
    assert not load_separator(tfacm, variant="released").causal
    with pytest.raises(InputError, match="use 'causal' or 'released'"):
        load_separator(tfacm, variant="streaming")
    with pytest.raises(InputError, match="TDANet has no variant 'causal'"):
        load_separator(golden("tdanet_small").checkpoint, variant="causal")
