"""``student.model_args.unfrozen_parameters`` as the name of a file in the format of Spectrum."""

from __future__ import annotations

from pathlib import Path

from limbeck.config.dialects.files import read_mapping
from limbeck.config.locations import SourceLocation
from limbeck.config.translation import Translation
from limbeck.errors import LimbeckError

KEY = "student.model_args.unfrozen_parameters"


def read(translation: Translation, locations: dict[str, SourceLocation]) -> None:
    """Replace the name of a file by its entries.

    Raises:
        LimbeckError: if the file cannot be read, or has no list ``unfrozen_parameters``.
    """
    given = translation.get(KEY)
    if not isinstance(given, str):
        return
    origin = translation.derived.get(KEY, KEY)
    entries = read_mapping(Path(given), f"{origin}:", {}).get("unfrozen_parameters")
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise LimbeckError(
            f"{origin}: {given} has no list unfrozen_parameters; write the names of parameters below that key."
        )
    translation.put(KEY, entries, origin)
    if origin == KEY:
        del translation.derived[KEY]
