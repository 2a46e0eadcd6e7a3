"""A file of finished work that survives a kill at any moment: one JSON object a line."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any


class Journal:
    """What is finished, by number; a line is there whole or not at all, and each number once.

    The first line says what the work is; going on with other work is refused. A line that a kill
    cut short is dropped: its work was not finished. While it is open, no other process can open it.

    Args:
        path: of the file; made if there is none.
        about: what the work is, as JSON can hold it.

    Raises:
        ValueError: the file holds other work, is damaged other than at its end, or is in use.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.done: dict[int, dict[str, Any]] = {}
        about = json.loads(json.dumps(about))
        self._file = open(path, "a+b")  # noqa: SIM115 - closed by close()
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"{path} is in use by another process") from None
            lines = self._whole_lines()
            if not lines:
                self._append([about])
            elif lines[0] != about:
                raise ValueError(f"{path} holds other work: {_difference(lines[0], about)}")
            for line in lines[1:]:
                self.done[line["number"]] = line
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        """The journal itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the file; another process may open it then."""
        self._file.close()

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Write finished work to the disk; each entry has its ``number``.

        Raises:
            ValueError: a number is finished already.
        """
        entries = list(entries)
        for entry in entries:
            if entry["number"] in self.done:
                raise ValueError(f"number {entry['number']} is finished already")
            self.done[entry["number"]] = entry
        self._append(entries)

    def _append(self, lines: list[dict[str, Any]]) -> None:
        text = "".join(f"{json.dumps(line, ensure_ascii=True)}\n" for line in lines)
        self._file.write(text.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _whole_lines(self) -> list[dict[str, Any]]:
        """The lines that end; what comes after the last end is cut off."""
        self._file.seek(0)
        data = self._file.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            self._file.truncate(end)
        lines = []
        for number, line in enumerate(data[:end].splitlines(), 1):
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number}, is damaged ({error})") from error
        return lines


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The finished work in a journal's file, which may be in use; half a last line is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines[1:] if line.endswith("\n")]


def _difference(there: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first thing in which two descriptions of work differ, in words."""
    for name in (*wanted, *there):
        if there.get(name) != wanted.get(name):
            return f"{name} is {there.get(name)!r} there and {wanted.get(name)!r} here"
    return "nothing differs"
