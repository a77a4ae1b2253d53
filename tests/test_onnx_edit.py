"""Edits of ONNX graphs leave the numbers as they are."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from numpy.testing import assert_allclose, assert_array_equal
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgesep import onnx_edit, onnxruntime_form


def model_of(axis: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Gather", ["x", "index"], ["y"], "pick", axis=axis)],
        "pick",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6, 1, "frames"]),
            helper.make_tensor_value_info("index", TensorProto.INT64, ["taken"]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto, x: np.ndarray, index: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x, "index": index})
    return y


def test_gathering_rows_gives_the_values_that_gathering_along_the_last_axis_gave() -> None:
    rng = np.random.default_rng(0)
    x, index = rng.standard_normal((2, 6, 1, 5), np.float32), np.array([4, 0, 0, 1, -1, 3, 2])
    for axis in (-1, 3):
        model = onnx.load_from_string(onnxruntime_form.for_onnxruntime(model_of(axis).SerializeToString()))
        onnx.checker.check_model(model)
        assert [n.op_type for n in model.graph.node] == ["Transpose", "Gather", "Transpose"]
        assert_array_equal(run(model, x, index), x[..., index])


def test_gathering_along_another_axis_stays_as_it_is() -> None:
    model = onnx.load_from_string(onnxruntime_form.for_onnxruntime(model_of(1).SerializeToString()))
    assert [n.op_type for n in model.graph.node] == ["Gather"]


def test_names_get_short_and_numbers_stay_in_bodies_of_loops_too() -> None:
    body = helper.make_graph(
        [
            helper.make_node("Add", ["carried_value", "outer_constant"], ["next_value"], "a_long_name"),
            helper.make_node("Identity", ["condition"], ["next_condition"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("iteration", TensorProto.INT64, []),
            helper.make_tensor_value_info("condition", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried_value", TensorProto.FLOAT, ["n"]),
        ],
        [
            helper.make_tensor_value_info("next_condition", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next_value", TensorProto.FLOAT, ["n"]),
        ],
    )
    constants = [
        onnx.numpy_helper.from_array(np.float32([0.5]), "outer_constant"),
        onnx.numpy_helper.from_array(np.int64(3), "trips"),
        onnx.numpy_helper.from_array(np.bool_(True), "go_on"),
    ]
    graph = helper.make_graph(
        [helper.make_node("Loop", ["trips", "go_on", "a"], ["estimates"], body=body)],
        "loop",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("estimates", TensorProto.FLOAT, ["n"])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    before = model.ByteSize()
    onnx_edit.shorten_names(model)
    onnx.checker.check_model(model)
    assert model.ByteSize() < 0.8 * before
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(["estimates"], {"a": np.float32([1, 2])})
    assert_array_equal(y, np.float32([2.5, 3.5]))


def test_a_prelu_of_one_slope_is_a_leaky_relu_and_one_of_many_stays() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 4), np.float32)
    for slope, kind in ((np.float32([[0.3]]), "LeakyRelu"), (np.float32([[0.1], [0.2], [0.3]]), "PRelu")):
        graph = helper.make_graph(
            [helper.make_node("PRelu", ["x", "slope"], ["y"])],
            "prelu",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3, 4])],
            [onnx.numpy_helper.from_array(slope, "slope")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx_edit.leaky(model)
        onnx.checker.check_model(model)
        assert [n.op_type for n in model.graph.node] == [kind]
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {"x": x})
        assert_array_equal(y, np.where(x > 0, x, slope * x))


def norm_of(power: float, axis: int) -> onnx.ModelProto:
    """``x · 1 / sqrt(mean(x^power) + 0.01) · gain``, as torch exports an RMS norm."""
    constants = {"power": np.float32(power), "axes": np.array([axis]), "eps": np.float32(0.01)}
    constants["gain"] = np.linspace(0.5, 2, 6, dtype=np.float32)
    steps = [("Pow", "x power", "p"), ("ReduceMean", "p axes", "m"), ("Add", "m eps", "a"), ("Sqrt", "a", "s")]
    steps += [("Reciprocal", "s", "r"), ("Mul", "x r", "n"), ("Mul", "n gain", "y")]
    graph = helper.make_graph(
        [helper.make_node(kind, given.split(), [made]) for kind, given, made in steps],
        "norm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 5, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 3)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_an_rms_norm_becomes_one_node_for_onnx_runtime() -> None:
    x = np.random.default_rng(0).standard_normal((3, 5, 6), np.float32)
    for given, kinds in (
        (norm_of(2.0, -1), ["SimplifiedLayerNormalization"]),
        (norm_of(4.0, -1), None),
        (norm_of(2.0, 1), None),
    ):
        made = onnx.load_from_string(onnxruntime_form.for_onnxruntime(given.SerializeToString()))
        assert [n.op_type for n in made.graph.node] == (kinds or [n.op_type for n in given.graph.node])
        (wanted,) = ReferenceEvaluator(given).run(None, {"x": x})
        session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
        assert_allclose(session.run(None, {"x": x})[0], wanted, rtol=1e-5, atol=1e-6)


def test_products_that_share_a_weight_get_their_own_and_share_it_again() -> None:
    weight = numpy_helper.from_array(np.eye(6, dtype=np.float32), "weight")
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "weight"], ["h"]), helper.make_node("Gemm", ["h", "weight"], ["y"])],
        "shared",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 6])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx_edit.unshare(model.graph, ("Gemm",))
    onnx.checker.check_model(model)
    assert len({n.input[1] for n in model.graph.node}) == 2
    onnx_edit.share_initializers(model)
    assert {n.input[1] for n in model.graph.node} == {"weight"}


def test_a_gemm_becomes_a_product_and_a_sum() -> None:
    made = np.random.default_rng(0)
    weight, bias, x = (made.standard_normal(s, np.float32) for s in ((4, 6), (4,), (3, 6)))
    for attributes, kinds in (
        ({"transB": 1, "alpha": 1.0}, ["MatMul", "Add"]),
        ({"transB": 1, "alpha": 0.5}, ["Gemm"]),
    ):
        graph = helper.make_graph(
            [helper.make_node("Gemm", ["x", "weight", "bias"], ["y"], "layer/Gemm_0", **attributes)],
            "one",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 6])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 4])],
            [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        (wanted,) = ReferenceEvaluator(model).run(None, {"x": x})
        onnx_edit.products_of_gemms(model)
        onnx.checker.check_model(model)
        assert [n.op_type for n in model.graph.node] == kinds
        assert model.graph.node[0].name == "layer/Gemm_0"
        assert_allclose(ReferenceEvaluator(model).run(None, {"x": x})[0], wanted, rtol=1e-5, atol=1e-6)


def test_a_dequantized_product_and_its_bias_are_one_integer_operator_of_onnx_runtime() -> None:
    made = np.random.default_rng(0)
    x, bias = made.standard_normal((3, 6), np.float32), made.standard_normal(4, np.float32)
    constants = {
        "x_scale": np.float32(0.03),
        "x_zero": np.uint8(120),
        "weight": made.integers(-127, 127, (6, 4), np.int8),
        "scale": made.random(4, np.float32),
        "zero": np.zeros(4, np.int8),
        "bias": bias,
    }
    quantized = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "x_scale", "x_zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], ["w"], axis=1),
    ]
    product = helper.make_node("MatMul", ["d", "w"], ["p"])
    summed = [product, helper.make_node("Add", ["bias", "p"], ["y"])]
    seen_too = [*summed, helper.make_node("Relu", ["p"], ["also"])]
    for rest, kinds in (
        (summed, ["QuantizeLinear", "MatMulIntegerToFloat"]),
        (seen_too, ["QuantizeLinear", "MatMulIntegerToFloat", "Add", "Relu"]),
    ):
        outputs = [n for n in ("y", "also") if any(n in r.output for r in rest)]
        graph = helper.make_graph(
            [*quantized, *rest],
            "one",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 6])],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", 4]) for n in outputs],
            [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        wanted = ReferenceEvaluator(model).run(None, {"x": x})
        changed = onnx.load_from_string(onnxruntime_form.for_onnxruntime(model.SerializeToString()))
        assert [n.op_type for n in changed.graph.node] == kinds
        session = onnxruntime.InferenceSession(changed.SerializeToString(), providers=["CPUExecutionProvider"])
        for a, b in zip(session.run(None, {"x": x}), wanted, strict=True):
            assert_allclose(a, b, rtol=1e-4, atol=1e-4)
