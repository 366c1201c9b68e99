"""The files that a configuration names, and a check that they exist.

Light to import, because the process that only starts the ranks of a run uses the check too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from limbeck.config import DistillConfig
from limbeck.config.schema import SourceArgs, WorkerConfig, sources_of_name
from limbeck.data.sources import Source, expand
from limbeck.errors import LimbeckError
from limbeck.folders import check_folder


def training_sources(config: DistillConfig) -> list[Source]:
    """What the student learns from."""
    return [_source(config, entry) for entry in config.data_sources]


def validation_sources(config: DistillConfig) -> list[Source]:
    """What the student is measured on."""
    return [_source(config, entry) for entry in config.validation_sources]


def _source(config: DistillConfig, entry: SourceArgs) -> Source:
    return Source(
        path=tuple(entry.path or ()),
        hub=entry.hub,
        config=entry.config,
        split=entry.split,
        revision=entry.revision,
        format=entry.format or config.student.data_args.format,
        domain=entry.domain,
        question_key=entry.question_key,
        answer_key=entry.answer_key,
        concatenate=entry.concatenate,
        documents=entry.documents,
        mock=entry.mock,
    )


def named_sources(config: DistillConfig, name: str) -> list[Source]:
    """The sources of one name in ``file_name``, with the rows of the configuration."""
    return [_source(config, entry) for entry in sources_of_name(name)]


def missing_files(config: DistillConfig) -> list[str]:
    """A sentence for every file or folder on this machine that a run needs and that is missing; does not look on the
    hub.
    """
    looks: list[Callable[[], object]] = [
        *(
            partial(check_folder, worker.model_args.model_name_or_path, role, "config.json")
            for role, worker in _models(config)
        ),
        *(
            partial(expand, source.path)
            for source in [*training_sources(config), *validation_sources(config)]
            if source.path
        ),
    ]
    missing = []
    for look in looks:
        try:
            look()
        except LimbeckError as error:
            missing.append(str(error))
    return missing


def refuse_missing_files(config: DistillConfig) -> None:
    """Raise LimbeckError with all of them, one on a line."""
    if missing := missing_files(config):
        raise LimbeckError("\n".join(missing))


def _models(config: DistillConfig) -> list[tuple[str, WorkerConfig]]:
    roles: list[tuple[str, WorkerConfig]] = [("student", config.student)]
    return [*roles, ("teacher", config.teacher)] if config.has_teacher and config.teacher.service is None else roles
