"""Reads `device_mapping`: which devices a role runs on, written as a YAML list or as a small Python-like expression.

The expression is parsed into a syntax tree in which only whole numbers, lists, `range`, `list` and `+` are understood;
nothing is ever executed. What a device is, and whether it exists, is not known here.
"""

from __future__ import annotations

import ast
import warnings

MAX_DEVICES = 65_536
FORMS = "[0, 1], list(range(0, 8)), range(8) or 0,1,2"


def parse_device_mapping(value: object) -> list[int] | None:
    """The device numbers that `value` names, in its order; None stays None. Raises ValueError with a sentence."""
    if value is None:
        return None
    if isinstance(value, str):
        devices = _parse_expression(value)
    elif isinstance(value, (list, tuple, range)):
        devices = list(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(_single_number(value))
    else:
        raise ValueError(f"is not a list of device numbers; write {FORMS}")
    if not devices:
        raise ValueError("names no device; leave the key out to let the launcher choose")
    for device in devices:
        if not isinstance(device, int) or isinstance(device, bool) or device < 0:
            raise ValueError(f"holds {device!r}, which is not a device number (0, 1, 2, ...)")
    if len(set(devices)) != len(devices):
        raise ValueError("names a device twice")
    return devices


def _single_number(number: int) -> str:
    return (
        f"is one number, which could mean the device {number} or {number} devices; "
        f"write [{number}] or list(range(0, {number}))"
    )


def _parse_expression(text: str) -> list[int]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `0or 1` is refused below; Python would print a warning first
            tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"cannot be read as a list of device numbers; write {FORMS}") from None
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        raise ValueError(_single_number(tree.value))
    return _devices(tree)


def _devices(node: ast.expr) -> list[int]:
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_number(element) for element in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _devices(node.left) + _devices(node.right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id == "list" and len(node.args) == 1:
            return _devices(node.args[0])
        if node.func.id == "range" and 1 <= len(node.args) <= 3:
            devices = range(*(_number(argument) for argument in node.args))
            if len(devices) > MAX_DEVICES:
                raise ValueError(f"names {len(devices)} devices; at most {MAX_DEVICES} are understood")
            return list(devices)
    raise ValueError(f"holds {ast.unparse(node)!r}, which is not a list of device numbers; write {FORMS}")


def _number(node: ast.expr) -> int:
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, node = -1, node.operand
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return sign * node.value
    raise ValueError(f"holds {ast.unparse(node)!r}, which is not a whole number; write {FORMS}")
