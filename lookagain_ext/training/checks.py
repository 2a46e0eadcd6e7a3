"""What can be wrong in a configuration, found before anything is loaded: names, types, files."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

__all__ = ["check_data", "check_entries", "check_names", "check_run", "is_number", "is_whole"]

_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "names and values",
    type(None): "null",
}
DATA_FILES = (".json", ".jsonl", ".parquet")


def is_whole(value: object, least: int) -> bool:
    """Whether it is a whole number that is not below `least`; True and False are none."""
    return type(value) is int and value >= least


def is_number(value: object) -> bool:
    """Whether it is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_names(where: str, given: Iterable[Any], known: Iterable[str]) -> None:
    """Refuse names that are not known.

    Raises:
        ValueError: with the unknown name, and the known one that it is like, if there is one.
    """
    known = sorted(known)
    for name in given:
        if name not in known:
            like = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {like[0]}?" if like else f"known are: {', '.join(known)}"
            if not like and len(known) > 20:
                hint = "see its documentation"
            raise ValueError(f"{where} has no entry {name}; {hint}")


def check_entries(where: str, made: type, given: dict[str, Any]) -> None:
    """Refuse unknown fields of a dataclass, and values of another type than the field's.

    Args:
        where: what the error begins with.
        made: the dataclass that is to be made.
        given: its fields.

    Raises:
        ValueError: with the field's name, what it takes and what came.
    """
    known = {one.name for one in dataclasses.fields(made) if one.init}
    check_names(where, given, known)
    hints = typing.get_type_hints(made)
    for name, value in given.items():
        if not _fits(value, hints[name]):
            hint = ""
            if isinstance(value, str) and _is_written_number(value):
                hint = "; write it without quotes"
            wanted = " or ".join(dict.fromkeys(_words(hints[name])))
            raise ValueError(f"{where}: {name} must be {wanted}, got {value!r}{hint}")


def _parts(hint: Any) -> tuple[Any, ...]:  # noqa: ANN401 - a type
    """Those of a union, or the type itself."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _fits(value: object, hint: Any) -> bool:  # noqa: ANN401 - a type
    return any(_fits_one(value, one) for one in _parts(hint))


def _fits_one(value: object, hint: Any) -> bool:  # noqa: ANN401 - a type
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return isinstance(value, str) or value in typing.get_args(hint)
    hint = origin or hint
    if not isinstance(hint, type):
        return True
    if hint in (int, float):
        return is_number(value) and (hint is float or isinstance(value, int))
    if issubclass(hint, Enum):
        return isinstance(value, str | Enum)
    if hint in (list, tuple):
        return isinstance(value, list | tuple)
    return isinstance(value, hint) or (hint not in _WORDS and isinstance(value, dict))


def _words(hint: Any) -> Iterable[str]:  # noqa: ANN401 - a type
    for one in _parts(hint):
        one = typing.get_origin(one) or one
        is_text = one is typing.Literal or (isinstance(one, type) and issubclass(one, Enum))
        yield _WORDS[str] if is_text else _WORDS.get(one, _WORDS[dict])


def _is_written_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def check_data(data: dict[str, Any]) -> None:
    """Refuse a path that names a file which is not there.

    Args:
        data: as in `RunConfig`.

    Raises:
        ValueError: if there is no such file.
    """
    path = str(data.get("path", ""))
    if Path(path).suffix in DATA_FILES and not Path(path).is_file():
        raise ValueError(f"data: there is no file {path}")


def check_run(kind: str, trainer: dict[str, Any], lora: dict[str, Any] | None) -> None:
    """Refuse what the trainer's and PEFT's settings do not know. Needs the extra `train`.

    Args:
        kind: "brpo" or "sft".
        trainer: fields of its settings.
        lora: fields of a LoraConfig, or None.

    Raises:
        ValueError: if one is unknown or of the wrong type, by name.
    """
    from .brpo import BRPOConfig
    from .looking import read_look_again
    from .trl_sft import LookAgainSFTConfig

    made = BRPOConfig if kind == "brpo" else LookAgainSFTConfig
    plain = {name: value for name, value in trainer.items() if name != "look_again"}
    check_entries("trainer", made, plain)
    try:
        read_look_again(trainer.get("look_again"))
    except TypeError as error:
        raise ValueError(f"trainer: {error}") from error
    if lora is not None:
        from peft import LoraConfig

        tags = lora.get("trainable_token_indices") == "tags"
        named = {k: v for k, v in lora.items() if not (tags and k == "trainable_token_indices")}
        check_entries("lora", LoraConfig, named)
