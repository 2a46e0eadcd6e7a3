"""The data of a run of a TRL trainer: drawn scenes, plain columns, or records of a known shape."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .accuracy import is_missing
from .checks import check_data

try:
    from datasets import Dataset, Image, List, load_dataset
    from datasets.exceptions import DatasetsError
except ModuleNotFoundError as error:
    from .extras import missing_extra

    raise missing_extra(__name__, error) from error


def read_data(kind: str, data: dict[str, Any]) -> Dataset:
    """The training data, in TRL's columns.

    Args:
        kind: "brpo" needs answers to compare with, "sft" completions.
        data: as in `RunConfig`.

    Raises:
        ValueError: if there is no such file, a column or a row's answer is missing, or a record
            is wrong; the message has its number.
    """
    check_data(data)
    last = "answer" if kind == "brpo" else "completion"
    if "reader" in data:
        table = _read_records(kind, data)
    elif "scenes" in data:
        rows = _scenes(int(data["scenes"]), int(data.get("seed", 0)), last)
        table = Dataset.from_dict(rows).cast_column("image", Image())
    else:
        path = str(data["path"])
        split, form = data.get("split", "train"), Path(path).suffix.lstrip(".")
        if form in ("json", "jsonl", "parquet"):
            form = "parquet" if form == "parquet" else "json"
        else:
            form = None
        files = {} if form is None else {"data_files": path}
        try:
            table = load_dataset(form or path, split=split, **files)
        except (OSError, ValueError, DatasetsError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"data: {path} cannot be read: {reason}") from error
    if missing := sorted({"question", "image", last} - set(table.column_names)):
        raise ValueError(f"data lacks the column {', '.join(missing)}; got {table.column_names}")
    if not len(table):
        raise ValueError("data has no rows")
    for number, value in enumerate(table[last]):
        if is_missing(value):
            raise ValueError(f"data: row {number} has no {last}")

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        message = [{"role": "user", "content": row["question"]}]
        answer = row[last]
        if kind == "sft":
            answer = [{"role": "assistant", "content": answer}]
        return {"prompt": message, "images": [row["image"]], last: answer}

    table = table.map(convert, remove_columns=["question", "image"])
    return table.cast_column("images", List(Image()))


def _read_records(kind: str, data: dict[str, Any]) -> Dataset:
    """Records of a known shape, pictures within the paper's limits, in the cache of datasets."""
    path = Path(str(data["path"]))
    # A file that was written again is read again.
    version = (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None
    keywords = {"kind": kind, "data": dict(data), "version": version}
    try:
        return Dataset.from_generator(_records, gen_kwargs=keywords)
    except Exception as error:  # it wraps what the generator raises in errors of its own
        raise ValueError(str(error.__cause__ or error)) from error


def _records(kind: str, data: dict[str, Any], version: object) -> Iterator[dict[str, Any]]:
    from .images import BRPO_SIZE, SFT_PIXELS
    from .records import load_records

    limits = {"max_size": BRPO_SIZE} if kind == "brpo" else {"max_pixels": SFT_PIXELS}
    split = data.get("split", "train")
    for record in load_records(data["path"], data["reader"], split=split, **limits):
        row = {"question": record.question, "image": record.image}
        if kind == "brpo":
            yield row | {"answer": record.answer}
            continue
        if record.response is None:
            raise ValueError(f"record {record.id} has no response to learn from")
        yield row | {"completion": record.response}


def _scenes(count: int, seed: int, last: str) -> dict[str, list[Any]]:
    """Drawn scenes with a question each, as `lookagain scene` draws them."""
    from ..synthetic.answers import write_answer
    from ..synthetic.questions import ask
    from ..synthetic.scenes import Scene

    rows: dict[str, list[Any]] = {"question": [], "image": [], last: []}
    for number in range(count):
        key = f"{seed}/{number}"
        scene = Scene.random(key)
        question = ask(scene, key)
        rows["question"].append(question.text)
        rows["image"].append(scene.render(1))
        rows[last].append(question.answer if last == "answer" else write_answer(question, key))
    return rows
