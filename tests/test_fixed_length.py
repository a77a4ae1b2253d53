"""Builds that are compiled for the length of a query: the same function at every length."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import target, write_recipe

from edgesep import open_bundle
from edgesep.line import deploy
from edgesep.runtimes import runtime
from edgesep.spec import InputError
from edgesep.store import Store


def test_every_length_gives_what_the_dynamic_build_gives(separator, exported, tmp_path):
    module = runtime("openvino")
    files = module.build(exported, tmp_path, "fp32", separator.profile())
    rng = np.random.default_rng(0)
    with (
        module.Runner(tmp_path, files, "fp32", 1) as dynamic,
        module.Runner(tmp_path, files, "fp32", 1, {"fixed_length": True}) as fixed,
    ):
        requests = []
        for shape in ((1, 8000), (1, 8000), (1, 4001), (2, 4001)):
            feeds = {"mixture": rng.standard_normal(shape).astype(np.float32)}
            expected, found = dynamic.run(feeds)["estimates"], fixed.run(feeds)["estimates"]
            np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
            requests.append(fixed._request)
        assert requests[0] is requests[1], "compiled once for each shape"
        assert requests[1] is not requests[2]
        with pytest.raises(InputError, match="input mixture must be"):
            fixed.run({"mixture": np.zeros((8000,), np.float32)})
        assert fixed.run(feeds)["estimates"].shape == expected.shape, "a refused query spoils nothing"


def test_a_bundle_holds_both_and_tells_them_apart(brief, mixtures, cache, tmp_path):
    targets = target("openvino") + target("openvino", fixed_length="true")
    recipe = write_recipe(tmp_path, brief, mixtures, targets)
    done = deploy(recipe, tmp_path / "bundle", store=Store(cache))
    assert done.ok
    assert [r.get("length") for r in done.rows] == [None, None, "fixed"]
    bundle = open_bundle(done.path)
    assert [a.name for a in bundle.artifacts] == ["openvino fp32", "openvino fp32, fixed length"]
    assert [r["status"] for r in bundle.verify()] == ["ok", "ok"]
    assert "| fixed |" in (done.path / "report.md").read_text()


def test_a_runtime_that_gains_nothing_refuses(brief, mixtures, tmp_path):
    recipe = write_recipe(tmp_path, brief, mixtures, target("onnxruntime", fixed_length="true"))
    with pytest.raises(InputError, match="onnxruntime gains nothing from a fixed_length"):
        deploy(recipe, tmp_path / "bundle")
