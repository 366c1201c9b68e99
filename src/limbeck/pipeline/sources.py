"""The data that a configuration names. Light to import: whoever only starts processes looks here whether it is there."""

from __future__ import annotations

from dataclasses import replace

from limbeck.config import DistillConfig
from limbeck.data.sources import Source, expand


def training_sources(config: DistillConfig) -> list[Source]:
    """What the student learns from."""
    return [
        Source(
            path=tuple(entry.path or ()),
            hub=entry.hub,
            config=entry.config,
            split=entry.split,
            revision=entry.revision,
            format=entry.format or config.student.data_args.format,
            domain=entry.domain,
        )
        for entry in config.data_sources
    ]


def named_source(config: DistillConfig, name: str) -> Source:
    """A source that is only named, with the rows of the configuration."""
    return replace(Source.named(name), format=config.student.data_args.format)


def validation_sources(config: DistillConfig) -> list[Source]:
    """What the student is measured on."""
    return [named_source(config, name) for name in config.validation_files]


def refuse_missing_files(config: DistillConfig) -> None:
    """Raise LimbeckError for a data file that is not there or cannot be read; what is on the hub is not looked for."""
    for source in [*training_sources(config), *validation_sources(config)]:
        if source.hub is None:
            expand(source.path)
