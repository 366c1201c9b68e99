"""The base class of the schema's sections, and the types that several sections use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from limbeck.config.device_mapping import parse_device_mapping
from limbeck.registry import Registry

Dtype = Literal["fp32", "bf16", "fp16"]

Devices = Annotated[list[int] | None, BeforeValidator(parse_device_mapping)]
"""Device numbers: a list, or an expression such as ``list(range(0, 8))``."""


@dataclass(frozen=True)
class Contradiction:
    """An error about one key: its dotted path, and the rest of the sentence ("needs a teacher; set ...")."""

    path: str
    sentence: str


class ContradictionError(ValueError):
    """All contradictions of one configuration, so that they are reported together."""

    def __init__(self, contradictions: list[Contradiction]) -> None:
        super().__init__("; ".join(f"{found.path} {found.sentence}" for found in contradictions))
        self.contradictions = tuple(contradictions)


class Section(BaseModel):
    """A block of keys. Unknown keys, infinite numbers and NaN are errors; values are frozen."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        validate_default=False,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _normalise_yaml_value(cls, value: object, info: ValidationInfo) -> object:
        annotation = cls.model_fields[str(info.field_name)].annotation
        is_section = isinstance(annotation, type) and issubclass(annotation, Section)
        if value is None and (is_section or get_origin(annotation) is dict):
            return {}  # `strategy_config: ~`, or a key with nothing after its colon
        # Python counts True as 1, so `learning_rate: true` would otherwise train with a rate of 1.
        if isinstance(value, bool) and annotation is not bool and bool not in get_args(annotation):
            raise ValueError("is true or false, which this key does not accept")
        return value


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field of this type holds, or None if it holds a value."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def walk_keys(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that holds a value, by its dotted path, in the order of the schema."""
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is None:
            yield f"{prefix}{name}", field
        else:
            yield from walk_keys(inner, f"{prefix}{name}.")


def registered(registry: Registry[Any], *also: str) -> AfterValidator:
    """A validator for a name, or a list of names, that must be in ``registry`` or in ``also``."""

    def check(given: str | list[str]) -> str | list[str]:
        for name in [given] if isinstance(given, str) else given:
            if name not in registry and name not in also:
                which = "" if isinstance(given, str) else f"has {name}, which "
                raise ValueError(which + registry.explain_unknown(name))
        return given

    return AfterValidator(check)


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _comma_list(value: object) -> object:
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    return value


def _environment_text(value: object) -> object:
    if not isinstance(value, dict):
        return value
    # The number 0 can only mean "0"; true could mean "true" or "1", so it must be written as text.
    return {
        str(name): str(text) if isinstance(text, (int, float)) and not isinstance(text, bool) else text
        for name, text in value.items()
    }


Files = Annotated[list[str], BeforeValidator(_one_or_many)]
CommaList = Annotated[str, BeforeValidator(_comma_list)]
Environment = Annotated[dict[str, str], BeforeValidator(_environment_text)]
