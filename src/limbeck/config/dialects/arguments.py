"""What the dialects of command lines share: a parser, and Limbeck's keys among the arguments."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from typing import Any, NoReturn

import yaml

from limbeck.config.yaml_values import load_yaml
from limbeck.errors import LimbeckError


class Parser(argparse.ArgumentParser):
    """Raises LimbeckError for mistakes. Flags that are not given are not in the result."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **options)

    def error(self, message: str) -> NoReturn:
        raise LimbeckError(f"{message}; --help lists the flags.")

    def refuse_unknown(self, words: Iterable[str], flags: Iterable[str]) -> None:
        """Raise LimbeckError for the first of ``words`` that begins with a dash, with the nearest of ``flags``."""
        for word in words:
            if word.startswith("-"):
                name = word.partition("=")[0]
                known = [flag.lstrip("-") for flag in flags]
                # Flags with many words in common, such as --moe-layer-freq and --moe-layer-recompute, are no typing mistakes.
                near = difflib.get_close_matches(name.lstrip("-"), known, n=1, cutoff=0.75)
                self.error(f"{name} is not a flag{f', did you mean --{near[0]}?' if near else ''}")


def override(word: str) -> tuple[str, Any]:
    """The key and the value of ``key=value``. Raises LimbeckError for another word."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise LimbeckError(
            f"{word} is neither a flag nor a setting; write --flag VALUE, or key=value for a key of Limbeck."
        )
    try:
        return key, load_yaml(text)
    except yaml.YAMLError:
        return key, text
