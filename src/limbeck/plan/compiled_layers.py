"""What compiled layers keep and allocate, from the graphs that ``torch.compile`` makes of them, without a compiler.

Plain autograd keeps the inputs of every operator for the backward pass. Compiled code keeps what PyTorch's partitioner chooses
and computes the rest again, and a chain of elementwise operators is one kernel, whose intermediate results are in no memory.
Here AOTAutograd traces a layer on fake tensors, Inductor's partitioner divides the graph, and both parts run with the buffers
that Inductor would allocate: inputs and outputs of kernels that it does not fuse (matrix products, attention), and what leaves
the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

Function = Callable[..., Any]


class SimulatedCompiler:
    """In place of ``models.compile.compile_function`` while a step is taken on fake tensors.

    Layers of the same kind, called with inputs of the same shapes, share a graph.
    """

    def __init__(self) -> None:
        self._graphs: dict[Any, Function | None] = {}

    def __call__(self, forward: Function) -> Function:
        """The function (layer, inputs …) → outputs of a layer's plain ``forward``, as compiled code."""
        return partial(self._run, forward)

    def _run(self, forward: Function, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [*own.values(), *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
        fake_mode = detect_fake_mode(tensors)
        if fake_mode is None or any(isinstance(tensor, DTensor) for tensor in tensors):
            return forward(layer, *args, **kwargs)
        names, is_tensor = tuple(own), tuple(isinstance(leaf, Tensor) for leaf in leaves)
        shapes = tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors)
        key = (forward, names, shapes, is_tensor, str(structure), layer.training, torch.is_grad_enabled())
        if key not in self._graphs:
            others = [None if tensor else leaf for leaf, tensor in zip(leaves, is_tensor, strict=True)]

            def call(*values: Tensor) -> Any:  # keeps no tensor alive
                given, rest = dict(zip(names, values, strict=False)), iter(values[len(names) :])
                inputs = [next(rest) if tensor else leaf for leaf, tensor in zip(others, is_tensor, strict=True)]
                args, kwargs = tree_unflatten(inputs, structure)
                with _reparametrize_module(layer, given):
                    return forward(layer, *args, **kwargs)

            with _disable_current_modes(), fake_mode:
                self._graphs[key] = _trace(call, tensors)
        graph = self._graphs[key]
        return forward(layer, *args, **kwargs) if graph is None else graph(*tensors)


def _trace(call: Function, tensors: Sequence[Tensor]) -> Function | None:
    """``call`` as compiled code, or None for what cannot be traced: ``torch.compile`` runs that uncompiled."""
    from torch._functorch.aot_autograd import aot_function  # which take time to import, and runs need no plan
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    compiler: Any = _Kernels
    compiled: Function = aot_function(
        call,
        compiler,
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table(),
    )
    try:
        # In place of the hooks of activation checkpointing, which counts what is saved.
        with saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            compiled(*tensors)
    except Exception:  # tracing fails in as many ways as models differ
        return None
    return compiled


class _Kernels:
    """Runs a graph with the buffers of compiled code. Buffers are freed after their last reader.

    Operators that are not fused run, so that their operations are counted.
    """

    _boxed_call = True  # the caller keeps no argument alive

    def __init__(self, module: fx.GraphModule, _inputs: Sequence[Any]) -> None:
        from torch._functorch.partitioners import get_default_op_list

        types = get_default_op_list()
        self._views = {node for node in module.graph.nodes if _is_view(node, types)}
        self._inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._constants = {node: getattr(module, node.target) for node in module.graph.nodes if node.op == "get_attr"}
        self._output: fx.Node = next(node for node in module.graph.nodes if node.op == "output")
        called = [node for node in module.graph.nodes if node.op == "call_function" and node not in self._views]
        self._kernels = {node for node in called if not types.is_fusible(node)}
        stored = {*self._inputs, *self._constants, *self._kernels}
        for node in (*self._kernels, self._output):
            stored |= {self._base(each) for each in node.all_input_nodes}
        self._steps = [node for node in called if node in stored]
        self._stored = stored
        last: dict[fx.Node, fx.Node] = {}
        for node in (*self._steps, self._output):
            last |= dict.fromkeys((*self._reads(node), node), node)
        self._freed: dict[fx.Node, list[fx.Node]] = {}
        for node in stored:
            self._freed.setdefault(last.get(node, self._output), []).append(node)

    def __call__(self, arguments: list[Any]) -> Any:
        memory: dict[fx.Node, Any] = dict(zip(self._inputs, arguments, strict=True)) | self._constants
        arguments.clear()

        def value(node: fx.Node) -> Any:
            return self._call(node, value) if node in self._views else memory[node]

        for node in self._steps:
            if node in self._kernels:
                result = self._call(node, value)
            freed = [each for each in self._freed.get(node, ()) if each is not node]
            for each in freed:
                del memory[each]
            memory[node] = result if node in self._kernels else _allocate(node.meta["val"])
            result = None
        outputs = fx.map_arg(self._output.args[0], value)
        memory.clear()  # `value` refers to itself, and would keep all of it until the garbage is collected
        return outputs

    def _call(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        target: Any = node.target
        return target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))

    def _base(self, node: fx.Node) -> fx.Node:
        """What ``node`` is a view of, or itself."""
        while node in self._views:
            node = node.all_input_nodes[0]
        return node

    def _reads(self, node: fx.Node) -> set[fx.Node]:
        """The buffers from which a kernel, or a chain of fused operators that ends in ``node``, is computed."""
        found: set[fx.Node] = set()
        seen, waiting = set(), [*node.all_input_nodes]
        while waiting:
            base = self._base(waiting.pop())
            if base in seen:
                continue
            seen.add(base)
            if base in self._stored:
                found.add(base)
            else:
                waiting += base.all_input_nodes
        return found


def _is_view(node: fx.Node, types: Any) -> bool:
    return node.op == "call_function" and (node.target is operator.getitem or types.is_view(node))


def _allocate(like: Any) -> Any:
    if not isinstance(like, Tensor):
        return like
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
