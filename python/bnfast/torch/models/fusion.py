"""A torch.compile backend that fuses what follows a batch norm with it, and then compiles as Inductor does.

Dynamo's graph holds PyTorch's functions and bnfast's ops before anything is differentiated. `fuse` writes the residual
and the activation into the arguments of a batch norm's op, and takes the ops that computed them out of the graph. The
op stays where it is and autograd sees one op, so gradients are those of `bnfast.torch.batch_norm`'s arguments.

    y = op(x, ...)[0]; z = y + residual; out = relu(z)   ->   out = op(x, ..., residual, "relu")[0]

It does so only where this can't be told apart from what was written:
    a single operation reads y, and a single one z, also as an output, a hook's argument or a tensor changed in place
    the residual exists before the op runs, has the shape and dtype of y, and nothing uses its memory up to the sum
    nothing between the op and the operation switches a mode: no_grad, autocast, inference_mode
    after a sum the activation is a ReLU: for others autograd would keep a tensor that PyTorch does not keep (residual
    or result), and a script may change it in place
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

from ..library import LIBRARY

__all__ = ["compiler", "fuse"]


class _Place(NamedTuple):
    """The positions of the arguments that `fuse` writes."""

    residual: int
    activation: int
    negative_slope: int


_OPS = getattr(torch.ops, LIBRARY.ns)
_PLACES = {_OPS.batch_norm_train: _Place(3, 8, 9), _OPS.batch_norm_infer: _Place(3, 7, 8)}
_ADDS = (operator.add, torch.add, operator.iadd, "add", "add_")
_ADDS_IN_PLACE = (operator.iadd, "add_")
# Functions and methods of one tensor, beside `inplace`.
_ACTIVATIONS: dict[Any, str] = {
    functional.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    "relu": "relu",
    "relu_": "relu",
    functional.relu6: "relu6",
    functional.silu: "silu",
}
_VALUES = (Tensor, torch.SymInt)  # what nodes that switch no mode compute
_READS = (getattr, operator.getitem)  # or read


def compiler(graph: GraphModule, inputs: list[Any], *, mode: str | None = None, options: Any = None) -> Any:
    """A backend for torch.compile: Inductor, after what follows each batch norm was fused with it.

        torch.compile(model, backend=bnfast.torch.compiler)

    Fused are ReLU, ReLU6, LeakyReLU and SiLU, as modules, functions or methods, and a sum with a tensor of equal shape,
    alone or before a ReLU: where a single operation reads the batch norm's output, in training and in inference.
    In half precision a fused sum is rounded once instead of twice. Everything else is as with the backend "inductor".

    Args:
        graph, inputs, mode, options: given by torch.compile; mode and options are those of Inductor.

    Returns:
        What Inductor compiled.

    Example:
        >>> import bnfast.torch, torch
        >>> layers = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
        >>> model = bnfast.torch.accelerate(torch.nn.Sequential(*layers))
        >>> compiled = torch.compile(model, backend=bnfast.torch.compiler)
    """
    from torch import _inductor  # 1 s

    patches = dict(_inductor.list_mode_options(mode) if mode else {})
    return _inductor.compile(fuse(graph), inputs, options={**patches, **(options or {})})


def fuse(graph: GraphModule) -> GraphModule:
    """Fuse what follows the batch norms of a graph that Dynamo captured, in place, for a backend of one's own.

    Returns:
        `graph` itself.

    Example:
        >>> import bnfast.torch, torch
        >>> def backend(graph, inputs):
        ...     return bnfast.torch.fuse(graph)
        >>> model = bnfast.torch.accelerate(torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.ReLU()))
        >>> torch.compile(model, backend=backend)(torch.randn(4, 8)).shape
        torch.Size([4, 8])
    """
    for module in graph.modules():
        if isinstance(module, GraphModule):  # also the bodies of checkpoints and branches
            places = [(node, _place(node)) for node in module.graph.nodes]
            changed = [_fuse_one(node, place) for node, place in places if place is not None]
            if any(changed):
                module.graph.lint()
                module.recompile()
    return graph


def _place(node: Node) -> _Place | None:
    """Where a batch norm's op has its epilogue; None for any other node."""
    if node.op != "call_function" or node.kwargs:
        return None
    target = getattr(node.target, "overloadpacket", node.target)
    return _PLACES.get(target) if isinstance(target, torch._ops.OpOverloadPacket) else None


