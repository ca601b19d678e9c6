"""Lies in the archive's root, which TorchServe puts on a worker's path: Python runs it before anything else.

TorchServe 0.12 imports torch in every worker, to tell a tensor from other answers; ours are bytes. With this, torch is
loaded when something of it is used, which the ONNX runtimes never do. docs/performance.md has what that saves.
"""

import importlib.util
import sys
from types import ModuleType

NAME = "torch"


class LoadedOnUse(ModuleType):
    """Stands in for a module until an attribute of it is asked for; passes each on."""

    def __getattr__(self, name: str):
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


stand_in = LoadedOnUse(NAME)
stand_in.__spec__ = importlib.util.find_spec(NAME)
if stand_in.__spec__:
    sys.modules[NAME] = stand_in
