"""Products of a stream in fused form: the same function, and nothing taken in that is not what it looks like."""

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from onnx import TensorProto, helper
from test_fused import RUNTIMES

from edgesep import compact, kernels, window_fusion
from edgesep.onnx_edit import inferred_shapes
from edgesep.verify import output_snr_db

R = np.random.default_rng(0)
INDEX = np.array([[0, 1, 2], [5, 6, 7], [9, 12, 13], [2, 4, 17], [3, 3, 1]])  # rows of the padded map of 18 rows
INPUTS = {"x": (4, 3, 8), "other": (5, 40)}


def made(kind, inputs, out, **attributes):
    return helper.make_node(kind, inputs, [out], out, **attributes)


def model(nodes, out, inputs, **constants):
    """A graph of nodes; ``out`` and its shape."""
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in out.items()],
        [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def floats(*shape):
    return R.standard_normal(shape).astype(np.float32)


def windows(index=INDEX, more=(), **changed):
    constants = {
        "pads": np.array([1, 0, 0, 1, 0, 0]),
        "rows": np.array([-1, 8]),
        "index": index.ravel(),
        "wide": np.array([-1, 24]),
        "weight": floats(40, 24),
        "bias": floats(40),
        "slope": floats(40),
    } | changed
    nodes = [
        made("Pad", ["x", "pads", *(["value"] if "value" in changed else [])], "padded"),
        made("Reshape", ["padded", "rows"], "flat"),
        made("Gather", ["flat", "index"], "gathered", axis=0),
        made("Reshape", ["gathered", "wide"], "windows"),
        made("Gemm", ["windows", "weight", "bias"], "product", transB=1),
        made("Mul", ["product", "slope"], "less"),
        made("Max", ["product", "less"], "bent"),
        made("Add", ["other", "bent"], "y"),
    ]
    return model(nodes, {"y": (5, 40)} | dict.fromkeys(more), INPUTS, **constants)


def fused(model):
    return window_fusion.fuse(model, inferred_shapes(model))


def kinds(model):
    return [n.op_type for n in model.graph.node]


@pytest.mark.parametrize("name", RUNTIMES)
def test_windows_of_a_padded_map_and_what_follows_are_one_operator(name, tmp_path):
    before = windows()
    after = fused(before)
    assert kinds(after) == ["WindowProduct"]
    feeds = {n: floats(*s) for n, s in INPUTS.items()}
    wanted = onnxruntime.InferenceSession(before.SerializeToString()).run(None, feeds)[0]
    assert output_snr_db(RUNTIMES[name](after, feeds, tmp_path)[0], wanted) >= 110


@pytest.mark.parametrize("unfold", [True, False])
def test_windows_that_overlap_meet_a_matrix_for_the_fast_algorithm(unfold, tmp_path):
    index = np.arange(5)[:, None] + np.arange(8)
    before = windows(index, weight=floats(40, 64), wide=np.array([-1, 64]))
    after = window_fusion.fuse(before, inferred_shapes(before), unfold=unfold)
    weight = next(c for c in after.graph.initializer if c.name == after.graph.node[0].input[1])
    assert list(weight.dims) == ([2, 27, 8, 32] if unfold else [1, 8, 8, 64])
    feeds = {n: floats(*s) for n, s in INPUTS.items()}
    wanted = onnxruntime.InferenceSession(before.SerializeToString()).run(None, feeds)[0]
    assert output_snr_db(RUNTIMES["onnxruntime"](after, feeds, tmp_path)[0], wanted) >= 110


def test_windows_that_hardly_overlap_do_not():
    index = 2 * np.arange(5)[:, None] + np.arange(4)
    after = fused(windows(index, weight=floats(40, 32), wide=np.array([-1, 32])))
    weight = next(c for c in after.graph.initializer if c.name == after.graph.node[0].input[1])
    assert list(weight.dims) == [1, 4, 8, 64]


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_convolution_that_is_taken_as_rows_is_a_product_of_windows(name, tmp_path):
    shape = {"x": (1, 2, 6, 5)}
    nodes = [
        made("Conv", ["x", "weight", "bias"], "maps", pads=[0, 1, 1, 1], kernel_shape=[3, 3]),
        made("Transpose", ["maps"], "turned", perm=[0, 2, 3, 1]),
        made("Reshape", ["turned", "rows"], "y"),
    ]
    constants = {"weight": floats(40, 2, 3, 3), "bias": floats(40), "rows": np.array([25, 40])}
    before = model(nodes, {"y": (25, 40)}, shape, **constants)
    after, x = fused(before), {"x": floats(*shape["x"])}
    assert kinds(after) == ["WindowProduct"]
    wanted = onnxruntime.InferenceSession(before.SerializeToString()).run(None, x)[0]
    assert output_snr_db(RUNTIMES[name](after, x, tmp_path)[0], wanted) >= 110


def test_a_map_that_is_padded_with_something_is_gathered_from_as_it_is():
    after = fused(windows(value=np.float32(1)))
    assert kinds(after) == ["Pad", "Reshape", "WindowProduct"]


def test_channels_that_are_padded_are_not_taken_for_rows():
    wide = {"pads": np.array([0, 0, 1, 0, 0, 1]), "rows": np.array([-1, 10]), "wide": np.array([-1, 30])}
    after = fused(windows(index=np.minimum(INDEX, 11), weight=floats(40, 30), **wide))
    assert kinds(after) == ["Pad", "Reshape", "WindowProduct"]


def test_what_others_read_too_stays():
    after = fused(windows(more=["gathered"]))
    assert kinds(after) == ["Pad", "Reshape", "Gather", "Reshape", "WindowProduct"]  # slope and residual alone
    after = fused(windows(more=["product"]))
    assert kinds(after) == ["WindowProduct", "Mul", "Max", "Add"]
    after = fused(windows(more=["less"]))
    assert kinds(after) == ["WindowProduct", "Mul", "Max", "Add"]


def test_few_outputs_stay_a_gemm():
    small = {"weight": floats(20, 24), "bias": floats(20), "slope": floats(20)}
    before = windows(**small)
    for value in (before.graph.input[1], before.graph.output[0]):
        value.type.tensor_type.shape.dim[1].dim_value = 20
    assert "WindowProduct" not in kinds(fused(before))


def test_the_file_keeps_the_taps_and_the_runtime_adds_them_up_when_it_loads_it(tmp_path):
    index = np.arange(5)[:, None] + np.arange(8)
    before = windows(index, weight=floats(40, 64), wide=np.array([-1, 64]))
    after = fused(before)
    feeds = {n: floats(*s) for n, s in INPUTS.items()}
    wanted = RUNTIMES["onnxruntime"](after, feeds, tmp_path)[0]
    size = after.ByteSize()
    compact.compact(after)
    assert after.ByteSize() < size / 2.5
    assert output_snr_db(RUNTIMES["onnxruntime"](after, feeds, tmp_path)[0], wanted) >= 110
    assert output_snr_db(RUNTIMES["openvino"](after, feeds, tmp_path)[0], wanted) >= 110

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(kernels.library("onnxruntime")))
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(after.SerializeToString(), options)
    assert kinds(onnx.load(tmp_path / "loaded.onnx")) == ["WindowProduct"]
    core = openvino.Core()
    core.add_extension(str(kernels.library("openvino")))
    onnx.save(after, tmp_path / "model.onnx")
    loaded = core.compile_model(tmp_path / "model.onnx", "CPU").get_runtime_model().get_ops()
    assert not {"FullyConnected", "MatMul"} & {op.get_rt_info()["layerType"] for op in loaded}


