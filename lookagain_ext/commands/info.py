"""`lookagain info`: what is installed, what the kernels use."""

from __future__ import annotations

import platform
from importlib import metadata

from rich.console import Console
from rich.table import Table

from .. import __version__


def run() -> None:
    """Print a table; a missing extension is part of the news, not an error."""
    import torch

    from .._native import ExtensionError, build_info

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("lookagain_ext", __version__)
    try:
        build = build_info()
    except ExtensionError as error:
        table.add_row("extension", str(error))
    else:
        archs = ", ".join(map(str, build["cuda_archs"])) or "built without CUDA kernels"
        table.add_row("instruction set", f"{build['isa']} (compiled: {', '.join(build['isas'])})")
        table.add_row("CUDA architectures", archs)
        table.add_row("threading", str(build["threading"]))
        table.add_row("compiler", str(build["compiler"]))
    table.add_row("threads", str(torch.get_num_threads()))
    table.add_row("GPU", _gpu(torch))
    table.add_row("torch", torch.__version__)
    for package in ("transformers", "numpy"):
        table.add_row(package, metadata.version(package))
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    Console(highlight=False).print(table)


def _gpu(torch: object) -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
