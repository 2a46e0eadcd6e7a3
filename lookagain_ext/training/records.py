"""Questions about pictures, read from JSONL, Parquet or the hub, in one form for all stages.

Two shapes of data are known by name; a further one is a function from a row to a :class:`Record`:

- ``"llava-cot"``: ``image`` and ``conversations`` of ``{"from": "human" | "gpt", "value": …}``,
  the answer written in the template (LLaVA-CoT-100k and what is written like it);
- ``"geometry"``: a question (``problem``, ``question``, ``problem_text``), an ``answer``, perhaps
  ``choices``, and ``image`` or ``images`` (Geometry3K and other sets of mathematics).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..template import parse
from .images import fit_image, read_image

_PLACEHOLDERS = ("<image>", "<|image|>", "<|image_pad|>")


@dataclass(frozen=True)
class Record:
    """One question about one picture.

    Attributes:
        id: of the record in its set.
        question: without a place-holder for the picture.
        answer: what the conclusion must say.
        image: RGB, within the limits that were asked for; or, before it is read, anything that
            :func:`lookagain_ext.training.images.read_image` takes.
        response: a whole answer in the template to learn from, or None.
    """

    id: str
    question: str
    answer: str
    image: Any
    response: str | None = None

    def prompt(self) -> list[dict[str, Any]]:
        """The question as a chat of one message, the picture first."""
        content = [{"type": "image"}, {"type": "text", "text": self.question}]
        return [{"role": "user", "content": content}]

    def brpo_row(self) -> dict[str, Any]:
        """A row for TRL's GRPO trainers: ``prompt``, ``images`` and ``answer``."""
        return {"prompt": self.prompt(), "images": [self.image], "answer": self.answer}

    def sft_row(self) -> dict[str, Any]:
        """A row for TRL's SFT trainer: ``prompt``, ``completion`` and ``images``.

        Raises:
            ValueError: the record has no response.
        """
        if self.response is None:
            raise ValueError(f"record {self.id} has no response to learn from")
        said = {"role": "assistant", "content": [{"type": "text", "text": self.response}]}
        return {"prompt": self.prompt(), "completion": [said], "images": [self.image]}


def read_llava_cot(row: Mapping[str, Any], number: int) -> Record:
    """A row of LLaVA-CoT's shape; of several exchanges the first.

    The answer is the column ``answer`` if there is one, else what the conclusion says.

    Raises:
        ValueError: something is missing, or the answer has no conclusion.
    """
    said: dict[str, str] = {}
    for turn in _column(row, "conversations"):
        said.setdefault(str(turn.get("from")), turn.get("value") or "")
    if not {"human", "gpt"} <= said.keys():
        raise ValueError("conversations must hold one turn from 'human' and one from 'gpt'")
    answer = row.get("answer")
    if answer is None and (answer := parse(said["gpt"]).conclusion) is None:
        raise ValueError("the answer has no <CONCLUSION>, and there is no column 'answer'")
    name = str(row.get("id") or number)
    return Record(name, _question(said["human"]), str(answer), _picture(row), said["gpt"])


def read_geometry(row: Mapping[str, Any], number: int) -> Record:
    """A row of Geometry3K's shape; choices are added to the question as A, B and so on.

    Raises:
        ValueError: something is missing, or the answer is none of the choices.
    """
    question = _question(_column(row, "problem", "question", "problem_text"))
    answer = str(_column(row, "answer")).strip()
    if choices := [str(choice) for choice in row.get("choices") or ()]:
        letters = [chr(ord("A") + i) for i in range(len(choices))]
        if answer not in letters and answer not in choices:
            raise ValueError(f"answer {answer!r} is none of the choices {choices}")
        answer = answer if answer in letters else letters[choices.index(answer)]
        lines = [f"{letter}. {text}" for letter, text in zip(letters, choices, strict=True)]
        question = "\n".join([question, *lines])
    return Record(str(row.get("id") or number), question, answer, _picture(row))


READERS: dict[str, Callable[[Mapping[str, Any], int], Record]] = {
    "llava-cot": read_llava_cot,
    "geometry": read_geometry,
}


