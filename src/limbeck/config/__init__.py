"""Configuration: the schema, the loading of YAML files with overrides, and the explanation of both."""

from limbeck.config.compose import LoadedConfig, load_config, load_mapping
from limbeck.config.explain import render_config, render_schema, to_dict
from limbeck.config.schema import DistillConfig

__all__ = [
    "DistillConfig",
    "LoadedConfig",
    "load_config",
    "load_mapping",
    "render_config",
    "render_schema",
    "to_dict",
]
