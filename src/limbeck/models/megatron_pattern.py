"""Megatron-LM's patterns of layers, such as ``([0]+[1]*3)*2`` of ``--moe-layer-freq``.

Megatron-LM evaluates them as Python. Here only lists of whole numbers, ``+`` and ``*`` are read.
"""

from __future__ import annotations

import ast
import operator

_MOST = 2**16
"""Entries of a list, so that a typing mistake such as ``[1]*10000000000`` does not fill the memory."""


def layer_pattern(text: str) -> list[int]:
    """The list that ``text`` describes. Raises ValueError if it is another expression."""
    try:
        found = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(text) from error
    if not isinstance(found, list):
        raise ValueError(text)
    return found


def _value(node: ast.expr) -> int | list[int]:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        entries = [_value(entry) for entry in node.elts]
        if all(isinstance(entry, int) for entry in entries):
            return entries  # type: ignore[return-value]
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
        left, right = _value(node.left), _value(node.right)
        lists = [value for value in (left, right) if isinstance(value, list)]
        factor = next((value for value in (left, right) if isinstance(value, int)), 1)
        if isinstance(node.op, ast.Add) and len(lists) != 1:
            return operator.add(left, right)
        if isinstance(node.op, ast.Mult) and len(lists) < 2 and sum(map(len, lists)) * factor <= _MOST:
            return operator.mul(left, right)
    raise ValueError(f"{ast.unparse(node)} is neither a list of whole numbers nor a sum or a multiple of such lists")