def rounded(axis=1, zero=np.uint8, other_zero=0, more=()):
    """Windows of a padded map that meet a matrix in eight bits, as calibration leaves them."""
    r = np.random.default_rng(0)
    constants = {
        "pads": np.array([1, 0, 0, 1, 0, 0]),
        "rows": np.array([-1, 8]),
        "index": INDEX.ravel(),
        "wide": np.array([-1, 24]),
        "scale": np.float32(0.02),
        "zero": zero(120),
        "weight": r.integers(-127, 128, (24, 40)).astype(np.int8),
        "steps": (0.01 * r.random(40 if axis == 1 else 24) + 0.01).astype(np.float32),
        "none": np.full(40 if axis == 1 else 24, other_zero, np.int8),
        "bias": floats(40),
    }
    nodes = [
        made("Pad", ["x", "pads"], "padded"),
        made("Reshape", ["padded", "rows"], "flat"),
        made("Gather", ["flat", "index"], "gathered", axis=0),
        made("Reshape", ["gathered", "wide"], "windows"),
        made("QuantizeLinear", ["windows", "scale", "zero"], "integers"),
        made("DequantizeLinear", ["integers", "scale", "zero"], "back"),
        made("DequantizeLinear", ["weight", "steps", "none"], "matrix", axis=axis),
        made("MatMul", ["back", "matrix"], "product"),
        made("Add", ["product", "bias"], "sum"),
        made("Add", ["other", "sum"], "y"),
    ]
    return model(nodes, {"y": (5, 40)} | dict.fromkeys(more), INPUTS, **constants)


@pytest.mark.parametrize("name", RUNTIMES)
def test_windows_of_a_product_in_eight_bits_are_one_operator(name, tmp_path):
    before = rounded()
    after = fused(before)
    assert kinds(after) == ["WindowProduct"]
    feeds = {n: floats(*s) for n, s in INPUTS.items()}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    wanted = onnxruntime.InferenceSession(before.SerializeToString(), options).run(None, feeds)[0]
    assert output_snr_db(RUNTIMES[name](after, feeds, tmp_path)[0], wanted) >= 100


@pytest.mark.parametrize(
    "given",
    [{"axis": 0}, {"zero": np.int8}, {"other_zero": 1}, {"more": ["product"]}],
    ids=["a step of each input", "signed inputs", "a zero point of the matrix", "others read it"],
)
def test_products_in_eight_bits_of_another_kind_stay(given):
    before = rounded(**given)
    assert kinds(fused(before)) == kinds(before)
