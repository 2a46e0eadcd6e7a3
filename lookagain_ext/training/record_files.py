"""Records with their answers as files, to be read by ``load_records(file, "llava-cot")``."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .checkpoint import write_atomically


def write_picture(folder: Path, number: int, image: Image.Image) -> str:
    """Write a record's picture under ``folder``; its path from there comes back."""
    picture = Path("images") / f"{number:08d}.png"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(folder / picture, buffer.getvalue())
    return str(picture)


def write_rows(path: Path, entries: Iterable[Mapping[str, Any]], more: Sequence[str] = ()) -> None:
    """Write a file of records to train on, whole or not at all.

    Args:
        path: a ``.jsonl`` file.
        entries: each with ``id``, ``image``, ``question``, ``answer`` and ``response``.
        more: names of what else of an entry to keep.
    """
    lines = []
    for entry in entries:
        turns = [
            {"from": "human", "value": f"<image>\n{entry['question']}"},
            {"from": "gpt", "value": entry["response"]},
        ]
        kept = {name: entry[name] for name in ("id", "image", "answer", *more)}
        lines.append(json.dumps({**kept, "conversations": turns}) + "\n")
    write_atomically(path, "".join(lines))
