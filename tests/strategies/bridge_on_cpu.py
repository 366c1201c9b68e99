"""A plug-in for tests, after ``megatron_on_cpu``: lets Megatron-Bridge be imported without Transformer Engine.

Every name in Transformer Engine is a mock while Bridge is imported, and Megatron's own modules are imported before.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

from megatron.core import utils
from packaging.version import Version

from limbeck.strategies.megatron.core import import_megatron


class Mocks(MetaPathFinder, Loader):
    def find_spec(self, name, path, target=None):
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "transformer_engine" else None

    def create_module(self, spec):
        return MagicMock(__path__=[], __spec__=spec, __name__=spec.name)

    def exec_module(self, module): ...


def install() -> None:
    import_megatron()
    finder, before = Mocks(), utils._te_version
    utils._te_version = Version("2.2.0")
    sys.meta_path.append(finder)
    try:
        import megatron.bridge  # noqa: F401
    finally:
        sys.meta_path.remove(finder)
        utils._te_version = before
        for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
            del sys.modules[name]


install()
