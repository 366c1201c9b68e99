"""One bar at a time: the libraries' own progress bars would write over ours."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Switch off the progress bars of transformers and the hub client; their warnings stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()
