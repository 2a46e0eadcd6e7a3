"""Vision-language models that look at the picture again while they reason."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import ops, reference
    from ._native import ExtensionError, build_info
    from .attention import RoutedAttention
    from .cache import LookAgainCache
    from .config import LookAgainConfig
    from .doctor import DoctorReport, doctor
    from .generation import LookAgainSession, look_again
    from .models.loading import load
    from .tokens import add_reflection_tokens
    from .trace import Reflection, Trace
    from .visual import NEVER, VisualContext

__all__ = [
    "NEVER",
    "DoctorReport",
    "ExtensionError",
    "LookAgainCache",
    "LookAgainConfig",
    "LookAgainSession",
    "Reflection",
    "RoutedAttention",
    "Trace",
    "VisualContext",
    "add_reflection_tokens",
    "build_info",
    "doctor",
    "load",
    "look_again",
    "ops",
    "reference",
]

# Public name -> the submodule that holds it; None: the name is itself a submodule. They load at
# first use, so that `import lookagain_ext` and `lookagain --help` do not wait for torch.
_HOMES: dict[str, str | None] = {
    "ops": None,
    "reference": None,
    "ExtensionError": "_native",
    "build_info": "_native",
    "RoutedAttention": "attention",
    "LookAgainCache": "cache",
    "LookAgainConfig": "config",
    "DoctorReport": "doctor",
    "doctor": "doctor",
    "LookAgainSession": "generation",
    "look_again": "generation",
    "load": "models.loading",
    "add_reflection_tokens": "tokens",
    "Reflection": "trace",
    "Trace": "trace",
    "NEVER": "visual",
    "VisualContext": "visual",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    module = import_module(f".{home or name}", __name__)
    value = module if home is None else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `lookagain_ext.doctor` the function when the submodule of that name is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if _HOMES.get(name) == name and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
