"""A cold start from a configuration: the reflections are written, then the model is fine-tuned.

The records are drawn scenes, whose reflections come from a template, or answers in the template
without a reflection, into which a model writes one. Records that reflect once already are taken as
they are. What is written survives a kill: the same call goes on behind it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from .coldstart import ReflectionWriter, reflects_once
from .journal import Journal
from .record_files import write_picture, write_rows
from .records import Record
from .run_config import RunConfig

REFLECTED = "reflected.jsonl"
_BATCH = 32  # records between two entries of the journal
_REQUESTS = 8  # to an endpoint at a time


def run_coldstart(
    config: RunConfig | str | Path,
    *,
    output: str | Path | None = None,
    resume: bool = True,
    data_only: bool = False,
    console: Console | None = None,
) -> Path:
    """Write the data of a cold start and train on it, or go on where a kill left off.

    Writes `data/reflected.jsonl` with its pictures below the folder of the run, and what
    :func:`.trl_run.run` writes.

    Args:
        config: the configuration of an SFT run, or its file; `data` is drawn scenes or records
            with responses, `writer` says who writes the reflections.
        output: replaces the configuration's folder.
        resume: go on from a checkpoint in the folder.
        data_only: stop when the data is written.
        console: to print to.

    Returns:
        The folder of the trained model, or the file of the data.

    Raises:
        ValueError: a wrong configuration, no usable record, or several processes without data.
        EndpointError: the writer's endpoint cannot be asked. What is written is kept.
    """
    config = config if isinstance(config, RunConfig) else RunConfig.load(config)
    if output is not None:
        config = replace(config, output=str(output))
    console = console or Console()
    folder = Path(config.output) / "data"
    done = written(config, folder)
    if done is None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "the reflections are written by one process: run the command with --data-only "
                "first, without a launcher, and then train"
            )
        done = write(config, folder, console)
    if data_only:
        console.print(f"data in {done}", markup=False)
        return done
    from .trl_run import run

    data = {"path": str(done), "reader": "llava-cot"}
    return run("sft", replace(config, data=data, writer=None), resume=resume, console=console)


def written(config: RunConfig, folder: Path) -> Path | None:
    """The finished data of a configuration, or None when it is not there (or not all of it)."""
    file, journal = folder / REFLECTED, folder / "journal.jsonl"
    if not file.is_file() or not journal.is_file():
        return None
    with open(journal, encoding="utf-8") as lines:
        first = lines.readline()
    return file if first == json.dumps(_about(config)) + "\n" else None


def write(config: RunConfig, folder: Path, console: Console) -> Path:
    """Write reflections into all records that need one; the file of the data comes back.

    Raises:
        ValueError: the folder holds other work, or no record came out usable.
        EndpointError: the endpoint cannot be asked.
    """
    records = _records(config.data)
    folder.mkdir(parents=True, exist_ok=True)
    writer, threads = _writer(config.writer)
    with Journal(folder / "journal.jsonl", _about(config)) as journal:
        missing = [n for n in range(len(records)) if n not in journal.done]
        for first in range(0, len(missing), _BATCH):
            numbers = missing[first : first + _BATCH]
            batch = [(number, records[number]) for number in numbers]
            with ThreadPoolExecutor(threads) as pool:
                made = list(pool.map(lambda pair: _reflected(pair[1], writer), batch))
            entries = []
            for (number, record), (status, said) in zip(batch, made, strict=True):
                entry = {"number": number, "status": status, "id": record.id}
                if status == "unusable":
                    entries.append({**entry, "reason": said})
                    continue
                entry |= {"question": record.question, "answer": record.answer, "response": said}
                entries.append({**entry, "image": write_picture(folder, number, record.image)})
            journal.add(entries)
            counts = Counter(entry["status"] for entry in journal.done.values())
            line = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
            console.print(f"{len(journal.done)} of {len(records)} records: {line}", markup=False)
        usable = [journal.done[n] for n in sorted(journal.done)]
        usable = [entry for entry in usable if entry["status"] != "unusable"]
        if not usable:
            reasons = {entry["reason"] for entry in journal.done.values()}
            raise ValueError(f"no record is usable: {'; '.join(sorted(reasons)[:3])}")
        write_rows(folder / REFLECTED, usable)
    return folder / REFLECTED


def _about(config: RunConfig) -> dict[str, Any]:
    """What must stay the same for the data to be taken as it is."""
    return {"data": config.data, "writer": config.writer}


def _records(data: dict[str, Any]) -> Sequence[Record]:
    if "scenes" in data:
        from .scene_records import SceneRecords

        return SceneRecords(int(data["scenes"]), int(data.get("seed", 0)), respond=True)
    from .images import SFT_PIXELS
    from .records import load_records

    reader, split = data.get("reader", "llava-cot"), data.get("split", "train")
    return load_records(data["path"], reader, split=split, max_pixels=SFT_PIXELS)


def _reflected(record: Record, writer: ReflectionWriter | None) -> tuple[str, str]:
    """("whole", "written" or "unusable", the response or the reason)."""
    if record.response is not None and reflects_once(record.response):
        return "whole", record.response
    if writer is None:
        return "unusable", "an answer does not reflect once, and the configuration has no writer"
    try:
        return "written", str(writer(record).response)
    except ValueError as error:
        return "unusable", str(error)


def _writer(settings: dict[str, Any] | None) -> tuple[ReflectionWriter | None, int]:
    """Who writes reflections, and how many records may be asked about at a time."""
    if settings is None:
        return None, 1
    own = {k: v for k, v in settings.items() if k in ("attempts", "min_words", "max_words")}
    rest = {k: v for k, v in settings.items() if k not in own}
    shown = rest.pop("show_image", True)
    try:
        if "endpoint" in rest:
            from .endpoint import ChatEndpoint

            chat = ChatEndpoint(rest.pop("endpoint"), **{"temperature": 1.0, **rest})
            return ReflectionWriter(
                ask_about=lambda prompt, one: chat(prompt, one.image if shown else None), **own
            ), _REQUESTS
        return ReflectionWriter(ask_about=_local(**rest), **own), 1
    except TypeError as error:
        raise ValueError(f"writer: {error}") from error


def _local(
    model: str, device: str | None = None, max_new_tokens: int = 512, temperature: float = 1.0
) -> Callable[[str, Record], str]:
    """Asks a model in this process about a record's picture."""
    from ..models.loading import load
    from .answering import ModelAnswerer

    loaded, processor = load(model, device=device)
    answer = ModelAnswerer(
        loaded, processor, None, max_new_tokens=max_new_tokens, temperature=temperature
    )
    asked = 0

    def ask(prompt: str, record: Record) -> str:
        nonlocal asked
        asked += 1  # another seed for another attempt
        return answer([replace(record, question=prompt)], asked)[0]

    return ask
