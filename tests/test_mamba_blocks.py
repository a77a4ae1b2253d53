"""Mamba blocks: as one operator, or a few rows at a time in the bodies of Scans. And products made in parts.

The function stays the same, and nothing is taken for a block that is not one.
"""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from test_native_streams import RUNTIMES, operator

from edgesep import graph, int8, kernels, mamba_fusion, onnx_edit, rows
from edgesep.ops import bidirectional_mamba, onnx_forms, window_product
from edgesep.passes import lower
from edgesep.runtimes import int8_form, runtime
from edgesep.separators import spmamba
from edgesep.verify import output_snr_db

RATE = 8000
INNER, STATES, RANK, CONV_TAPS = 37, 6, 3, 4


def mamba_inputs(taps, channels=5, steps=60, bf16=False, int8=False):
    r = np.random.default_rng(taps)
    outputs, inner = taps * channels, INNER + bf16 + 3 * int8

    def normal(*shape):
        return r.standard_normal(shape) / np.sqrt(shape[-2] if len(shape) > 1 else 1)

    made = {
        "x": r.standard_normal((3, channels, steps)),
        "in": normal(2, 2, outputs, inner),
        "conv_weight": 0.5 * normal(2, inner, CONV_TAPS),
        "conv_bias": normal(2, inner),
        "states": normal(2, inner, RANK + 2 * STATES),
        "steps": bidirectional_mamba.grouped(normal(2, RANK, inner)),
        "step_bias": normal(2, inner) - 1,
        "A": -np.abs(normal(2, inner, STATES)),
        "D": normal(2, inner),
        "out": normal(2, inner, outputs),
        "through": window_product.unfolded(normal(outputs, outputs).reshape(taps, channels, -1)),
        "bias": normal(channels),
    }
    narrow = {}
    for name in bidirectional_mamba.BYTES if int8 else ():
        narrow[name], narrow[f"{name}_scale"] = bidirectional_mamba.in_bytes(made[name])
    made["in"] = bidirectional_mamba.unfolded(made["in"], taps)
    for name in ("states", "out"):
        made[name] = bidirectional_mamba.grouped(made[name])
    made = {name: v.astype(np.float32) for name, v in made.items()}
    return made | narrow | {n: bidirectional_mamba.pairs(made[n]) for n in bidirectional_mamba.PAIRED if bf16}


@pytest.mark.parametrize("taps", window_product.TAPS)
@pytest.mark.parametrize("name", RUNTIMES)
def test_the_operator_equals_its_reference(name, taps, tmp_path):
    given = mamba_inputs(taps)
    (got,) = RUNTIMES[name](operator("BidirectionalMamba", given, ["y"], epsilon=1e-3), given, tmp_path)
    wanted = bidirectional_mamba.reference(epsilon=1e-3, **given)
    assert got.shape == wanted.shape
    assert output_snr_db(got, wanted) >= 110


@pytest.mark.parametrize("name", RUNTIMES)
def test_the_operator_in_bfloat16_is_as_near_as_its_bits(name, tmp_path):
    given = mamba_inputs(8, channels=6, bf16=True)
    made = operator("BidirectionalMamba", given, ["y"], epsilon=1e-3, bf16=1)
    (got,) = RUNTIMES[name](made, given, tmp_path)
    assert 39 <= output_snr_db(got, bidirectional_mamba.reference(epsilon=1e-3, **given)) <= 60


@pytest.mark.parametrize("channels", [5, 6])  # an odd number of them cannot be paired
@pytest.mark.parametrize("name", RUNTIMES)
def test_the_operator_in_eight_bits_is_as_near_as_its_bits(name, channels, tmp_path):
    given = mamba_inputs(8, channels=channels, int8=True)
    made = operator("BidirectionalMamba", given, ["y"], epsilon=1e-3)
    (got,) = RUNTIMES[name](made, given, tmp_path)
    assert 36 <= output_snr_db(got, bidirectional_mamba.reference(epsilon=1e-3, **given)) <= 60


@pytest.mark.parametrize("name", RUNTIMES)
def test_each_window_is_rounded_for_itself(name, tmp_path):
    given = mamba_inputs(4, int8=True)
    given["x"][0] *= 1e-3  # with a range for all rows this one would become zero
    (got,) = RUNTIMES[name](operator("BidirectionalMamba", given, ["y"], epsilon=1e-3), given, tmp_path)
    wanted = bidirectional_mamba.reference(epsilon=1e-3, **given)
    for row in range(2):
        moved = given["bias"]
        assert output_snr_db(got[row] - moved, wanted[row] - moved) >= 30


