"""Norms over heads in fused form: the same function, and nothing taken in that is not what it looks like."""

import numpy as np
import onnxruntime
import pytest
from test_fused import RUNTIMES
from test_window_fusion import floats, kinds, made, model

from edgesep import head_fusion
from edgesep.onnx_edit import inferred_shapes
from edgesep.verify import output_snr_db

FRAMES, BINS = 3, 7
INPUTS = {"x": (FRAMES * BINS, 14)}


def heads(axis=-1, perm=(2, 0, 1, 3), more=(), **changed):
    """Two heads of four features from the channels behind the third one, behind a slope."""
    constants = {
        "slope": floats(14),
        "first": np.array([3]),
        "end": np.array([11]),
        "axes": np.array([1]),
        "step": np.array([1]),
        "apart": np.array([FRAMES, BINS, 2, 4]),
        "flat": np.array([1, 2, FRAMES, 4 * BINS]),
        "ones": 1 + floats(4 * BINS),
        "zeros": floats(4 * BINS),
        "gain": floats(1, 2, 1, 4 * BINS),
        "bias": floats(1, 2, 1, 4 * BINS),
    } | changed
    nodes = [
        made("Mul", ["x", "slope"], "less"),
        made("Max", ["x", "less"], "bent"),
        made("Slice", ["bent", "first", "end", "axes", "step"], "taken"),
        made("Reshape", ["taken", "apart"], "heads"),
        made("Transpose", ["heads"], "moved", perm=list(perm)),
        made("Reshape", ["moved", "flat"], "rows"),
        made("LayerNormalization", ["rows", "ones", "zeros"], "normed", axis=axis, epsilon=1e-3),
        made("Mul", ["normed", "gain"], "scaled"),
        made("Add", ["scaled", "bias"], "y"),
    ]
    return model(nodes, dict.fromkeys(["y", *more]), INPUTS, **constants)


def fused(before):
    return head_fusion.fuse(before, inferred_shapes(before))


def one_head(slope=True):
    """All channels of a frame behind a slope."""
    constants = {"slope": floats(14), "flat": np.array([1, 1, FRAMES, 14 * BINS]), "gain": floats(14 * BINS)}
    bent = [made("Mul", ["x", "slope"], "less"), made("Max", ["x", "less"], "bent")] if slope else []
    nodes = [
        *bent,
        made("Reshape", ["bent" if slope else "x", "flat"], "rows"),
        made("LayerNormalization", ["rows", "gain"], "y", axis=-1),
    ]
    return model(nodes, {"y": (1, 1, FRAMES, 14 * BINS)}, INPUTS, **constants)


@pytest.mark.parametrize("before", [heads(), heads(gain=np.float32(3), bias=floats(4 * BINS)), one_head()])
@pytest.mark.parametrize("name", RUNTIMES)
def test_heads_behind_a_slope_are_one_operator(name, before, tmp_path):
    after, x = fused(before), {"x": 1 + floats(*INPUTS["x"])}
    assert kinds(after) == ["HeadNorm"]
    wanted = onnxruntime.InferenceSession(before.SerializeToString()).run(None, x)[0]
    assert output_snr_db(RUNTIMES[name](after, x, tmp_path)[0], wanted) >= 110


def test_what_others_read_too_stays():
    assert kinds(fused(heads(more=["bent"]))) == ["Mul", "Max", "HeadNorm"]
    assert kinds(fused(heads(more=["scaled"]))) == ["HeadNorm", "Add"]
    assert kinds(fused(heads(more=["normed"]))) == ["HeadNorm", "Mul", "Add"]


def test_a_gain_of_each_frame_stays():
    after = fused(heads(gain=floats(1, 1, FRAMES, 1)))
    assert kinds(after) == ["HeadNorm", "Mul", "Add"]


FROM_BEHIND = {"first": np.array([-11]), "end": np.array([-3])}
ROWS = {"end": np.array([19]), "axes": np.array([0]), "apart": np.array([4, 4, 2, 7]), "flat": np.array([1, 2, 4, 28])}


@pytest.mark.parametrize("given", [FROM_BEHIND, ROWS], ids=["counted from behind", "rows"])
def test_a_slice_that_is_not_of_channels_from_one_on_stays(given, tmp_path):
    before = heads(**given)
    after, x = fused(before), {"x": floats(*INPUTS["x"])}
    assert kinds(after) == ["Mul", "Max", "Slice", "HeadNorm"]
    wanted = onnxruntime.InferenceSession(before.SerializeToString()).run(None, x)[0]
    assert output_snr_db(RUNTIMES["onnxruntime"](after, x, tmp_path)[0], wanted) >= 110


@pytest.mark.parametrize(
    "before",
    [
        heads(axis=2, ones=floats(FRAMES, 4 * BINS), zeros=floats(FRAMES, 4 * BINS)),
        heads(perm=(2, 1, 0, 3), flat=np.array([1, 2, FRAMES, 4 * BINS])),
        heads(apart=np.array([BINS, FRAMES, 2, 4])),
        one_head(slope=False),
    ],
    ids=["another axis", "another order", "frames for bins", "a plain norm"],
)
def test_what_is_no_norm_of_heads_stays(before):
    assert kinds(fused(before)) == kinds(before)
