"""Pictures of training records: from files, bytes or PIL, no larger than the paper's."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ..synthetic.processor import to_rgb

BRPO_SIZE = (640, 480)
"""Largest picture in BRPO (Chu et al., arXiv 2505.23558): the longer and the shorter side."""
SFT_PIXELS = 262144
"""Most pixels of a picture in supervised fine-tuning: at most 334 visual tokens of Qwen2.5-VL."""


def read_image(value: Any, root: str | Path | None = None) -> Image.Image:  # noqa: ANN401
    """A picture as 8-bit RGB, turned as its camera says.

    Args:
        value: a file's path, the file's bytes, a PIL image, or a dict with "bytes" or "path" as
            ``datasets`` stores pictures.
        root: folder that relative paths start from; None: the working directory.

    Raises:
        ValueError: there is no such file, or it holds no picture.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Image.Image):
        return to_rgb(ImageOps.exif_transpose(value))
    if isinstance(value, str | Path) and value:
        path = Path(root or ".") / value
        if not path.is_file():
            raise ValueError(f"there is no picture {path}")
        name, source = str(path), path
    elif isinstance(value, bytes | bytearray):
        name, source = f"{len(value)} bytes", io.BytesIO(value)
    else:
        raise ValueError(
            f"a picture must be a path, bytes or a PIL image, got {type(value).__name__}"
        )
    try:
        with Image.open(source) as opened:
            return to_rgb(ImageOps.exif_transpose(opened))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as a picture ({error})") from error


def fit_image(
    image: Image.Image,
    max_size: tuple[int, int] | None = None,
    max_pixels: int | None = None,
) -> Image.Image:
    """``image``, made smaller where it is too large; its proportions stay, and it never grows.

    Args:
        image: any picture.
        max_size: the longest longer side and the longest shorter side. The paper says "640x480"
            and not which way round; upright pictures may be 480x640 here.
        max_pixels: the largest area.

    Raises:
        ValueError: a limit below 1.
    """
    limits = (*(max_size or ()), *(() if max_pixels is None else (max_pixels,)))
    if any(limit < 1 for limit in limits):
        raise ValueError(f"limits must be at least 1, got {max_size} and {max_pixels}")
    scale = 1.0
    if max_size is not None:
        long, short = max(max_size), min(max_size)
        scale = min(scale, long / max(image.size), short / min(image.size))
    if max_pixels is not None:
        scale = min(scale, math.sqrt(max_pixels / (image.width * image.height)))
    if scale == 1.0:
        return image
    size = tuple(max(1, math.floor(side * scale + 1e-6)) for side in image.size)
    return image.resize(size, Image.Resampling.BICUBIC)
