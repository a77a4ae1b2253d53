"""Passes: what they change, what they leave alone, what they refuse."""

import copy

import numpy as np
import onnx
import pytest
import torch

from edgesep import BuildError, InputError, graph, passes
from edgesep.int8 import quantized_share
from edgesep.passes.finetune import Finetune
from edgesep.passes.halve import Halve
from edgesep.passes.prune import Prune
from edgesep.passes.quantize import Quantize
from edgesep.runtimes import runtime
from edgesep.verify import output_snr_db


@pytest.mark.parametrize("method", ["neural-compressor", "onnxruntime"])
def test_int8_multiplies_in_int8_and_stays_close(separator, exported, context, tmp_path, method):
    out = tmp_path / "int8.onnx"
    result = Quantize(method=method, mixtures=3)(separator, exported, out, context)
    assert result.report["quantized_macs_share"] > 0.4
    types = [n.op_type for n in onnx.load(out).graph.node]
    assert "DequantizeLinear" in types
    weights = {c.name: c for c in onnx.load(out).graph.initializer}
    assert not any(n.op_type == "QuantizeLinear" and n.input[0] in weights for n in onnx.load(out).graph.node), (
        "weights are stored as integers"
    )
    assert out.stat().st_size < exported.stat().st_size
    x = context.calibration[3].mixture[None]
    with runtime("onnxruntime").Runner(tmp_path, ["int8.onnx"], "int8") as runner:
        y = runner.run({"mixture": x})["estimates"]
    assert output_snr_db(y, separator(x).numpy()) > 15


@pytest.mark.parametrize("method", ["neural-compressor", "onnxruntime"])
def test_model_input_and_output_stay_float(separator, exported, context, tmp_path, method):
    Quantize(method=method, mixtures=1)(separator, exported, tmp_path / "int8.onnx", context)
    model = onnx.load(tmp_path / "int8.onnx")
    dequantized = {o for n in model.graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    kernels = {c.name: tuple(c.dims) for c in model.graph.initializer}
    encoder = [n for n in model.graph.node if n.op_type == "Conv" and kernels.get(n.input[1]) == (17, 1, 1, 32)]
    decoder = [n for n in model.graph.node if n.op_type == "ConvTranspose"]
    assert len(encoder) == len(decoder) == 1
    for node in encoder + decoder:
        assert not dequantized & set(node.input)


def test_named_submodules_stay_float(separator, exported, context, tmp_path):
    quantize = Quantize(method="onnxruntime", mixtures=1)
    all_of_them = quantize(separator, exported, tmp_path / "a.onnx", context).report["quantized_macs_share"]
    fewer = Quantize(method="onnxruntime", mixtures=1, keep_float=("bottleneck", "mask_net.1"))
    assert fewer(separator, exported, tmp_path / "b.onnx", context).report["quantized_macs_share"] < all_of_them


def test_half_precision_multiplies_in_fp16_and_sums_in_float32(separator, exported, context, tmp_path):
    report = Halve()(separator, exported, tmp_path / "half.onnx", context).report
    assert report["fp16_products"] == report["products"] > 20
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "half.onnx"))
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    kinds = {v.name: v.type.tensor_type.elem_type for v in values}
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "MatMul"):
            assert kinds[node.output[0]] == onnx.TensorProto.FLOAT16
        elif node.op_type in ("InstanceNormalization", "LayerNormalization", "ReduceMean", "Softmax", "Sqrt"):
            assert kinds[node.output[0]] == onnx.TensorProto.FLOAT
    assert {kinds[v.name] for v in (*model.graph.input, *model.graph.output)} == {onnx.TensorProto.FLOAT}
    files = runtime("onnxruntime").build(tmp_path / "half.onnx", tmp_path, "fp16", {})
    x = context.calibration[0].mixture[None]
    with runtime("onnxruntime").Runner(tmp_path, files, "fp16") as runner:
        assert output_snr_db(runner.run({"mixture": x})["estimates"], separator(x).numpy()) > 50


def test_half_precision_leaves_what_is_named_in_float32(separator, exported, context, tmp_path):
    kept = Halve(keep_float=("bottleneck",))(separator, exported, tmp_path / "half.onnx", context).report
    assert kept["fp16_products"] == kept["products"] - 1
    with pytest.raises(InputError, match="no submodule 'nothing'"):
        Halve(keep_float=("nothing",))(separator, exported, tmp_path / "half.onnx", context)


