"""Shared fixtures: small checkpoints with known outputs, a tiny mixture set, and one bundle made from them."""

import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

if "PYTEST_XDIST_WORKER" in os.environ:  # torch's threads wait for each other where the workers fill all cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"


def _make_checkpoint():
    spec = importlib.util.spec_from_file_location("make_checkpoint", GOLDEN / "make_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """One cache for all workers: what one has exported or compiled, the others need not."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"


@pytest.fixture(autouse=True, scope="session")
def _short_and_apart(cache):
    """No test reads or writes the user's cache; builds are timed for a moment: no test looks at their speed."""
    from edgesep import results

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGESEP_CACHE", str(cache))
        patch.setattr(results, "SECONDS", 0.2)
        yield


@pytest.fixture(scope="session")
def golden(tmp_path_factory):
    """name → checkpoint file (conf.yml beside it), state dict, input and the authors' output."""
    import torch
    import yaml

    maker = _make_checkpoint()
    made = {}

    def get(name: str) -> SimpleNamespace:
        if name not in made:
            spec = json.loads((GOLDEN / f"{name}.json").read_text())
            folder = tmp_path_factory.mktemp(name)
            state = {k: torch.from_numpy(v) for k, v in maker.state_dict(spec).items()}
            content = {"model_name": spec["model_name"], "state_dict": state, "model_args": {"n_src": 2}}
            torch.save(content, folder / "best_model.pth")
            (folder / "conf.yml").write_text(yaml.safe_dump(spec["conf"]))
            made[name] = SimpleNamespace(
                checkpoint=folder / "best_model.pth",
                state=state,
                conf=spec["conf"],
                inputs=maker.golden_input(spec),
                output=np.load(GOLDEN / f"{name}.npz")["output"],
            )
        return made[name]

    return get


def shallow(golden: SimpleNamespace, folder: Path, layers: int = 1, **config) -> Path:
    """The checkpoint with fewer blocks or iterations, which exports in half the time; ``config`` goes into conf.yml."""
    import torch
    import yaml

    content = torch.load(golden.checkpoint, weights_only=True)
    content["state_dict"] = {k: v for k, v in golden.state.items() if layers > 1 or not k.startswith("blocks.1.")}
    torch.save(content, folder / "best_model.pth")
    conf = json.loads(json.dumps(golden.conf))
    found = conf["audionet"]["audionet_config"]
    found |= {"num_blocks" if "num_blocks" in found else "n_layers": layers, **config}
    (folder / "conf.yml").write_text(yaml.safe_dump(conf))
    return folder / "best_model.pth"


@pytest.fixture(scope="session")
def brief(golden, tmp_path_factory) -> Path:
    """A checkpoint of TDANet with one iteration, for what is about everything but the separator."""
    return shallow(golden("tdanet_small"), tmp_path_factory.mktemp("brief"))


def write_set(root: Path, mixtures: int = 4, rate: int = 8000, seconds: float = 0.8) -> Path:
    """A mixture set of two buzzing "voices" in the LibriMix layout."""
    rng = np.random.default_rng(3)
    for d in ("mix_clean", "s1", "s2"):
        (root / d).mkdir(parents=True)
    t = np.arange(int(seconds * rate)) / rate
    for i in range(mixtures):
        sources = [
            0.1 * np.sign(np.sin(2 * np.pi * f * t)) * (1 + np.sin(2 * np.pi * 3 * t + i)) / 2
            + 0.01 * rng.standard_normal(t.size)
            for f in rng.uniform(90, 300, 2)
        ]
        for d, x in (("mix_clean", sum(sources)), ("s1", sources[0]), ("s2", sources[1])):
            soundfile.write(root / d / f"{i}.wav", x, rate, subtype="FLOAT")
    return root


@pytest.fixture(scope="session")
def mixtures(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("sets") / "tiny")


RECIPE = """
[separator]
checkpoint = "{checkpoint}"
[data]
calibration = "{mixtures}"
test = "{mixtures}"
golden = 2
[[passes]]
pass = "quantize"
method = "onnxruntime"
{targets}
[criteria]
max_si_snr_drop_db = 3.0
"""


def target(name: str, precision: str = "fp32", **more: str) -> str:
    """A target's section of a recipe."""
    lines = {"runtime": name, "precision": precision, **more}
    return "[[targets]]\n" + "".join(f'{key} = "{value}"\n' for key, value in lines.items())


TARGETS = target("onnxruntime") + target("onnxruntime", "int8") + target("openvino")


def write_recipe(folder: Path, checkpoint: Path, mixtures: Path, *targets: str) -> Path:
    file = folder / "recipe.toml"
    file.write_text(RECIPE.format(checkpoint=checkpoint, mixtures=mixtures, targets="".join(targets)))
    return file


@pytest.fixture(scope="session")
def recipe(golden, mixtures, tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), golden("tdanet_small").checkpoint, mixtures, TARGETS)


@pytest.fixture(scope="session")
def deployed(recipe, cache, tmp_path_factory):
    """The recipe, deployed once: (result, store)."""
    from edgesep.line import deploy
    from edgesep.store import Store

    store = Store(cache)
    return deploy(recipe, tmp_path_factory.mktemp("out") / "bundle", store=store), store


@pytest.fixture(scope="session")
def separator():
    """A TDANet with attention over time and random weights, small and yet wide enough to compress."""
    import torch

    from edgesep.separators import tdanet

    torch.manual_seed(1)
    config = {"out_channels": 16, "in_channels": 32, "num_blocks": 2, "upsampling_depth": 3}
    return tdanet.create({**config, "enc_kernel_size": 4, "num_sources": 2}, 8000)


@pytest.fixture
def context(separator, mixtures, tmp_path):
    """What passes are given beside it."""
    from edgesep.calibration import MixtureSet
    from edgesep.passes.base import Context

    mixture_set = MixtureSet.open(mixtures, 8000)
    return Context(separator, mixture_set, mixture_set, tmp_path)


@pytest.fixture(scope="session")
def exported(separator, tmp_path_factory) -> Path:
    """Its float export."""
    from edgesep import graph

    path = tmp_path_factory.mktemp("export") / "fp32.onnx"
    graph.export_onnx(separator, separator.module, path)
    return path
