"""Freezes parameters by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from limbeck.errors import LimbeckError


def freeze(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Sets ``requires_grad`` to False for every parameter whose name starts with one of ``prefixes``.

    Raises LimbeckError if a prefix matches no parameter, or no parameter is left to train.
    """
    names = dict(model.named_parameters())
    for prefix in prefixes:
        hit = [name for name in names if name.startswith(prefix)]
        if not hit:
            raise LimbeckError(
                f"student.model_args.freeze_module_prefix: no parameter begins with {prefix!r}; "
                f"names look like {', '.join(list(names)[:3])}."
            )
        for name in hit:
            names[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise LimbeckError("student.model_args.freeze_module_prefix freezes every parameter; leave some to train.")
