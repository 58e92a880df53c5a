"""Loads the pretended GPU before torch, and tells torch of it after; every Python that `run.py` starts imports this."""

import ctypes
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


class TorchLoader(Loader):
    """Loads torch between the two."""

    def __init__(self, spec: ModuleSpec) -> None:
        assert spec.loader is not None and spec.origin is not None
        self.loader, self.libraries = spec.loader, Path(spec.origin).parent / "lib"

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        names = self.libraries / "libtorch_global_deps.so", self.libraries / "libtorch_cpu.so"
        for name in (*names, os.environ["PRETEND_GPU"]):
            ctypes.CDLL(str(name), ctypes.RTLD_GLOBAL)
        self.loader.exec_module(module)
        import pretended

        pretended.install()


class TorchFinder(MetaPathFinder):
    """Finds torch, once."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name)
        if spec is not None:
            spec.loader = TorchLoader(spec)
        return spec


hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""  # as a real one would be
has_its_own = any(argument.endswith("fake_gpu/worker.py") for argument in sys.orig_argv)
if not hidden and not has_its_own:
    sys.meta_path.insert(0, TorchFinder())
