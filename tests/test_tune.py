"""Tuning: what is found is measured, kept in the bundle and handed to the runtime."""

from __future__ import annotations

import json
import shutil

import pytest

from edgesep import bench, open_bundle, tune
from edgesep.runtimes import runtime


@pytest.fixture
def bundle(deployed, tmp_path):
    """A copy of the deployed bundle with one artifact, so that few candidates are timed."""
    shutil.copytree(deployed[0].path, tmp_path / "bundle")
    opened = open_bundle(tmp_path / "bundle")
    opened.artifacts = tuple(a for a in opened.artifacts if a.runtime == "onnxruntime" and a.precision == "fp32")
    return opened


def timed(faster):
    """Medians as if ``faster(artifact)`` took half the time of others."""

    def row(artifact, *_):
        return {"p50_ms": 5.0 if faster(artifact) else 10.0}

    return row


def test_a_tuned_bundle_is_whole_and_says_what_was_tried(bundle, monkeypatch):
    monkeypatch.setattr(tune, "TURNS", 1)
    rows = tune.tune(bundle, 0.1)
    assert {"threads", "spin", "arena"} <= {name for t in rows[0]["tried"] for name in t}
    again = open_bundle(bundle.path)
    assert again.manifest["tuning"]["rows"] == json.loads(json.dumps(rows))
    assert again.artifacts[0].threads == rows[0]["threads"]
    assert again.artifacts[0].settings == rows[0]["settings"]
    assert [r["status"] for r in again.verify()] == ["ok"]


def test_what_is_faster_in_every_turn_is_kept_and_used(bundle, monkeypatch):
    monkeypatch.setattr(bench, "row", timed(lambda a: a.threads == 1 and not a.settings.get("arena", True)))
    monkeypatch.setattr(tune, "_thread_counts", lambda: [1])
    rows = tune.tune(bundle, 0.1)
    assert (rows[0]["threads"], rows[0]["settings"]) == (None, {}), "neither helps alone: one thing after another"
    monkeypatch.setattr(bench, "row", timed(lambda a: not a.settings.get("arena", True)))
    rows = tune.tune(bundle, 0.1)
    assert rows[0]["settings"] == {"arena": False}
    assert rows[0]["times_faster"] == 2.0
    monkeypatch.undo()
    kept = open_bundle(bundle.path)
    with kept.runner("onnxruntime", precision="fp32") as runner:
        assert not runner._session.get_session_options().enable_cpu_mem_arena
    assert kept.bench(0.1)[0]["settings"] == {"arena": False}


def test_chance_changes_nothing(bundle, monkeypatch):
    turns = iter(range(10**6))
    monkeypatch.setattr(bench, "row", lambda *_: {"p50_ms": 10 + next(turns) * 7 % 5})
    rows = tune.tune(bundle, 0.1)
    assert (rows[0]["threads"], rows[0]["settings"], rows[0]["times_faster"]) == (None, {}, 1.0)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_every_setting_is_one_that_the_runtime_knows(deployed, name):
    opened = open_bundle(deployed[0].path)
    artifact = opened.artifact(name, "fp32")
    for setting, values in runtime(name).SETTINGS.items():
        for value in values:
            with tune._with(artifact, settings={setting: value}).runner(1):
                pass
