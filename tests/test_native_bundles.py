"""Bundles of a separator with a scan: native kernels travel with it, and say so when they do not fit."""

import json

import numpy as np
import pytest
from conftest import shallow, target, write_recipe, write_set

import edgesep
from edgesep import InputError, UnsupportedError, kernels
from edgesep.export import export_checked
from edgesep.line import deploy
from edgesep.runtimes import runtime
from edgesep.store import Store


@pytest.fixture(scope="module")
def bundle(golden, cache, tmp_path_factory):
    g = golden("spmamba_small")
    rate = g.conf["datamodule"]["data_config"]["sample_rate"]
    mixtures = write_set(tmp_path_factory.mktemp("sets") / "tiny", rate=rate)
    targets = (
        target("onnxruntime"),
        target("onnxruntime", ops="native"),
        target("onnxruntime", "int8", ops="native"),
        target("openvino", ops="native"),
        target("openvino", "int8", ops="native"),
    )
    folder = tmp_path_factory.mktemp("recipe")
    recipe = write_recipe(folder, shallow(g, folder), mixtures, *targets)
    done = deploy(recipe, tmp_path_factory.mktemp("out") / "bundle", store=Store(cache))
    assert done.ok, done.rows
    return edgesep.open_bundle(done.path)


def test_every_form_of_the_scan_is_verified_and_named(bundle):
    rows = [r for r in bundle.manifest["results"] if r["runtime"] != "eager"]
    assert [r["ops"] for r in rows] == ["portable", "native", "native", "native", "native"]
    assert all(r["output_snr_db"] >= 90 for r in rows if r["precision"] == "fp32")
    assert "native" in (bundle.path / "report.md").read_text()


def test_the_kernels_travel_with_the_artifact(bundle):
    native = [a for a in bundle.artifacts if a.ops == "native"]
    for artifact in native:
        assert artifact.files[-1] == kernels.file_name(artifact.runtime)
        assert (artifact.folder / artifact.files[-1]).is_file()


def test_the_bundle_verifies_and_runs_without_a_build(bundle, monkeypatch):
    monkeypatch.setattr(kernels, "build", lambda *_, **__: pytest.fail("compiled on the device"))
    assert {r["status"] for r in bundle.verify()} == {"ok"}
    estimates = bundle.separate(0.1 * np.random.default_rng(0).standard_normal(bundle.sample_rate_hz))
    assert estimates.shape == (bundle.sources, bundle.sample_rate_hz)


def test_the_form_of_the_scan_can_be_asked_for(bundle):
    assert bundle.artifact("onnxruntime", "fp32").ops == "portable"  # the first one
    assert bundle.artifact("onnxruntime", ops="native").ops == "native"
    with pytest.raises(UnsupportedError, match="no artifact for openvino portable operators"):
        bundle.artifact("openvino", ops="portable")


def test_the_quantized_share_is_of_all_multiplications(bundle):
    forms = [p["report"] for p in bundle.manifest["passes"] if p["pass"] == "quantize"]
    assert [f["form"]["outputs"] for f in forms] == [True, False]  # ONNX Runtime's and OpenVINO's
    assert all(0.1 < f["quantized_macs_share"] < 1 for f in forms)


def test_a_separator_without_native_operators_refuses_them(golden, mixtures, cache, tmp_path):
    checkpoint = shallow(golden("tfacm_released_small"), tmp_path)
    recipe = write_recipe(tmp_path, checkpoint, mixtures, target("onnxruntime", ops="native"))
    with pytest.raises(InputError, match="TFACMCausal has no native operators for onnxruntime; leave ops"):
        deploy(recipe, tmp_path / "out", store=Store(cache))
    with pytest.raises(InputError, match="TFACMCausal has no native operators for onnxruntime; leave --native out"):
        export_checked(edgesep.load_separator(checkpoint), "onnxruntime", tmp_path / "out", native=True)
    assert not (tmp_path / "out").exists()


def test_tensorrt_rtx_refuses_plug_ins(tmp_path):
    module = runtime("tensorrt")
    if module.PACKAGE != "tensorrt-rtx":
        pytest.skip("this machine has TensorRT itself, which takes plug-ins")
    with pytest.raises(UnsupportedError, match='takes no native kernels; leave ops = "portable"'):
        module.build(tmp_path / "model.onnx", tmp_path, "fp32", {}, tmp_path / "library.so")


def test_the_manifest_holds_the_form(bundle):
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    assert {a["ops"] for a in manifest["artifacts"]} == {"portable", "native"}
