"""Reads YAML text with the numbers of YAML 1.2, as OmegaConf reads Limbeck's own files."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """PyYAML alone takes ``1e-5`` and ``1.0e5`` for text, since YAML 1.1 wants a dot and a sign in such numbers."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load_yaml(text: str) -> Any:
    """The value that ``text`` holds. Raises yaml.YAMLError if it is not YAML."""
    return yaml.load(text, Loader=_Loader)
