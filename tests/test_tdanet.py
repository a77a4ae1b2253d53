"""TDANet: the authors' outputs from the authors' files, in every file format."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edgesep import load_separator
from edgesep.separators import tdanet, uconv
from edgesep.separators.base import unrolled
from edgesep.verify import output_snr_db

SIZES = {"enc_kernel_size": 4, "num_sources": 2}


def test_one_dimensional_input_gives_one_result(golden):
    g = golden("tdanet_small")
    separator = load_separator(g.checkpoint)
    np.testing.assert_array_equal(separator(g.inputs[0][0]), separator(g.inputs[0])[0])


def test_mixtures_of_a_batch_do_not_influence_each_other(golden):
    separator = load_separator(golden("tdanet_small").checkpoint)
    batch = separator.example_inputs(5000, batch=3)[0]
    together = separator(batch).numpy()
    apart = np.concatenate([separator(x[None]).numpy() for x in batch])
    assert output_snr_db(together, apart) >= 100


@pytest.mark.parametrize("samples", [1, 31, 32, 33, 999])
def test_output_is_as_long_as_the_input(golden, samples):
    separator = load_separator(golden("tdanet_small").checkpoint)
    assert separator(torch.randn(samples)).shape == (2, samples)


def test_lightning_checkpoint_loads(golden, tmp_path):
    g = golden("tdanet_small")
    state = {f"audio_model.{k}": v for k, v in g.state.items()}
    torch.save({"state_dict": state, "epoch": 3, "pytorch-lightning_version": "1.6"}, tmp_path / "last.ckpt")
    separator = load_separator(tmp_path / "last.ckpt", g.checkpoint.with_name("conf.yml"))
    assert output_snr_db(separator(g.inputs[0]).numpy(), g.output) >= 100


def test_bare_state_dict_loads_with_a_configuration(golden, tmp_path):
    g = golden("tdanetbest_small")
    torch.save(g.state, tmp_path / "weights.pth")
    separator = load_separator(tmp_path / "weights.pth", g.conf)
    assert output_snr_db(separator(g.inputs[0]).numpy(), g.output) >= 100


def test_parameters_of_the_published_size_are_the_papers():
    separator = tdanet.create(
        {
            "enc_kernel_size": 2,
            "num_sources": 2,
            "out_channels": 128,
            "in_channels": 512,
            "num_blocks": 16,
            "upsampling_depth": 5,
        },
        16000,
    )
    assert separator.parameters == 2_316_391


@pytest.mark.parametrize("levels", [1, 3])
def test_exported_pooling_is_adaptive_average_pooling(levels):
    for length in range(1, 70):
        pooled = length
        for _ in range(levels):
            pooled = (pooled + 1) // 2
        x = torch.randn(2, 3, 1, length, dtype=torch.float64)
        ours = uconv.Windows(length, pooled, levels, x)(x)
        torch.testing.assert_close(ours, F.adaptive_avg_pool2d(x, (1, pooled)))


def test_unrolled_iterations_share_weights_and_compute_the_same(golden):
    separator = load_separator(golden("tdanet_small").checkpoint)
    copy = unrolled(separator.module)
    assert {id(p) for p in copy.parameters()} == {id(p) for p in separator.module.parameters()}
    x = separator.example_inputs(4001)
    torch.testing.assert_close(copy(*x), separator.module(*x))


def test_a_trained_module_survives_the_authors_format(tmp_path):
    config = {**SIZES, "out_channels": 8, "in_channels": 16, "num_blocks": 2, "upsampling_depth": 3}
    new = tdanet.create(config, 8000)
    conf = {
        "audionet": {"audionet_name": "TDANet", "audionet_config": new.config},
        "datamodule": {"data_config": {"sample_rate": 8000}},
    }
    content = {"model_name": "TDANet", "state_dict": tdanet.to_authors(new.module), "conf": conf}
    torch.save(content, tmp_path / "own.pth")
    again = load_separator(tmp_path / "own.pth")
    x = torch.randn(1, 3000)
    torch.testing.assert_close(again(x), new(x))


def test_exported_nearest_resampling_takes_torchs_frames():
    for length in range(1, 400):
        shorter = length
        for _ in range(5):
            shorter = (shorter + 1) // 2
            for a, b in ((shorter, length), (length, shorter)):
                expected = F.interpolate(torch.arange(a, dtype=torch.float32)[None, None], size=b, mode="nearest")
                assert torch.equal(uconv.nearest_index(a, b, expected), expected[0, 0].long())
