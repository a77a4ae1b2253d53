"""Constants in a file: smaller, and the same once loaded."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.testing import assert_allclose
from onnx import TensorProto, helper, numpy_helper

from edgesep import compact, runtimes
from edgesep.ops import lstm_steps
from edgesep.separators.spectral import CausalStft, Stft
from edgesep.separators.tfacm_stream import HopStft
from edgesep.verify import output_snr_db


def model_of(
    nodes: Sequence[onnx.NodeProto], constants: dict[str, np.ndarray], shape: list[int | str]
) -> onnx.ModelProto:
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, s)
        for name, s in (("x", shape), ("y", [None] * len(shape)))
    ]
    weights = [numpy_helper.from_array(v, k) for k, v in constants.items()]
    graph = helper.make_graph(list(nodes), "one", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def bytes_of(model: onnx.ModelProto) -> int:
    return sum(numpy_helper.to_array(c).nbytes for c in model.graph.initializer)


@pytest.mark.parametrize("stft", [Stft(256, 64), Stft(250, 50), CausalStft(128, 16, 128), CausalStft(128, 16, 32)])
def test_fourier_kernels_are_written_as_a_window_and_a_table_of_one_cosine(stft: Stft | CausalStft) -> None:
    for kind, kernel in (("Conv", stft.forward_kernel), ("ConvTranspose", stft.inverse_kernel)):
        given = kernel.numpy()
        x = np.random.default_rng(0).standard_normal((1, 1 if kind == "Conv" else len(given), 300), np.float32)
        model = model_of(
            [helper.make_node(kind, ["x", "w"], ["y"], strides=[16])], {"w": given}, ["b", x.shape[1], "t"]
        )
        wanted, before = run(model, x), bytes_of(model)
        compact.tabulate_stft(model)
        assert bytes_of(model) < 0.15 * before
        assert output_snr_db(run(model, x), wanted) > 125


@pytest.mark.parametrize("kernel", ["forward_kernel", "inverse_kernel"])
def test_fourier_kernels_of_a_hop_are_a_table_too(kernel: str) -> None:
    given = getattr(HopStft(CausalStft(64, 20, 40), 1), kernel).numpy()
    x = np.random.default_rng(0).standard_normal((3, len(given)), np.float32)
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": given}, ["b", len(given)])
    wanted, before = run(model, x), bytes_of(model)
    compact.round_weights(model)
    compact.tabulate_stft(model)
    assert bytes_of(model) < 0.15 * before
    assert output_snr_db(run(model, x), wanted) > 125


def test_recurrent_weights_of_steps_are_rounded_and_stored_in_eight_bits() -> None:
    r = np.random.default_rng(0)
    weight = lstm_steps.grouped(r.standard_normal((24, 96)).astype(np.float32))
    state = np.zeros((1, 5, 24), np.float32)
    node = helper.make_node("LstmSteps", ["x", "w", "h", "h"], ["y"], domain="edgesep")
    model = model_of([node], {"w": weight, "h": state}, [7, 5, 96])
    compact.round_weights(model)
    (rounded,) = (numpy_helper.to_array(c) for c in model.graph.initializer if c.name == "w")
    assert 30 < output_snr_db(rounded, weight) < 60
    compact.compact(model, narrow=True)
    assert bytes_of(model) < 0.4 * weight.nbytes


def test_other_kernels_of_that_shape_are_left_alone() -> None:
    kernel = CausalStft(128, 16, 128).forward_kernel.numpy().copy()
    kernel[3, 0, 5] += 1e-3
    model = model_of([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": kernel}, ["b", 1, "t"])
    before = model.SerializeToString()
    compact.tabulate_stft(model)
    assert model.SerializeToString() == before


def test_floats_are_stored_in_half_unless_they_lose_by_it_or_are_scales() -> None:
    made = np.random.default_rng(0)
    weight = made.standard_normal((32, 300), np.float32)
    constants = {
        "weight": weight,
        "wide": (weight[:1] * 1e-9).astype(np.float32),  # below what float16 knows
        "few": weight[0, :100],
        "integers": made.integers(-127, 127, (300, 300), np.int8),
        "scales": made.random(300, np.float32),
        "zeros": np.zeros(300, np.int8),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["a"]),
        helper.make_node("DequantizeLinear", ["integers", "scales", "zeros"], ["w"], axis=1),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("Add", ["b", "wide"], ["c"]),
        helper.make_node("Slice", ["c", "from", "to", "last"], ["d"]),
        helper.make_node("Mul", ["d", "few"], ["y"]),
    ]
    slices = {"from": np.array([0]), "to": np.array([100]), "last": np.array([1])}
    model = model_of(nodes, constants | slices, ["rows", 32])
    x = made.standard_normal((5, 32), np.float32)
    wanted = run(model, x)
    compact.compact(model, narrow=True)
    kinds = [c.data_type for c in model.graph.initializer]
    assert kinds.count(TensorProto.FLOAT16) == 1
    assert kinds.count(TensorProto.FLOAT) == 3
    assert_allclose(run(model, x), wanted, rtol=0, atol=2e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_rounded_weights_are_stored_in_eight_bits_and_unfolded_at_load(runtime: str, tmp_path: Path) -> None:
    made = np.random.default_rng(0)
    constants = {
        "kept": made.standard_normal((16, 16, 3), np.float32),
        "conv": made.standard_normal((64, 16, 5), np.float32),
        "few": made.standard_normal((64, 1, 5), np.float32),  # depthwise: a scale for five values
        "matrix": made.standard_normal((64, 48), np.float32) / 100,
        "gates": made.standard_normal((1, 64, 48), np.float32) / 100,
        "again": made.standard_normal((1, 64, 16), np.float32) / 100,
        "up": made.standard_normal((16, 1, 40), np.float32),
        "stft": Stft(256, 64).forward_kernel.numpy(),
        "first": np.array([1]),
    }
    nodes = [
        helper.make_node("Conv", ["x", "kept"], ["k"], "front/Conv"),
        helper.make_node("Conv", ["k", "conv"], ["a"], "conv/Conv"),
        helper.make_node("Conv", ["a", "few"], ["b"], "few/Conv", group=64),
        helper.make_node("Transpose", ["b"], ["steps"], perm=[2, 0, 1]),
        helper.make_node("MatMul", ["steps", "matrix"], ["m"]),
        helper.make_node("LSTM", ["m", "gates", "again"], ["l"], hidden_size=16),
        helper.make_node("Squeeze", ["l", "first"], ["s"]),
        helper.make_node("Transpose", ["s"], ["t"], perm=[1, 2, 0]),
        helper.make_node("ConvTranspose", ["t", "up"], ["c"], strides=[20]),
        helper.make_node("Conv", ["c", "stft"], ["y"], strides=[64]),
    ]
    model = model_of(nodes, constants, [1, 16, 100])
    x = made.standard_normal((1, 16, 100), np.float32)
    plain = run(model, x)
    compact.round_weights(model, lambda node: node.name == "front/Conv")
    changed = {c.name for c in model.graph.initializer if (numpy_helper.to_array(c) != constants[c.name]).any()}
    assert changed == {"conv", "matrix", "gates", "again", "up"}
    wanted = run(model, x)
    assert 30 < output_snr_db(wanted, plain) < 60
    onnx.save(model, tmp_path / "model.onnx")
    module = runtimes.runtime(runtime)
    files = module.build(tmp_path / "model.onnx", tmp_path, "int8", {})
    stored = [c for c in onnx.load(tmp_path / files[0]).graph.initializer if c.data_type == TensorProto.INT8]
    sizes = {numpy_helper.to_array(c).size for c in stored}
    assert sizes >= {constants[name].size for name in changed}
    with module.Runner(tmp_path, files, "int8", 1) as runner:
        assert output_snr_db(runner.run({"x": x})["y"], wanted) > 60
    ran = module.executed(tmp_path, files, "int8", 1, {"x": x})
    folded = {"Cast", "Div", "Convert", "Divide", "Eltwise", "Multiply", "FullyConnectedCompressed"}
    assert not folded & {e.operator for e in ran}, "not unfolded at load"
    assert {e.precision for e in ran} == {"fp32"}


def test_what_counts_and_what_is_no_more_than_nearly_on_the_grid_is_not_narrowed() -> None:
    made = np.random.default_rng(0)
    rows = np.rint(127 * made.uniform(-1, 1, (64, 64))).astype(np.float32)
    rows[:, 0] = 127
    rows[32:] = 2e-5 * made.standard_normal((32, 64), np.float32)  # small beside those on the grid
    constants = {"rows": rows, "indices": np.arange(3000, 3064, dtype=np.float32).repeat(4)}
    nodes = [helper.make_node("MatMul", ["x", "rows"], ["a"]), helper.make_node("Tile", ["a", "times"], ["b"])]
    nodes.append(helper.make_node("Add", ["b", "indices"], ["y"]))
    model = model_of(nodes, constants | {"times": np.array([1, 4])}, ["n", 64])
    x = made.standard_normal((3, 64), np.float32)
    wanted = run(model, x)
    compact.compact(model, narrow=True)
    kinds = [c.data_type for c in model.graph.initializer]
    assert TensorProto.INT8 not in kinds
    assert kinds.count(TensorProto.FLOAT) == 1, "the indices, of which float16 has every other one"
    assert_allclose(run(model, x), wanted, rtol=0, atol=0.1)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_body_finds_the_constants_of_the_graph_around_it(runtime: str, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((16, 16), np.float32)
    inner = [helper.make_node("MatMul", ["row", "weight"], ["p"]), helper.make_node("Add", ["sum", "p"], ["total"])]
    inner.append(helper.make_node("Identity", ["total"], ["out"]))
    of = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 16]) for n in ("sum", "row", "total", "out")]
    body = helper.make_graph(inner, "body", of[:2], of[2:])
    nodes = [
        helper.make_node("Scan", ["start", "x"], ["last", "sums"], body=body, num_scan_inputs=1),
        helper.make_node("MatMul", ["sums", "weight"], ["y"]),
    ]
    model = model_of(nodes, {"weight": weight, "start": np.zeros((1, 16), np.float32)}, [5, 1, 16])
    x = np.random.default_rng(1).standard_normal((5, 1, 16), np.float32)
    wanted = run(model, x)
    onnx.save(model, tmp_path / "model.onnx")
    module = runtimes.runtime(runtime)
    files = module.build(tmp_path / "model.onnx", tmp_path, "int8", {})
    with module.Runner(tmp_path, files, "int8", 1) as runner:
        assert output_snr_db(runner.run({"x": x})["y"], wanted) > 60
