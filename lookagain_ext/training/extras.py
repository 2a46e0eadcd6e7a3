"""A clear word when the packages of the extra `train` are not installed."""

from __future__ import annotations


def missing_extra(module: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error for a module that needs the extra `train`, naming the package that is missing."""
    return ModuleNotFoundError(
        f"{module} needs {error.name}, which is not installed: pip install 'lookagain_ext[train]'",
        name=error.name,
    )
