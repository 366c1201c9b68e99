"""The version of this package. It is here, and not only in its metadata, because a checkout on PYTHONPATH has none."""

VERSION = "0.1.0"