@pytest.mark.parametrize("name", RUNTIMES)
def test_what_is_no_number_is_not_rounded_away(name, tmp_path):
    given = mamba_inputs(4, int8=True)
    given["x"][1, 2, 30] = np.nan
    (got,) = RUNTIMES[name](operator("BidirectionalMamba", given, ["y"], epsilon=1e-3), given, tmp_path)
    assert np.isnan(got[1]).all()  # forwards and backwards
    assert np.isfinite(got[[0, 2]]).all()


def test_pairs_are_rounded_to_the_nearest_and_to_even():
    rows = np.array([[1, 1 + 2**-8, 1 + 3 * 2**-8, -1.01], [2, 3, 4, 5]], np.float32)
    packed = bidirectional_mamba.pairs(rows)
    assert packed.shape == (1, 4)
    np.testing.assert_array_equal(bidirectional_mamba.unpaired(packed), [[1, 1, 1 + 2**-6, -1.0078125], [2, 3, 4, 5]])


@pytest.mark.parametrize(("name", "message"), [("onnxruntime", "in must be float"), ("openvino", "in is i32")])
def test_pairs_that_are_not_announced_are_refused(name, message, tmp_path):
    given = mamba_inputs(4, channels=6, bf16=True)
    with pytest.raises(Exception, match=message):  # each runtime has its own
        RUNTIMES[name](operator("BidirectionalMamba", given, ["y"]), given, tmp_path)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_row_shorter_than_a_window_is_refused(name, tmp_path):
    given = mamba_inputs(4, steps=3)
    with pytest.raises(Exception, match="expected 4 steps or more"):  # each runtime has its own
        RUNTIMES[name](operator("BidirectionalMamba", given, ["y"]), given, tmp_path)


@pytest.mark.parametrize("taps", window_product.TAPS)
def test_a_matrix_for_the_fast_algorithm_can_be_read_back(taps):
    matrix = np.random.default_rng(0).standard_normal((taps, 3, 40))
    parts = window_product.unfolded(matrix)
    assert parts.shape == (2, 3 ** int(np.log2(taps)), 3, 32)
    np.testing.assert_allclose(window_product.folded(parts)[..., :40], matrix, atol=1e-6)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A small SPMamba's lowered native graphs, whole: float and INT8 for ONNX Runtime, by precision."""
    torch.manual_seed(2)
    config = {"n_srcs": 2, "n_fft": 64, "stride": 32, "n_layers": 1, "attn_n_head": 2, "attn_approx_qk_dim": 64}
    separator = spmamba.create({**config, "emb_dim": 8, "emb_ks": 4, "emb_hs": 1}, RATE)
    for name, weight in separator.module.named_parameters():
        if name.endswith(("norm.weight", "_linear.bias")):  # fresh ones are all equal
            torch.nn.init.normal_(weight, 1, 0.3)
    separator = lower.Lower()(separator, None).separator
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


def run(model, feeds, folder, name="onnxruntime"):
    """A native graph in a runtime."""
    onnx.save(model, folder / "given.onnx")
    module, library = runtime(name), kernels.library(name)
    made = module.build(folder / "given.onnx", folder, "fp32", {}, library)
    (folder / library.name).write_bytes(library.read_bytes())
    with module.Runner(folder, [*made, library.name], "fp32", 2) as runner:
        return [next(iter(runner.run(f).values())) for f in feeds]


def kinds(model):
    return [n.op_type for n in model.graph.node]


@pytest.mark.parametrize("name", RUNTIMES)
def test_blocks_as_one_operator_stay_the_same_for_every_length_and_batch(built, name, tmp_path):
    made = mamba_fusion.fuse(built["fp32"])
    assert kinds(made).count("BidirectionalMamba") == 2  # over bins and over frames
    assert not {"SelectiveScan", "CausalConv1dSilu"} & set(kinds(made))
    feeds = [mixture(3000, 1), mixture(1777, 2, batch=2)]
    for got, wanted in zip(run(made, feeds, tmp_path, name), run(built["fp32"], feeds, tmp_path, name), strict=True):
        assert output_snr_db(got, wanted) >= 100


def test_products_of_a_block_may_be_in_bfloat16(built, tmp_path):
    made, feeds = mamba_fusion.fuse(built["fp32"], bf16=True), [mixture(3000, 1)]
    (got,), (wanted,) = run(made, feeds, tmp_path), run(built["fp32"], feeds, tmp_path)
    assert 35 <= output_snr_db(got, wanted) <= 60