def _fuse_one(norm: Node, place: _Place) -> bool:
    if norm.args[place.residual] is not None or norm.args[place.activation] is not None:
        return False
    outputs = [user for user in norm.users if user.target is operator.getitem and user.args[1] == 0]
    if len(outputs) != 1:
        return False
    (y,) = outputs
    residual, (activation, slope) = None, (None, 0.2)
    removed: list[Node] = []
    reader = _reader(norm, y)
    if reader is not None and (residual := _residual(norm, y, reader)) is not None:
        removed.append(reader)
        reader = _reader(norm, reader)
    if reader is not None and (found := _activation(reader)) is not None and (residual is None or found[0] == "relu"):
        activation, slope = found
        removed.append(reader)
    if not removed:
        return False
    for position, value in ((place.residual, residual), (place.activation, activation), (place.negative_slope, slope)):
        norm.update_arg(position, value)
    removed[-1].replace_all_uses_with(y)
    for node in reversed(removed):
        norm.graph.erase_node(node)
    return True


def _reader(norm: Node, tensor: Node) -> Node | None:
    """The single node that reads a tensor, if nothing between the batch norm and that node switches a mode."""
    if len(tensor.users) != 1:
        return None
    (reader,) = tensor.users
    return reader if all(map(_switches_nothing, _between(norm, reader))) else None


def _between(first: Node, last: Node) -> Iterator[Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _switches_nothing(node: Node) -> bool:
    if not node.op.startswith("call") or node.target in _READS:
        return True
    value = node.meta.get("example_value")  # absent or of another kind: a switch of modes, or unknown
    values = value if isinstance(value, (tuple, list)) else (value,)
    return len(values) > 0 and all(isinstance(one, _VALUES) for one in values)


def _residual(norm: Node, y: Node, reader: Node) -> Node | None:
    """What `reader` adds to y, if the batch norm's op can add it."""
    if reader.op == "output" or reader.target not in _ADDS or reader.kwargs or len(reader.args) != 2:
        return None
    one, other = reader.args
    if other is y and reader.target not in _ADDS_IN_PLACE:  # other += y would change what other readers see
        one, other = other, one
    if one is not y or not isinstance(other, Node) or other.graph is not norm.graph or not _precedes(other, norm):
        return None
    ours, theirs = (node.meta.get("example_value") for node in (y, other))
    if type(ours) is not type(theirs) or not isinstance(ours, Tensor) or _kind(ours) != _kind(theirs):
        return None
    used = (tensor for node in _between(norm, reader) for given in node.all_input_nodes for tensor in _tensors(given))
    return None if any(_memory(tensor) == _memory(theirs) for tensor in used) else other


def _precedes(node: Node, other: Node) -> bool:
    while other.op != "root":
        if other is node:
            return True
        other = other.prev
    return False


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors must have in common. Symbolic extents are compared as text: a comparison would be a guard."""
    return tuple(map(str, tensor.shape)), tensor.dtype, tensor.device, tensor.layout


def _tensors(node: Node) -> list[Tensor]:
    value = node.meta.get("example_value")
    return [one for one in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(one, Tensor)]


def _memory(tensor: Tensor) -> int:
    """What tells the memory of a fake tensor from that of another one."""
    return int(tensor.untyped_storage()._cdata)


def _activation(node: Node) -> tuple[str, float] | None:
    """The activation that a node computes of its first argument, and its negative slope; None if it is none of ours."""
    if node.op not in ("call_function", "call_method"):
        return None
    names = {functional.leaky_relu: ("negative_slope",), functional.hardtanh: ("min_val", "max_val")}
    parameters = (*names.get(node.target, ()), "inplace")
    given = {**dict(zip(parameters, node.args[1:], strict=False)), **node.kwargs}
    given.pop("inplace", None)
    if len(node.args) > 1 + len(parameters) or not all(isinstance(one, (int, float)) for one in given.values()):
        return None
    if node.target is functional.hardtanh:
        return ("relu6", 0.2) if (given.get("min_val", -1), given.get("max_val", 1)) == (0, 6) else None
    if node.target is functional.leaky_relu:
        slope = float(given.get("negative_slope", 0.01))
        return ("leaky_relu", slope) if math.isfinite(slope) and slope > 0 else None
    name = _ACTIVATIONS.get(node.target)
    return None if name is None or given else (name, 0.2)
