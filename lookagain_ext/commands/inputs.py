"""What a person hands over, checked before any model is loaded."""

from __future__ import annotations

import difflib
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.processing_utils import ProcessorMixin

STRATEGIES = ("copy", "route", "off")
TINY = "lookagain-tiny"
_QUESTION_HINT = "Put the question in quotes after the picture."


def read_picture(path: Path) -> Image.Image:
    """The picture in a file, turned as its camera says.

    Raises:
        UserError: there is no such file, or it holds no picture that can be read.
    """
    try:
        kind = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        hint = f"The command runs in {Path.cwd()}."
        raise UserError(f"there is no file {path}", hint) from None
    except OSError as error:  # a name too long, a folder above it that may not be entered
        raise UserError(f"{path} may not be read ({error.strerror})") from None
    if stat.S_ISDIR(kind):
        raise UserError(f"{path} is a folder", "Give one picture in it.")
    if not stat.S_ISREG(kind):  # reading from a pipe or a device may never end
        raise UserError(f"{path} is no file", "Write the picture to a file first.")
    try:
        with Image.open(path) as opened:
            opened.load()
            return ImageOps.exif_transpose(opened)
    except UnidentifiedImageError:
        hint = "PNG, JPEG, WebP, GIF, BMP and TIFF files can be read."
        raise UserError(f"{path} is not a picture", hint) from None
    except PermissionError:
        raise UserError(f"{path} may not be read", "Check its permissions.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture ({error})") from None


def check_question(question: str) -> str:
    """The question, stripped; an empty one or one that is no text is refused."""
    if not question.strip():
        raise UserError("the question is empty", _QUESTION_HINT)
    try:
        question.encode()
    except UnicodeEncodeError as error:  # Python's stand-ins for bytes that are no characters
        wrong = f"the question is not UTF-8 text, from character {error.start + 1} on"
        raise UserError(wrong, "Check the encoding of the terminal or of the script.") from None
    return question.strip()


def check_strategy(strategy: str) -> str:
    """The strategy's name; a wrong one is refused with the nearest right one."""
    if strategy in STRATEGIES:
        return strategy
    near = difflib.get_close_matches(strategy.lower(), STRATEGIES, n=1)
    hint = f"Did you mean {near[0]}?" if near else ""
    raise UserError(f"--strategy must be copy, route or off, got {strategy!r}", hint)


def check_ratio(ratio: float) -> float:
    """The share of visual tokens that ROUTE shows again."""
    if 0 <= ratio <= 1:
        return ratio
    hint = f"For {ratio:g} % say --ratio {ratio / 100:g}." if 1 < ratio <= 100 else ""
    raise UserError(f"--ratio must be between 0 and 1, got {ratio:g}", hint)


def check_temperature(temperature: float) -> float:
    """0 for the likeliest token, above 0 to sample."""
    if 0 <= temperature < float("inf"):
        return temperature
    raise UserError(
        f"--temperature must be 0 or more, got {temperature:g}", "0 takes the likeliest token."
    )


def check_folder(folder: Path) -> Path:
    """A folder that can be written to; it is made if need be.

    Raises:
        UserError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        hint = "Name another folder with --out."
        reason = error.strerror or str(error)
        raise UserError(f"cannot write to {folder} ({reason})", hint) from None


def check_file(path: Path) -> Path:
    """A file that can be written; its folder is made if need be."""
    if path.is_dir():
        raise UserError(f"{path} is a folder", "Name a file in it.")
    check_folder(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"{path} may not be written", "Name another file.")
    return path


def load_model(name: str, device: str | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model and the processor behind `--model`.

    Args:
        name: the small model, a folder, or a name on the hub.
        device: where to; None takes a GPU for other models than the small one, if there is one.

    Raises:
        UserError: there is no such model, it takes no pictures, or there is no such device.
    """
    import torch

    from ..models.loading import load

    if device is None and name != TINY and torch.cuda.is_available():
        device = "cuda"
    where = None if device is None else check_device(device)
    try:
        return load(name, device=where)
    except RuntimeError as error:  # no room on the device, weights of other sizes
        raise UserError(f"cannot load {name}: {_first_sentence(error)}") from error
    except Exception as error:  # the readers of damaged files raise errors of many types
        reason = _first_sentence(error)
        if name not in reason:
            reason = f"cannot load {name}: {reason}"
        hint = f"--model takes {TINY}, a folder with a Qwen-VL model, or its name on the hub."
        raise UserError(reason, hint) from error


def check_device(name: str) -> torch.device:
    """A device that tensors can be put on.

    Raises:
        UserError: torch does not know it, cannot use it here, or it holds no values.
    """
    import torch

    hint = "cpu is always there; without --device a GPU is taken for large models, if there is one."
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # each back end has its own: AssertionError, ImportError, ...
        reason = _first_sentence(error)
        raise UserError(f"--device {name!r} cannot be used here ({reason})", hint) from None
    if device.type == "meta":
        raise UserError("--device meta holds no values to compute with", hint)
    return device


def reflection_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The number of `<REFLECTION>` as one token, or None when the tokenizer has no such token."""
    from ..template import REFLECTION

    return tokenizer.get_vocab().get(REFLECTION)


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0][:300]