def test_weights_beyond_half_precision_are_refused(separator, exported, context, tmp_path):
    model = onnx.load(exported)
    weight = next(c for c in model.graph.initializer if len(c.dims) == 4)
    large = np.full(tuple(weight.dims), 1e5, np.float32)
    weight.CopyFrom(onnx.numpy_helper.from_array(large, weight.name))
    onnx.save(model, tmp_path / "large.onnx")
    with pytest.raises(BuildError, match="too large for fp16"):
        Halve()(separator, tmp_path / "large.onnx", tmp_path / "half.onnx", context)
    assert not (tmp_path / "half.onnx").exists()


def test_float_graph_has_no_quantized_share(separator, exported):
    assert quantized_share(exported, separator)["quantized_macs_share"] == 0


def test_macs_of_the_graph_are_those_of_the_module(separator, exported):
    from edgesep.inspect import cost

    assert quantized_share(exported, separator)["gmacs_per_s"] * 1e9 == pytest.approx(cost(separator)[0], rel=0.01)


def test_unknown_submodule_is_refused(separator, exported, context, tmp_path):
    with pytest.raises(InputError, match="which TDANet does not have"):
        Quantize(keep_float=("nowhere",))(separator, exported, tmp_path / "x.onnx", context)


def test_finetuning_improves_a_damaged_separator(separator, context):
    damaged = copy.deepcopy(separator.module)
    with torch.no_grad():
        for p in damaged.mask_net.parameters():
            p.mul_(0.5)
    from dataclasses import replace

    result = Finetune(steps=100, seconds=0.5, batch=2, lr=2e-3)(replace(separator, module=damaged), context)
    assert result.modified
    assert result.report["valid_si_snr_db"] > result.report["valid_si_snr_db_before"]


def test_interrupted_finetuning_continues_to_the_same_result(separator, context, tmp_path):
    from dataclasses import replace

    whole = Finetune(steps=100, seconds=0.3, batch=1, distill=0)(separator, context)

    class Stop(Exception):
        pass

    def stop(done, _total, _text):
        if done == 70:
            raise Stop

    again = replace(context, folder=tmp_path / "again", tick=stop)
    again.folder.mkdir()
    with pytest.raises(Stop):
        Finetune(steps=100, seconds=0.3, batch=1, distill=0)(separator, again)
    resumed = Finetune(steps=100, seconds=0.3, batch=1, distill=0)(separator, replace(again, tick=context.tick))
    assert resumed.report == whole.report
    for a, b in zip(resumed.separator.module.parameters(), whole.separator.module.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_pass_is_made_by_name_and_fields():
    assert passes.make("prune", share=0.5) == Prune(0.5)


def test_equal_constants_are_stored_once():
    weight = np.ones((4, 4), np.float32)
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [4, 4]) for n in "xy")
    nodes = [onnx.helper.make_node("MatMul", ["x", "w1"], ["h"]), onnx.helper.make_node("MatMul", ["h", "w2"], ["y"])]
    constants = [onnx.numpy_helper.from_array(weight, n) for n in ("w1", "w2", "unused")]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x], [y], constants))
    graph.clean(model)
    assert [c.name for c in model.graph.initializer] == ["w1"]
    onnx.checker.check_model(model)


def test_training_with_the_rounding_of_int8_leaves_float_weights_that_survive_it(separator, context):
    from edgesep.fake_quant import RoundedProducts

    x = torch.from_numpy(context.calibration[0].mixture[None])
    module = copy.deepcopy(separator.module)
    rounded = RoundedProducts(module, separator.keep_float)
    rounded.calibrate([(x,)])
    with torch.no_grad():
        snr_db = output_snr_db(module(x).numpy(), separator.module(x).numpy())
    assert 10 < snr_db < 60, "rounded, and not beyond recognition"
    rounded.close()
    with torch.no_grad():
        torch.testing.assert_close(module(x), separator.module(x))
    assert module.state_dict().keys() == separator.module.state_dict().keys()
    result = Finetune(steps=25, seconds=0.3, batch=2, quantized=True, lr=2e-3)(separator, context)
    assert result.modified
    assert result.report["valid_si_snr_db"] > result.report["valid_si_snr_db_before"]
    assert result.separator.module.state_dict().keys() == separator.module.state_dict().keys()
