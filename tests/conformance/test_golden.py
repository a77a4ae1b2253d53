"""Every fixture in ``tests/golden``: the authors' own outputs from checkpoints in the authors' format."""

from pathlib import Path

import numpy as np
import pytest
import torch

from edgesep import load_separator
from edgesep.verify import output_snr_db

NAMES = sorted(f.stem for f in (Path(__file__).parent.parent / "golden").glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_output_equals_the_authors_forward(golden, name):
    g = golden(name)
    assert output_snr_db(load_separator(g.checkpoint)(*g.inputs).numpy(), g.output) >= 100


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_of_the_checkpoint_is_counted(golden, name):
    g = golden(name)
    learned = [v.numel() for k, v in g.state.items() if "running_" not in k and "num_batches" not in k]
    assert load_separator(g.checkpoint).parameters == sum(learned)


@pytest.mark.parametrize("name", NAMES)
def test_mixtures_of_a_batch_do_not_influence_each_other(golden, name):
    separator = load_separator(golden(name).checkpoint)
    batch = separator.example_inputs(max(6, separator.sample_rate_hz // 3), batch=2)
    together = separator(*batch).numpy()
    apart = np.concatenate([separator(*(x[i : i + 1] for x in batch)).numpy() for i in range(2)])
    assert output_snr_db(together, apart) >= 100


@pytest.mark.parametrize("name", NAMES)
def test_a_separator_that_calls_itself_causal_is(golden, name):
    """Changing the input from t on changes no output before t minus the stated latency."""
    g = golden(name)
    net = g.conf.get("audionet", {})
    if net.get("audionet_name") != "TFACMCausal":
        assert not load_separator(g.checkpoint).causal
        return
    net = {**net, "audionet_config": {**net["audionet_config"], "variant": "causal"}}
    separator = load_separator(g.checkpoint, {**g.conf, "audionet": net})
    assert separator.causal
    latency = round(separator.algorithmic_latency_ms * separator.sample_rate_hz / 1000)
    x = separator.example_inputs(9000)[0]
    before = separator(x)
    for t in (1501, 5003, 8009):
        changed = torch.cat([x[:, :t], x[:, t:].flip(1)], 1)
        moved = (separator(changed) != before).any(1)[0].nonzero()
        assert t - latency <= int(moved[0]) <= t


def test_the_released_tfacm_says_that_it_is_not_causal(golden):
    separator = load_separator(golden("tfacm_released_small").checkpoint)
    assert not separator.causal
    assert "not causal" in separator.note
