"""An empty stand-in for mosaicml-streaming where it is not installed; imported before `train`.

The benchmarks draw their batches at random and never touch the loader, which train.py imports.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any


class EmptyModule(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds streaming and all its parts."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] == "streaming":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return EmptyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


if importlib.util.find_spec("streaming") is None:
    sys.meta_path.append(StandIn())
