"""What OpenVINO's form says otherwise computes the same."""

import numpy as np
import onnx
import openvino
import pytest
from test_window_fusion import floats, kinds, made, model

from edgesep.openvino_form import for_openvino

WIDTH = 32


def rounded_norm(shape=(12, WIDTH), more=(), channels=False, twice=False):
    """Rows that are normalized, rounded to eight bits and multiplied in INT8."""
    constants = {
        "gain": np.ones(WIDTH, np.float32),
        "scale": np.full(WIDTH, 0.03, np.float32) if channels else np.float32(0.03),
        "zero": np.full(WIDTH, 128, np.uint8) if channels else np.uint8(128),
        "weight": np.random.default_rng(0).integers(-127, 128, (WIDTH, 16)).astype(np.int8),
        "step": np.float32(0.01),
        "none": np.int8(0),
    }
    nodes = [
        made("LayerNormalization", ["x", "gain"], "normed", axis=-1),
        made("QuantizeLinear", ["normed", "scale", "zero"], "rounded"),
        made("DequantizeLinear", ["rounded", "scale", "zero"], "rows"),
        made("DequantizeLinear", ["weight", "step", "none"], "matrix"),
        made("MatMul", ["rows", "matrix"], "y"),
    ]
    outputs = {"y": (*shape[:-1], 16)} | dict.fromkeys(more)
    if twice:  # another norm of the same rows
        nodes += [
            made("LayerNormalization", ["x", "gain"], "again", axis=-1, epsilon=0.1),
            made("QuantizeLinear", ["again", "scale", "zero"], "integers"),
            made("DequantizeLinear", ["integers", "scale", "zero"], "z"),
        ]
        outputs["z"] = shape
    return model(nodes, outputs, {"x": shape}, **constants)


def test_two_norms_of_the_same_rows_stay_apart():
    after = onnx.load_from_string(for_openvino(rounded_norm(twice=True).SerializeToString()))
    onnx.checker.check_model(after, full_check=True)
    assert kinds(after).count("Reshape") == 4


def compiled(serialized):
    core = openvino.Core()
    return core.compile_model(core.read_model(serialized, b""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def test_a_norm_of_rows_rounds_what_it_makes():
    before = rounded_norm()
    after = for_openvino(before.SerializeToString())
    runs = [compiled(m) for m in (before.SerializeToString(), after)]
    layers = [[op.get_rt_info()["layerType"].astype(str) for op in r.get_runtime_model().get_ops()] for r in runs]
    assert ["FakeQuantize" in of for of in layers] == [True, False]
    x = floats(12, WIDTH)
    np.testing.assert_allclose(*(r({"x": x})["y"] for r in runs), atol=0.03 * 0.01 * 127 * 2)  # a step or two


@pytest.mark.parametrize(
    "given",
    [{"shape": (3, 4, WIDTH)}, {"more": ["normed"]}, {"channels": True}],
    ids=["three axes", "read", "channels"],
)
def test_a_norm_of_other_shapes_that_others_read_or_that_is_rounded_by_channel_stays(given):
    before = rounded_norm(**given)
    after = onnx.load_from_string(for_openvino(before.SerializeToString()))
    assert sorted(kinds(after)) == sorted(kinds(before))
