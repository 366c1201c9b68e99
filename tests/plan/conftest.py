"""The tiny models and files of the pipeline's tests."""

from pipeline.conftest import assets, configure, settings

__all__ = ["assets", "configure", "settings"]
