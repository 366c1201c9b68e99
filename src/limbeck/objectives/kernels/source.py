"""Translation of a divergence's two formulas into Triton source, so that a new divergence needs no kernel.

The Python function is traced on small tensors, and its elementwise operations are written out as Triton code. A function that
is not elementwise, not float32, or depends on shapes or data raises ``Untranslatable``. Nothing is approximated.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import operator
import sys
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx

from limbeck.objectives.divergences import DivergenceFn

INPUTS = ("p", "q", "log_p", "log_q")
_MAX_VERSIONS = 4  # of one function; one whose numbers change more often is not translated


class Untranslatable(Exception):
    """A function has no kernel. The message is a clause that completes "because"."""


@dataclass(frozen=True)
class KernelSource:
    """A translated divergence.

    divergence_fn: a Triton function (p, q, log p, log q) → (value, w). weight_sum: Σw over a row if w is a·p + b·q, else None.
    """

    divergence_fn: Any
    weight_sum: float | None


def translate(divergence_fn: DivergenceFn) -> KernelSource:
    """Return the divergence as a Triton function. Raises Untranslatable.

    Numbers in the formulas become constants of the kernel. Each call compares the function's results on fixed inputs with those
    of earlier calls, and translates it again if its numbers have changed.
    """
    if getattr(divergence_fn, "needs_vocab_reduction", False):
        raise Untranslatable("its tokens depend on one another")
    key, results = _key(divergence_fn), _results(divergence_fn)
    versions = _versions_of(key)
    if results not in versions:
        if len(versions) == _MAX_VERSIONS:
            raise Untranslatable("its numbers change from call to call")
        versions[results] = _translate(divergence_fn)
    result = versions[results]
    if isinstance(result, Untranslatable):
        raise result
    return result


@lru_cache(maxsize=64)
def _versions_of(key: Any) -> dict[Any, KernelSource | Untranslatable]:
    return {}


def _key(divergence_fn: DivergenceFn) -> Any:
    """A key that is equal for functions of the same code and numbers: ``make_divergence`` returns a new one on each call."""
    if not isinstance(divergence_fn, FunctionType) or divergence_fn.__defaults__ or divergence_fn.__kwdefaults__:
        return divergence_fn
    cells = [cell.cell_contents for cell in divergence_fn.__closure__ or ()]
    if all(isinstance(x, float | int | str | None) for x in cells):
        return divergence_fn.__code__, tuple((type(x), x) for x in cells)
    return divergence_fn


def _results(divergence_fn: DivergenceFn) -> Any:
    log_p = torch.linspace(0, 120, 61).neg()
    log_q = log_p.roll(23)
    try:
        return tuple(
            x.numpy().tobytes() for x in divergence_fn(log_p.exp()[None], log_q.exp()[None], log_p[None], log_q[None])
        )
    except Exception as error:  # of a user's function; the plain pass raises it again
        raise Untranslatable(f"it fails on plain numbers ({type(error).__name__}: {error})") from error


def _translate(divergence_fn: DivergenceFn) -> KernelSource | Untranslatable:
    try:
        text, mass = source(divergence_fn, (2, 5))
        if source(divergence_fn, (3, 7))[0] != text:
            raise Untranslatable("it depends on the number of rows or tokens")
        return KernelSource(_load(text).divergence_fn, mass)
    except Untranslatable as why:
        return why


def source(divergence_fn: DivergenceFn, shape: tuple[int, int]) -> tuple[str, float | None]:
    """Return the text of the Triton module, and Σw if it is known, as traced on tensors of ``shape``."""
    from torch._decomp import core_aten_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    table: Any = core_aten_decompositions()
    logs = [torch.rand(shape).log_softmax(-1) for _ in range(2)]
    try:
        with torch.no_grad():
            graph = make_fx(divergence_fn, decomposition_table=table)(*(x.exp() for x in logs), *logs).graph
    except Exception as error:  # tracing fails in many ways; each means that the function is not elementwise
        first = str(error).strip().split("\n")[0]
        raise Untranslatable(f"it cannot be traced ({type(error).__name__}: {first})") from error
    return _Writer(shape).write(graph)


# Templates for float32 arguments. Comparisons give masks.
_FLOATS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "rsub": "{1} - {0}",
    "neg": "-{0}",
    "exp": "exp({0})",
    "exp2": "tl.exp2({0})",
    "expm1": "expm1({0})",
    "log": "tl.log({0})",
    "log2": "tl.log2({0})",
    "log1p": "log1p({0})",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "1.0 / tl.sqrt({0})",
    "reciprocal": "1.0 / {0}",
    "square": "{0} * {0}",
    "tanh": "tanh({0})",
    "sigmoid": "1.0 / (1.0 + exp(-{0}))",
    "relu": "tl.maximum({0}, 0.0, propagate_nan=tl.PropagateNan.ALL)",
    "abs": "tl.abs({0})",
    "sign": "tl.where({0} > 0.0, 1.0, tl.where({0} < 0.0, -1.0, 0.0))",
    "maximum": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "clamp_min": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "clamp_max": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
}
_MASKS = {
    "gt": "{0} > {1}",
    "lt": "{0} < {1}",
    "ge": "{0} >= {1}",
    "le": "{0} <= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "isnan": "{0} != {0}",
}
_LOGIC = {
    "mul": "{0} & {1}",
    "add": "{0} | {1}",
    "logical_and": "{0} & {1}",
    "logical_or": "{0} | {1}",
    "logical_not": "~{0}",
    "bitwise_and": "{0} & {1}",
    "bitwise_or": "{0} | {1}",
    "bitwise_not": "~{0}",
}
_SAME = ("alias", "detach", "clone", "lift_fresh_copy", "_to_copy")


class _Writer:
    """Writes one line of Triton for each operation of a traced graph."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        self._names: dict[fx.Node, str] = {}
        self._coefficients: dict[fx.Node, tuple[float, float]] = {}  # a, b of a node that is a·p + b·q
        self._lines: list[str] = []

    def write(self, graph: fx.Graph) -> tuple[str, float | None]:
        inputs = iter(INPUTS)
        for node in graph.nodes:
            if node.op == "placeholder":
                self._names[node] = next(inputs)
                if self._names[node] in ("p", "q"):
                    self._coefficients[node] = (1.0, 0.0) if self._names[node] == "p" else (0.0, 1.0)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                value, weight = self._outputs(node)
                coefficients = self._coefficients.get(weight)
                body = "\n".join(f"    {line}" for line in self._lines)
                text = f"{_HEADER}{body}\n    return {self._names[value]}, {self._names[weight]}\n"
                return text, None if coefficients is None else sum(coefficients)
            else:
                raise Untranslatable("it holds a tensor of its own")
        raise Untranslatable("it returns nothing")

    def _outputs(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        outputs: Any = node.args[0]
        if not (
            isinstance(outputs, tuple | list) and len(outputs) == 2 and all(isinstance(x, fx.Node) for x in outputs)
        ):
            raise Untranslatable("it does not return two tensors")
        for output in outputs:
            if _meta(output).dtype is not torch.float32 or tuple(_meta(output).shape) != self._shape:
                raise Untranslatable("its results are not float32 of the inputs' shape")
        return outputs[0], outputs[1]

    def _call(self, node: fx.Node) -> None:
        name = str(node.target).removeprefix("aten.").split(".")[0]
        masks = _meta(node).dtype is torch.bool
        if not masks and _meta(node).dtype is not torch.float32:
            raise Untranslatable(f"{node.target} makes {_meta(node).dtype}")
        arguments = list(node.args)
        if name in _SAME:
            text = self._mask(arguments[0]) if masks else self._float(arguments[0])
        elif name in ("full_like", "full", "scalar_tensor", "zeros_like", "ones_like", "zeros", "ones") and not masks:
            text = self._constant(name, arguments)
        elif name == "where" and len(arguments) == 3:
            given = self._mask if masks else self._float
            text = f"tl.where({self._mask(arguments[0])}, {given(arguments[1])}, {given(arguments[2])})"
        elif name == "clamp":
            text = self._clamp(arguments)
        elif name == "pow":
            text = self._power(arguments)
        elif name in _FLOATS and not masks:
            if node.kwargs.get("rounding_mode"):
                raise Untranslatable("it rounds")
            written = [self._float(x) for x in arguments[:2]]
            if "alpha" in node.kwargs and name in ("add", "sub"):
                written[1] = f"{self._float(node.kwargs['alpha'])} * {written[1]}"
            elif node.kwargs or len(arguments) > 2:
                raise Untranslatable(f"it calls {node.target} with options")
            text = _FLOATS[name].format(*written)
        elif name in _MASKS and masks:
            text = _MASKS[name].format(*(self._float(x) for x in arguments))
        elif name in _LOGIC and masks:
            text = _LOGIC[name].format(*(self._mask(x) for x in arguments))
        else:
            raise Untranslatable(f"{node.target} has no counterpart")
        self._names[node] = f"v{len(self._names)}"
        self._lines.append(f"{self._names[node]} = {text}")
        self._record_coefficients(node, name)

    def _float(self, x: Any) -> str:
        if not isinstance(x, fx.Node):
            return _number(x)
        name = self._names[x]
        return f"{name}.to(tl.float32)" if _meta(x).dtype is torch.bool else name

    def _mask(self, x: Any) -> str:
        if not isinstance(x, fx.Node):
            raise Untranslatable("a mask is a number")
        name = self._names[x]
        return name if _meta(x).dtype is torch.bool else f"({name} != 0.0)"

    def _constant(self, name: str, arguments: list[Any]) -> str:
        if name.startswith(("zeros", "ones")):
            number = 0.0 if name.startswith("zeros") else 1.0
        else:
            number = arguments[0] if name == "scalar_tensor" else arguments[1]
        return f"tl.full(p.shape, {_number(number)}, tl.float32)"

    def _clamp(self, arguments: list[Any]) -> str:
        text = self._float(arguments[0])
        for bound, name in zip(arguments[1:], ("clamp_min", "clamp_max"), strict=False):
            if bound is not None:
                text = _FLOATS[name].format(text, self._float(bound))
        return text

    def _power(self, arguments: list[Any]) -> str:
        base, exponent = arguments
        if isinstance(base, int | float) and base > 0:
            return f"exp({self._float(exponent)} * {_number(math.log(base))})"
        if isinstance(exponent, fx.Node) or not isinstance(base, fx.Node):
            raise Untranslatable("an exponent is not a number")
        x = self._float(base)
        if exponent == 0:
            return "tl.full(p.shape, 1.0, tl.float32)"
        if exponent in (0.5, -0.5):
            return f"tl.sqrt({x})" if exponent > 0 else f"1.0 / tl.sqrt({x})"
        if exponent == int(exponent):
            if abs(exponent) > 8:
                raise Untranslatable(f"the power {exponent} is a long product")
            product = " * ".join([x] * abs(int(exponent)))
            return product if exponent > 0 else f"1.0 / ({product})"
        return f"exp({_number(exponent)} * tl.log({x}))"

    def _record_coefficients(self, node: fx.Node, name: str) -> None:
        """Record a and b if the result is a·p + b·q."""
        known = [self._coefficients.get(x) for x in node.args if isinstance(x, fx.Node)]
        numbers: list[Any] = [x for x in node.args if not isinstance(x, fx.Node)]
        if any(x is None for x in known) or node.kwargs:
            return
        if name in ("add", "sub") and len(known) == 2:
            combine = operator.add if name == "add" else operator.sub
            self._coefficients[node] = tuple(map(combine, *known))  # type: ignore[arg-type]
        elif name == "neg" or (name == "mul" and len(known) == len(numbers) == 1):
            (a, b), by = known[0] or (0.0, 0.0), float(numbers[0]) if numbers else -1.0
            self._coefficients[node] = (a * by, b * by)


def _meta(node: fx.Node) -> Tensor:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise Untranslatable(f"{node.target} makes no tensor")
    return value


def _number(x: Any) -> str:
    """A Python number as a Triton literal. Numbers that float32 cannot hold are refused: Triton would use float64."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise Untranslatable(f"{x!r} is not a number")
    x = float(x)
    if math.isinf(x):
        return f"float('{x}')"
    if math.isnan(x) or not (x == 0 or 2.0**-126 <= abs(x) <= 2.0**127):
        raise Untranslatable(f"{x!r} does not fit float32")
    return f"({x!r})" if x < 0 else repr(x)


_HEADER = """import triton
import triton.language as tl

from limbeck.objectives.kernels.fused_kernel import exp, expm1, log1p, tanh


@triton.jit
def divergence_fn(p, q, log_p, log_q):
"""


class _Loader(importlib.abc.InspectLoader):
    """Loads a module from text. Triton gets a function's source from ``inspect``, which gets it from the loader."""

    def __init__(self, text: str, file: str) -> None:
        self._text, self._file = text, file

    def get_source(self, fullname: str) -> str:
        return self._text

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self._text, self._file)


@lru_cache(maxsize=256)
def _load(text: str) -> Any:
    name = f"limbeck.objectives.kernels.formula_{sha256(text.encode()).hexdigest()[:16]}"
    loader = _Loader(text, f"{name}.py")
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader.exec_module(module)
    return module
