"""Recipes are validated in words; finished steps are found again."""

import pytest
from conftest import target, write_recipe

from edgesep import InputError, passes, runtimes
from edgesep.line import Line
from edgesep.recipe import read_recipe
from edgesep.store import Store, replace_folder


def edited(recipe, tmp_path, old, new):
    file = tmp_path / "edited.toml"
    text = recipe.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return file


def test_paths_are_relative_to_the_recipe(tmp_path):
    text = '[separator]\ncheckpoint="a.pth"\n[data]\ncalibration="c"\ntest="/t"\n[[targets]]\nruntime="onnxruntime"\n'
    (tmp_path / "r.toml").write_text(text)
    read = read_recipe(tmp_path / "r.toml")
    assert read.separator.checkpoint == tmp_path / "a.pth"
    assert str(read.data.test) == "/t"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("golden = 2", "golden = 2\nseed = 3", "unknown key data.seed; known here: calibration, golden, test, train"),
        ("[criteria]", "[criterion]", "unknown key criterion"),
        ("golden = 2", "golden = 0", "data.golden"),
        ('precision = "int8"', 'precision = "int4"', "targets.1.precision"),
        ("max_si_snr_drop_db = 3.0", "max_rtf = -1.0", "criteria.max_rtf"),
        ("[data]", "[data", "not valid TOML"),
    ],
)
def test_a_wrong_recipe_is_refused(recipe, tmp_path, old, new, message):
    with pytest.raises(InputError, match=message):
        read_recipe(edited(recipe, tmp_path, old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('pass = "quantize"', 'pass = "quantise"', f"known are {', '.join(passes.names())}$"),
        ('method = "onnxruntime"', "bits = 4", "has no field 'bits'"),
        ('method = "onnxruntime"', 'method = "magic"', "is not known"),
        ('[[passes]]\npass = "quantize"\nmethod = "onnxruntime"\n', "", "no pass makes it"),
        ('runtime = "openvino"', 'runtime = "tvm"', f"known are {', '.join(runtimes.names())}$"),
    ],
)
def test_a_recipe_that_asks_for_what_is_not_there_is_refused(recipe, tmp_path, old, new, message):
    from edgesep import EdgesepError

    with pytest.raises(EdgesepError, match=message):
        Line(read_recipe(edited(recipe, tmp_path, old, new)), Store(tmp_path))


def test_finished_steps_are_not_redone(tmp_path):
    store, made = Store(tmp_path), []

    def make(folder):
        made.append(1)
        (folder / "x").write_text("done")

    first = store.step("s", {"a": 1}, make)
    assert store.step("s", {"a": 1}, make) == first
    assert store.step("s", {"a": 2}, make) != first
    assert len(made) == 2
    assert store.redone == ["s", "s"]


def test_an_interrupted_step_leaves_nothing_finished_and_continues(tmp_path):
    store = Store(tmp_path)

    def stopped(folder):
        (folder / "half").write_text("saved")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.step("s", {}, stopped)
    assert not store.folder("s", {}).exists()
    seen = []
    store.step("s", {}, lambda folder: seen.append((folder / "half").read_text()))
    assert seen == ["saved"]


def test_a_folder_is_replaced_whole(tmp_path):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert [p.name for p in tmp_path.rglob("*")] == ["old", "new"]


def test_a_pass_keeps_its_steps_apart_for_different_checkpoints(golden, mixtures, tmp_path):
    """Also where a field of the pass is named like a part of the key."""
    store = Store(tmp_path / "store")
    for name in ("tdanet_small", "tdanetbest_small"):
        (tmp_path / name).mkdir()
        file = write_recipe(tmp_path / name, golden(name).checkpoint, mixtures, target("onnxruntime"))
        file.write_text(
            file.read_text().replace("[[passes]]", '[[passes]]\npass = "prune"\nshare = 0.1\n[[passes]]', 1)
        )
        line = Line(read_recipe(file), store)
        separator, _, _ = line._torch_passes(line._loaded_key())
        assert separator.module(separator.example_inputs(3000)[0]).shape == (1, 2, 3000)
    assert store.redone == ["prune", "prune"]