def changed(model, change):
    made = onnx.ModelProto()
    made.CopyFrom(model)
    change(made.graph, mamba_fusion._Graph(made.graph))
    return made


def constant(graph, name, value):
    """Give one reader of a constant another one."""
    graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def other_start(graph, of):
    node = next(
        n for n in of.nodes if n.op_type == "Slice" and of.constants.get(n.input[1], np.ones(2)).tolist() == [2]
    )
    node.input[1] = constant(graph, "start", [1])


def other_direction(_, of):
    node = next(n for n in of.nodes if n.op_type == "CausalConv1dSilu")
    node.attribute[0].i = 1 - node.attribute[0].i


def cube_for_square(graph, of):
    squares = (n for n in of.nodes if n.op_type == "Pow")
    node = next(n for n in squares if of.readers[n.output[0]][0].op_type == "ReduceMean")
    node.input[1] = constant(graph, "three", np.float32(3))


def a_reader_of_a_state(graph, of):
    state = next(n for n in of.nodes if n.op_type == "SelectiveScan").output[1]
    graph.output.append(onnx.helper.make_tensor_value_info(state, onnx.TensorProto.FLOAT, None))


def other_padding(graph, of):
    node = next(n for n in of.nodes if n.op_type == "Pad" and of.constants.get(n.input[1], np.ones(0)).size == 8)
    node.input[1] = constant(graph, "pads", [0] * 6 + [5, 0])


def windows_that_skip_steps(graph, of):
    node = next(
        n for n in of.nodes if n.op_type == "Slice" and of.constants.get(n.input[1], np.ones(2)).tolist() == [2]
    )
    node.input[4] = constant(graph, "hop", [2])


CHANGES = [windows_that_skip_steps, other_start, other_direction, cube_for_square, a_reader_of_a_state, other_padding]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_what_is_not_quite_a_block_is_left_as_it_is(built, change):
    made = mamba_fusion.fuse(changed(built["fp32"], change))
    assert kinds(made).count("BidirectionalMamba") == 1  # the other block


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_block_in_int8_becomes_one_operator_and_loses_nothing(built, name, tmp_path):
    made = mamba_fusion.fuse(built["int8"])
    blocks = [n for n in made.graph.node if n.op_type == "BidirectionalMamba"]
    assert [len(n.input) for n in blocks] == [len(bidirectional_mamba.INPUTS + bidirectional_mamba.SCALES)] * 2
    feeds = [mixture(3000, 1), mixture(1777, 2, batch=2)]
    exact, before = run(built["fp32"], feeds, tmp_path), run(built["int8"], feeds, tmp_path, name)
    for got, wanted, apart in zip(run(made, feeds, tmp_path, name), exact, before, strict=True):
        assert output_snr_db(got, wanted) >= output_snr_db(apart, wanted) - 0.5


def a_product_in_float(graph, of):
    node = of.made_by(next(n for n in of.nodes if n.op_type == "CausalConv1dSilu").input[0], "MatMul")
    value, before = of.value(node.input[1]), of.source(node.input[0])
    node.input[:] = [before, constant(graph, "in_float", value)]


def test_a_block_that_is_in_int8_in_part_becomes_one_of_floats(built):
    made = mamba_fusion.fuse(changed(built["int8"], a_product_in_float))
    assert sorted(len(n.input) for n in made.graph.node if n.op_type == "BidirectionalMamba") == [12, 15]


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


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "tensorrt"])
def test_each_runtime_gets_the_blocks_that_gain_there(built, name, monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "LEAST_WEIGHTS", 0)
    fuses = name != "tensorrt"
    for precision in ("fp32", "int8"):
        onnx.save(built[precision], tmp_path / "in.onnx")
        onnx_forms.write_form(tmp_path / "in.onnx", tmp_path / "out.onnx", runtime(name), native=True)
        found = kinds(onnx.load(tmp_path / "out.onnx"))
        assert found.count("BidirectionalMamba") == 2 * fuses
        assert not found.count("Scan")


def test_blocks_that_are_not_one_operator_go_a_few_rows_at_a_time(built, monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "LEAST_WEIGHTS", 0)
    onnx.save(changed(built["int8"], other_padding), tmp_path / "in.onnx")
    onnx_forms.write_form(tmp_path / "in.onnx", tmp_path / "out.onnx", runtime("onnxruntime"), native=True)
    found = kinds(onnx.load(tmp_path / "out.onnx"))
    assert (found.count("BidirectionalMamba"), found.count("Scan")) == (1, 1)


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
