"""Mistakes a person can make, told in one line with a hint."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

EXIT_CODE = 2


class UserError(Exception):
    """Something the person at the keyboard can put right.

    Args:
        message: what is wrong, without a full stop.
        hint: what to do about it, a sentence.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(" ".join(message.split()))
        self.hint = " ".join(hint.split())

    def __str__(self) -> str:
        """The line that is printed."""
        message = str(self.args[0]).rstrip(".")
        return f"error: {message}. {self.hint}".rstrip()


def tells_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Print a `UserError`, or a missing extension, as one line on stderr and exit with 2."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except UserError as error:
            line = str(error)
        except RuntimeError as error:
            if type(error).__name__ != "ExtensionError":
                raise
            line = f"error: {error}"
        except BrokenPipeError:  # the reader, `head` say, has had enough
            sys.stderr.close()
            raise SystemExit(0) from None
        print(line, file=sys.stderr)
        raise SystemExit(EXIT_CODE)

    return wrapper
