"""Configuration: the schema, the dialects, and the loading of files, dictionaries and arguments."""

from limbeck.config.explain import render_config, render_schema, to_dict
from limbeck.config.load import LauncherSetting, LoadedConfig, load_arguments, load_config, load_mapping
from limbeck.config.schema import DistillConfig

__all__ = [
    "DistillConfig",
    "LauncherSetting",
    "LoadedConfig",
    "load_arguments",
    "load_config",
    "load_mapping",
    "render_config",
    "render_schema",
    "to_dict",
]
