"""A few rows at a time: the same function in the bodies of Scans. And products whose parts are made apart."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgesep import graph, int8, kernels, onnx_edit, rows
from edgesep.ops import onnx_forms
from edgesep.runtimes import int8_form, runtime
from edgesep.separators import spmamba
from edgesep.verify import output_snr_db

RATE = 8000


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A small SPMamba's native graphs for ONNX Runtime, whole: float and INT8, by precision."""
    torch.manual_seed(2)
    config = {"n_srcs": 2, "n_fft": 64, "stride": 32, "n_layers": 1, "attn_n_head": 2, "attn_approx_qk_dim": 64}
    separator = spmamba.create({**config, "emb_dim": 8, "emb_ks": 4, "emb_hs": 1}, RATE)
    folder = tmp_path_factory.mktemp("rows")
    graph.export_onnx(separator, separator.module, folder / "float.onnx")
    model = onnx.load(folder / "float.onnx")
    layers = {graph.layer_of(n) for n in model.graph.node if n.op_type in int8.QUANTIZED}
    quantizer = int8.OnnxRuntimeQuantizer(separator, model, lambda: iter([mixture(2000, 0)]), folder)
    quantizer.write(folder / "int8.onnx", layers, int8_form("onnxruntime", native=True))
    return {"fp32": model, "int8": onnx.load(folder / "int8.onnx")}


def mixture(samples, seed, batch=1):
    noise = 0.1 * np.random.default_rng(seed).standard_normal((batch, samples))
    return {"mixture": noise.astype(np.float32)}


def run(model, feeds, folder):
    """A native graph in ONNX Runtime."""
    onnx.save(model, folder / "given.onnx")
    library = kernels.library("onnxruntime")
    made = runtime("onnxruntime").build(folder / "given.onnx", folder, "fp32", {}, library)
    (folder / library.name).write_bytes(library.read_bytes())
    with runtime("onnxruntime").Runner(folder, [*made, library.name], "fp32", 2) as runner:
        return [next(iter(runner.run(f).values())) for f in feeds]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_function_stays_the_same_for_every_length_and_batch(built, precision, monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "LEAST_WEIGHTS", 0)
    made = rows.a_few_at_a_time(built[precision])
    assert [n.op_type for n in made.graph.node].count("Scan") == 2  # over bins and over frames
    assert all(n.op_type != "SelectiveScan" for n in made.graph.node)
    feeds = [mixture(3000, 1), mixture(1777, 2, batch=2)]
    for got, wanted in zip(run(made, feeds, tmp_path), run(built[precision], feeds, tmp_path), strict=True):
        assert output_snr_db(got, wanted) >= 100


def test_narrow_blocks_are_left_as_they_are(built):
    made = rows.a_few_at_a_time(built["fp32"])
    assert made.SerializeToString() == built["fp32"].SerializeToString()


def test_wide_blocks_are_taken_apart_for_the_runtime_that_gains(built, monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "LEAST_WEIGHTS", 0)
    onnx.save(built["fp32"], tmp_path / "in.onnx")
    for name, scans in (("onnxruntime", 2), ("openvino", 0)):
        onnx_forms.write_form(tmp_path / "in.onnx", tmp_path / "out.onnx", runtime(name), native=True)
        kinds = [n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node]
        assert kinds.count("Scan") == scans, name


def test_a_profile_counts_bodies_once(built, monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "LEAST_WEIGHTS", 0)
    run(rows.a_few_at_a_time(built["fp32"]), [], tmp_path)
    files = ["fp32.onnx", kernels.library("onnxruntime").name]
    found = runtime("onnxruntime").executed(tmp_path, files, "fp32", 1, mixture(2000, 3))
    names = {k.operator for k in found}
    assert {"SelectiveScan", "MatMul"} <= names
    assert "Scan" not in names


def product(columns, parts, axis=2, sizes=None):
    """``x (2, 3, 8)`` times a weight, taken apart."""
    weight = np.random.default_rng(0).standard_normal((8, columns)).astype(np.float32)
    constants = [numpy_helper.from_array(weight, "weight")]
    names = [f"part{i}" for i in range(parts)]
    given = ["product"]
    attributes = {"num_outputs": parts}
    if sizes:
        constants.append(numpy_helper.from_array(np.array(sizes), "sizes"))
        given, attributes = ["product", "sizes"], {}
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"], "layer/MatMul_0"),
        helper.make_node("Split", given, names, "layer/Split_1", axis=axis, **attributes),
    ]

    def tensor(name):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 3)

    graph = helper.make_graph(nodes, "one", [tensor("x")], [tensor(n) for n in names], constants)
    graph.value_info.append(tensor("product"))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_a_product_is_split_where_its_factor_is_narrower():
    model = product(32, 2)
    x = {"x": np.random.default_rng(1).standard_normal((2, 3, 8)).astype(np.float32)}
    wanted = ReferenceEvaluator(model).run(None, x)
    onnx_edit.split_products(model)
    assert [(n.op_type, graph.layer_of(n)) for n in model.graph.node] == [("MatMul", "layer")] * 2
    assert [list(c.dims) for c in model.graph.initializer] == [[8, 16]] * 2
    for got, part in zip(ReferenceEvaluator(model).run(None, x), wanted, strict=True):
        np.testing.assert_allclose(got, part, rtol=1e-6)


@pytest.mark.parametrize(
    "model", [product(4, 4), product(32, 3, axis=1), product(32, 2, sizes=[8, 24])], ids=["narrow", "frames", "unequal"]
)
def test_other_products_stay_whole(model):
    before = [n.op_type for n in model.graph.node]
    onnx_edit.split_products(model)
    assert [n.op_type for n in model.graph.node] == before
