"""fp16: products and what lies between them in half precision, everything that sums or divides in float32.

Half precision keeps eleven bits, but nothing above 65504 and little below 6e-5: a norm's mean of squares, its epsilon,
a softmax, the scan's state and the input and output of the separator would suffer, products do not. So a convolution or
matrix product takes fp16; what moves data follows what it moves; arithmetic on single elements is in fp16 where all
that it takes is and it belongs to no norm; all else is in float32. Casts stand where the two meet, one for each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from edgesep import onnx_edit
from edgesep.graph import layer_of, within
from edgesep.ops import onnx_forms
from edgesep.passes.base import Context, PassResult
from edgesep.runtimes.base import Int8Form
from edgesep.separators.base import Separator
from edgesep.spec import BuildError, InputError

PRODUCTS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
MOVES = frozenset(
    {"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Split", "Slice", "Gather", "Expand", "Tile"}
    | {"Identity", "Resize", "MaxPool"}
)
ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Neg", "Relu", "PRelu", "LeakyRelu", "Sigmoid", "Tanh"})
LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Halve:
    """Half precision for targets of ``precision = "fp16"``.

    Attributes:
        keep_float: further submodules to leave in float32.
    """

    keep_float: tuple[str, ...] = ()

    stage: ClassVar[str] = "onnx"
    precision: ClassVar[str] = "fp16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_float", tuple(self.keep_float))

    def __call__(
        self, separator: Separator, model: Path, out: Path, context: Context, form: Int8Form | None = None
    ) -> PassResult:
        """Write the fp16 graph of ``separator`` (whose float export is ``model``) to ``out``.

        Raises:
            InputError: ``keep_float`` names no submodule of the separator or its front-end.
            BuildError: a weight is too large for half precision.
        """
        del form
        parts = dict(separator.module.named_modules())
        known = parts if context.original.front_end is None else parts | dict(context.original.module.named_modules())
        if unknown := [name for name in self.keep_float if name not in known]:
            raise InputError(f"halve.keep_float: {separator.name} has no submodule {unknown[0]!r}")
        norms = [name for name, part in parts.items() if _is_norm(part)]
        onnx_forms.register()
        halved = _Halving(onnx.load(model), (*norms, *self.keep_float))
        onnx_edit.share_initializers(halved.model)
        onnx.checker.check_model(halved.model, full_check=True)
        onnx.save(halved.model, out)
        report = {"products": halved.products, "fp16_products": halved.half_products, "casts": halved.casts}
        return PassResult(None, True, report)


def _is_norm(part: nn.Module) -> bool:
    """Whether it divides by what it measures; a BatchNorm does not, and the product that it joins bears its name."""
    folded = isinstance(part, nn.modules.batchnorm._BatchNorm)
    return "Norm" in type(part).__name__ and not folded and not list(part.children())


class _Halving:
    """One graph, written anew: ``half`` holds the tensors that are in fp16 now."""

    def __init__(self, model: onnx.ModelProto, kept: Sequence[str]):
        self.model, self.graph, self.kept = model, model.graph, kept
        typed = onnx.shape_inference.infer_shapes(model).graph
        values = (*typed.value_info, *typed.input, *typed.output)
        self.float = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
        self.constants = {c.name: c for c in self.graph.initializer}
        self.float |= {c.name for c in self.graph.initializer if c.data_type == TensorProto.FLOAT}
        self.half: set[str] = set()
        self.cast: dict[tuple[str, int], str] = {}
        self.made: list[NodeProto] = []
        self.products = self.half_products = self.casts = 0
        for node in list(self.graph.node):
            self._write(node)
        for output in self.graph.output:
            if output.name in self.half:
                self._cast_output(output.name)
        onnx_edit.replace_nodes(self.graph, self.made)

    def _write(self, node: NodeProto) -> None:
        taken = [name for name in node.input if name in self.float]
        flowing = [name for name in taken if name not in self.constants]
        self.products += node.op_type in PRODUCTS
        if node.op_type in PRODUCTS:
            halved = not self._is_kept(node)
            self.half_products += halved
        elif node.op_type in MOVES or (node.op_type in ELEMENTWISE and not self._is_kept(node)):
            halved = bool(flowing) and all(name in self.half for name in flowing)
        else:
            halved = False
        for i, name in enumerate(node.input):
            if name in self.float and not (node.op_type == "Resize" and i > 0):  # its scales are float32 by its schema
                node.input[i] = self._as(name, TensorProto.FLOAT16 if halved else TensorProto.FLOAT)
        for inner in (a.g for a in node.attribute if a.HasField("g")):
            self._rename_outer(inner)
        if halved:
            self.half.update(name for name in node.output if name)
        self.made.append(node)

    def _is_kept(self, node: NodeProto) -> bool:
        return within(layer_of(node), self.kept)

    def _as(self, name: str, wanted: int) -> str:
        """The tensor in fp16 or float32: itself, a converted constant, or its cast."""
        is_half = name in self.half
        if is_half == (wanted == TensorProto.FLOAT16):
            return name
        if (name, wanted) not in self.cast:
            new = self.cast[name, wanted] = f"{name}_{'fp16' if wanted == TensorProto.FLOAT16 else 'fp32'}"
            if name in self.constants:
                self.graph.initializer.append(_halved(self.constants[name], new))
            else:
                self.made.append(helper.make_node("Cast", [name], [new], f"/Cast_{new}", to=wanted))
                self.casts += 1
        return self.cast[name, wanted]

    def _rename_outer(self, inner: onnx.GraphProto) -> None:
        """Bodies of loops stay in float32; so does what they take from around them."""
        own = {v.name for v in inner.input} | {name for node in inner.node for name in node.output}
        for node in inner.node:
            for i, name in enumerate(node.input):
                if name in self.half and name not in own:
                    node.input[i] = self._as(name, TensorProto.FLOAT)
            for deeper in (a.g for a in node.attribute if a.HasField("g")):
                self._rename_outer(deeper)

    def _cast_output(self, name: str) -> None:
        """The separator's output stays float32 under its name."""
        inside = f"{name}_fp16"
        for node in self.made:
            _replace(node.input, name, inside)
            _replace(node.output, name, inside)
        self.made.append(helper.make_node("Cast", [inside], [name], f"/Cast_{name}", to=TensorProto.FLOAT))
        self.casts += 1


def _replace(names: Any, old: str, new: str) -> None:
    for i, name in enumerate(names):
        if name == old:
            names[i] = new


def _halved(constant: TensorProto, name: str) -> TensorProto:
    value = numpy_helper.to_array(constant)
    if value.size and np.abs(value).max() > LARGEST:
        raise BuildError(f"{constant.name} holds {np.abs(value).max():.3g}, too large for fp16; add it to keep_float")
    return numpy_helper.from_array(value.astype(np.float16), name)
