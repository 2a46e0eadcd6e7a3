"""`lookagain distill`: a model answers questions, and the good answers become training data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from . import inputs
from .ask import choose_strategy, quiet_transformers
from .errors import UserError
from .printing import plain

if TYPE_CHECKING:
    from ..training.judges import EndpointJudge
    from ..training.records import Record

_SCENES = re.compile(r"scenes:(\d+)(?::(\d+))?")


def run(
    questions: str,
    reader: str,
    split: str,
    model_name: str,
    strategy: str,
    ratio: float,
    out: Path,
    shard: str,
    batch_size: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    judge: Sequence[str] = (),
    judge_key: str | None = None,
    judge_sees: bool = False,
    review_votes: int = 2,
    device: str | None = None,
) -> None:
    """Answer one shard of the questions and check the answers, or go on where a kill left off.

    Args:
        questions: "scenes:COUNT" or "scenes:COUNT:SEED" draws them; else a file or a hub id.
        reader: the shape of the data, "geometry" or "llava-cot".
        split: of a data set on the hub.
        model_name: as everywhere.
        strategy: what a reflection shows.
        ratio: of "route".
        out: folder for the results; shards may share it.
        shard: "INDEX/COUNT", index from 0 on.
        batch_size: questions at a time.
        max_new_tokens: the longest answer.
        temperature: 0 takes the likeliest token each time.
        seed: of the sampling.
        judge: any number of "MODEL@URL".
        judge_key: environment variable with the judges' key.
        judge_sees: whether judges are sent the picture.
        review_votes: so many "incorrect" send an answer to review.
        device: cpu, cuda, …

    Raises:
        UserError: something handed over is wrong, or a judge cannot be asked.
    """
    inputs.check_strategy(strategy)
    inputs.check_ratio(ratio)
    inputs.check_temperature(temperature)
    part = read_shard(shard)
    if judge and not 1 <= review_votes <= len(judge):
        wrong = (
            f"--review-votes must be 1 to the number of judges, {len(judge)}, got {review_votes}"
        )
        raise UserError(wrong, "With fewer judges no answer could ever come to review.")
    inputs.check_folder(out)
    quiet_transformers()
    from ..training.judges import JudgeError

    try:
        judges = [read_judge(one, judge_key, judge_sees) for one in judge]
        records = read_questions(questions, reader, split)
    except (ValueError, ImportError) as error:
        raise UserError(str(error), "See lookagain distill --help.") from error

    console = Console(stderr=True, highlight=False)
    with console.status(plain(f"loading {model_name}")) if console.is_terminal else nullcontext():
        from ..generation import LookAgainConfig
        from ..training.answering import ModelAnswerer
        from ..training.distill import distill

        model, processor = inputs.load_model(model_name, device)
    strategy = choose_strategy(strategy, processor.tokenizer, model_name)
    config = LookAgainConfig(strategy=strategy, route_ratio=ratio)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    about = {"source": questions, "split": split, "model": model_name, "strategy": strategy}
    about |= {"ratio": ratio if strategy == "route" else None, **options}
    about["judged_by"] = list(judge)
    try:
        counts = distill(
            records,
            ModelAnswerer(model, processor, config, **options),
            out,
            shard=part,
            batch_size=batch_size,
            judges=judges,
            review_votes=review_votes,
            about=about,
            progress=lambda done, total, found: console.print(plain(_line(done, total, found))),
        )
    except ValueError as error:
        raise UserError(str(error), "Name another folder with --out to start anew.") from error
    except JudgeError as error:
        raise UserError(
            str(error), "What is finished is kept: the same command goes on."
        ) from error
    print(_line(sum(counts.values()), sum(counts.values()), counts))
    print(f"{out / f'kept-{part[0]:05d}-of-{part[1]:05d}.jsonl'}  to train on")


def read_shard(shard: str) -> tuple[int, int]:
    """(index, count) from "INDEX/COUNT"."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None or not int(match[1]) < int(match[2]):
        hint = "0/2 and 1/2 are the two halves."
        raise UserError(f"--shard must be INDEX/COUNT with INDEX < COUNT, got {shard!r}", hint)
    return int(match[1]), int(match[2])


def read_judge(judge: str, key_variable: str | None, show_image: bool) -> EndpointJudge:
    """A judge from "MODEL@URL".

    Raises:
        ValueError: it is none, or the key's variable is not set.
    """
    from ..training.judges import EndpointJudge

    model, at, url = judge.partition("@http")
    if not model or not at:
        raise ValueError(f"--judge must be MODEL@URL with a URL of http or https, got {judge!r}")
    return EndpointJudge(f"http{url}", model, key_variable=key_variable, show_image=show_image)


def read_questions(questions: str, reader: str, split: str) -> Sequence[Record]:
    """The questions behind the command's argument.

    Raises:
        ValueError: there are none.
        ImportError: reading them takes the extra `train`.
    """
    from ..training.images import SFT_PIXELS
    from ..training.records import load_records
    from ..training.scene_records import SceneRecords

    if match := _SCENES.fullmatch(questions):
        return SceneRecords(int(match[1]), int(match[2] or 0))
    return load_records(questions, reader, split=split, max_pixels=SFT_PIXELS)


def _line(done: int, total: int, counts: Counter[str]) -> str:
    from ..training.distill import STATUSES

    parts = ", ".join(f"{counts[status]} {status}" for status in STATUSES)
    return f"{done} of {total} answered: {parts}"