class Records(Sequence[Record]):
    """Records over rows; each is read, checked and its picture opened when it is asked for.

    Args:
        rows: dicts by number: a ``datasets.Dataset``, or a list.
        reader: one of ``READERS``, or a function of a row and its number.
        source: what to call the rows in messages.
        root: folder that relative paths of pictures start from.
        max_size: as in :func:`lookagain_ext.training.images.fit_image`.
        max_pixels: likewise.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        reader: str | Callable[[Mapping[str, Any], int], Record],
        *,
        source: str = "the data",
        root: str | Path | None = None,
        max_size: tuple[int, int] | None = None,
        max_pixels: int | None = None,
    ) -> None:
        if isinstance(reader, str) and reader not in READERS:
            raise ValueError(f"reader must be one of {', '.join(READERS)}, got {reader!r}")
        self._rows = rows
        self._read = READERS[reader] if isinstance(reader, str) else reader
        self._source = source
        self._root = root
        self._max_size = max_size
        self._max_pixels = max_pixels

    def __len__(self) -> int:
        """How many there are."""
        return len(self._rows)

    def __getitem__(self, number: int) -> Record:
        """Record ``number``, from 0 on.

        Raises:
            IndexError: there is none.
            ValueError: it is wrong; the message has its number.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"there is no record {number} in {self._source}, it has {len(self)}")
        try:
            record = self._read(self._rows[number], number)
            image = fit_image(
                read_image(record.image, self._root), self._max_size, self._max_pixels
            )
        except Exception as error:  # what a decoder of pictures or a reader raises, of any type
            raise ValueError(f"record {number} of {self._source}: {error}") from error
        return Record(record.id, record.question, record.answer, image, record.response)

    def __iter__(self) -> Iterator[Record]:
        """All of them, in order."""
        return (self[number] for number in range(len(self)))

    def check(self) -> None:
        """Read every record once; raises ValueError at the first that is wrong."""
        for _ in self:
            pass


def load_records(
    source: str | Path,
    reader: str | Callable[[Mapping[str, Any], int], Record],
    *,
    split: str = "train",
    root: str | Path | None = None,
    max_size: tuple[int, int] | None = None,
    max_pixels: int | None = None,
) -> Records:
    """Records from a file or from the hub.

    Args:
        source: a ``.jsonl``, ``.json`` or ``.parquet`` file, or a data set's id on the hub.
        reader: "llava-cot", "geometry", or a function of a row and its number.
        split: of a data set on the hub.
        root: folder that relative paths of pictures start from; None takes the file's own.
        max_size: as in :func:`lookagain_ext.training.images.fit_image`; the paper's BRPO:
            ``BRPO_SIZE``.
        max_pixels: likewise; the paper's fine-tuning: ``SFT_PIXELS``.

    Raises:
        ImportError: ``datasets`` is not installed.
        ValueError: there is no such file or data set, or it cannot be read.
    """
    datasets = _datasets()
    path, name = Path(source), str(source)
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(path.suffix)
    if kind is not None and not path.is_file():
        raise ValueError(f"there is no file {name}")
    if kind == "json" and not path.stat().st_size:
        raise ValueError(f"{name} is empty: it holds no record")
    if kind is None and path.exists():
        raise ValueError(f"{name} must be a .jsonl, .json or .parquet file, or an id on the hub")
    try:
        if kind is None:
            rows = datasets.load_dataset(name, split=split)
        else:
            rows = datasets.load_dataset(kind, data_files=str(path), split="train")
    except Exception as error:  # each of its readers has errors of its own
        reason = _bad_line(path) if path.suffix == ".jsonl" else None
        first = str(error).strip().split("\n")[0]
        raise ValueError(f"cannot read {name}: {reason or first}") from error
    folder = path.parent if kind is not None and root is None else root
    return Records(rows, reader, source=name, root=folder, max_size=max_size, max_pixels=max_pixels)


def _datasets() -> Any:  # noqa: ANN401 - a module
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'reading data needs datasets: pip install "lookagain-ext[train]"'
        ) from error
    return datasets


def _column(row: Mapping[str, Any], *names: str) -> Any:  # noqa: ANN401 - whatever is stored
    """The first of these columns that holds something."""
    for name in names:
        if row.get(name) not in (None, "", []):
            return row[name]
    raise ValueError(f"there is no {' or '.join(names)} (columns: {', '.join(row) or 'none'})")


def _question(text: str) -> str:
    for placeholder in _PLACEHOLDERS:
        text = text.replace(placeholder, "")
    if not text.strip():
        raise ValueError("the question is empty")
    return text.strip()


def _picture(row: Mapping[str, Any]) -> Any:  # noqa: ANN401 - whatever is stored
    found = row.get("images") if row.get("image") is None else row["image"]
    if isinstance(found, list | tuple):
        if len(found) != 1:
            raise ValueError(f"one picture is needed, got {len(found)}")
        found = found[0]
    if found is None:
        raise ValueError(f"there is no picture (columns: {', '.join(row) or 'none'})")
    return found


def _bad_line(path: Path) -> str | None:
    """Which record of a JSONL file cannot be read, in words."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(line for line in file if line.strip()):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                return f"record {number}: it is not JSON ({error.msg}, column {error.colno})"
            if not isinstance(row, dict):
                return f"record {number}: a record must be an object, got {type(row).__name__}"
    return None
