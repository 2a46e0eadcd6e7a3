"""Finds the compiled extension and says in words what is wrong with it."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

import torch

from . import __version__


class ExtensionError(RuntimeError):
    """The compiled extension is missing or was built for another version."""


_REFERENCE = (
    "Without it, lookagain_ext.reference computes the same in plain PyTorch, and the environment "
    "variable LOOKAGAIN_BACKEND=reference makes every op use it."
)


@functools.cache
def native() -> ModuleType:
    """The extension module `_C`.

    Raises:
        ExtensionError: if it is not built, cannot be loaded or is of another version.
    """
    try:
        module = importlib.import_module("lookagain_ext._C")
    except ModuleNotFoundError as error:
        raise ExtensionError(
            "lookagain_ext's C++ extension is not built for this Python. Install the package "
            f"with `pip install .` in its repository. {_REFERENCE}"
        ) from error
    except ImportError as error:
        raise ExtensionError(
            f"lookagain_ext's C++ extension is built but cannot be loaded ({error}). Rebuild it "
            f"with `pip install --force-reinstall --no-deps .`. {_REFERENCE}"
        ) from error
    built = module.build_info()["version"]
    if built != __version__:
        raise ExtensionError(
            f"lookagain_ext is version {__version__}, its C++ extension was built for {built}. "
            f"Rebuild it with `pip install --force-reinstall --no-deps .`. {_REFERENCE}"
        )
    return module


@torch.compiler.assume_constant_result
def use_kernels(device_type: str) -> bool:
    """Whether ops on this kind of device run on the extension's kernels, else on the reference.

    LOOKAGAIN_BACKEND is read once for each kind of device. Under `torch.compile` the answer is a
    constant of the compiled code: tracing would follow the import of the extension.
    """
    return _use_kernels(device_type)


@functools.cache
def _use_kernels(device_type: str) -> bool:
    if os.environ.get("LOOKAGAIN_BACKEND") == "reference":
        return False
    if device_type == "cuda" and not build_info()["cuda_archs"]:
        warnings.warn(
            "lookagain_ext was built without CUDA kernels: ops on CUDA tensors run on the plain "
            "PyTorch reference, which is slow. Install it again with nvcc on the path "
            "(`pip install --force-reinstall --no-deps "
            "--config-settings cmake.define.LOOKAGAIN_CUDA=ON .`).",
            stacklevel=4,
        )
        return False
    return device_type in ("cpu", "cuda")


def build_info() -> dict[str, object]:
    """What the extension was built with and what it uses here.

    Returns:
        A dict with `version`, `isa` (the instruction set in use), `isas` (those compiled),
        `cuda_archs` (empty when built without CUDA), `threading` and `compiler`.

    Raises:
        ExtensionError: if the extension is missing or of another version.
    """
    return dict(native().build_info())
