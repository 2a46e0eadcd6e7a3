"""Distillation: a model answers questions, the answers are checked, the good ones are kept.

Chu et al. (arXiv 2505.23558) let the model that came out of reinforcement learning answer 40 000
questions, have several judges check the answers, and fine-tune the base model on them. An answer is

- *malformed* if it leaves the template, *wrong* if its conclusion is not the right answer;
- *review* if two or more judges find it incorrect, to be looked at or rewritten by hand;
- *kept* otherwise.

Each shard of the questions has a journal in the folder. A kill at any moment loses at most the
batch that was being answered; the same call goes on behind what is finished, and no question is
answered twice. When a shard is through, ``kept-*.jsonl``, ``review-*.jsonl`` and
``rejected-*.jsonl`` are written, which ``load_records(file, "llava-cot")`` reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..template import parse
from .accuracy import check_matching, is_right
from .journal import Journal
from .judges import VERDICTS, EndpointJudge, Judge
from .record_files import write_picture, write_rows
from .records import Record

STATUSES: tuple[str, ...] = ("kept", "review", "malformed", "wrong")
Answerer = Callable[[Sequence[Record], int], Sequence[str]]
"""Takes a batch and its first record's number, gives the answers' texts with their tags."""
_FILES = {"kept": ("kept",), "review": ("review",), "rejected": ("malformed", "wrong")}
_REQUESTS = 8  # to one endpoint at a time


def distill(
    questions: Sequence[Record],
    answer: Answerer,
    folder: str | Path,
    *,
    shard: tuple[int, int] = (0, 1),
    batch_size: int = 8,
    matching: str = "auto",
    judges: Sequence[Judge] = (),
    review_votes: int = 2,
    about: dict[str, Any] | None = None,
    progress: Callable[[int, int, Counter[str]], None] | None = None,
) -> Counter[str]:
    """Answer, check and write one shard of the questions, or go on where a kill left off.

    A batch is always the same questions. One that a kill cut in two is answered again whole, and
    only what was missing of it is checked and written: so the result is that of a run in one piece
    as long as ``answer`` depends on nothing but its arguments.

    Args:
        questions: by number; they must stay the same between calls.
        answer: see ``Answerer``.
        folder: for the results; made if need be. Shards may share it.
        shard: (index, count): this call does the questions whose number is index modulo count.
        batch_size: questions at a time.
        matching: how conclusions are compared, as in :func:`.accuracy.is_right`.
        judges: asked about answers that are right by rule; none is fine.
        review_votes: so many "incorrect" send an answer to review.
        about: what else must stay the same between calls: the model's name, its settings.
        progress: called with finished and all questions of the shard, and the counts, before the
            first and after each batch.

    Returns:
        How many of the shard's answers came to each of ``STATUSES``.

    Raises:
        ValueError: an argument is out of range, a record is wrong, or the folder holds other work.
        JudgeError: a judge cannot be asked. What is finished is kept.
    """
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard must be (index, count) with 0 <= index < count, got {shard}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if judges and not 1 <= review_votes <= len(judges):
        raise ValueError(
            f"review_votes must be 1 to the number of judges, {len(judges)}, got {review_votes}: "
            "no answer could ever come to review"
        )
    check_matching(matching)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{index:05d}-of-{count:05d}"
    work = {
        "questions": len(questions),
        "shard": [index, count],
        "batch_size": batch_size,
        "matching": matching,
        "judges": len(judges),
        "review_votes": review_votes,
        **(about or {}),
    }
    numbers = range(index, len(questions), count)
    with Journal(folder / f"journal-{name}.jsonl", work) as journal:
        counts = Counter(entry["status"] for entry in journal.done.values())
        for first in range(0, len(numbers), batch_size):
            if progress:
                progress(len(journal.done), len(numbers), counts)
            batch = numbers[first : first + batch_size]
            if all(number in journal.done for number in batch):
                continue
            records = [questions[number] for number in batch]
            texts = answer(records, batch[0])
            if len(texts) != len(records):
                raise ValueError(f"answer must give {len(records)} texts, got {len(texts)}")
            new = [
                (number, record, text)
                for number, record, text in zip(batch, records, texts, strict=True)
                if number not in journal.done
            ]
            entries = _checked(new, folder, matching, judges, review_votes)
            journal.add(entries)
            counts.update(entry["status"] for entry in entries)
        if progress:
            progress(len(journal.done), len(numbers), counts)
        for file, statuses in _FILES.items():
            rows = [journal.done[n] for n in numbers if journal.done[n]["status"] in statuses]
            write_rows(folder / f"{file}-{name}.jsonl", rows, ("status", "reasons", "votes"))
    return counts


def _checked(
    new: Sequence[tuple[int, Record, str]],
    folder: Path,
    matching: str,
    judges: Sequence[Judge],
    review_votes: int,
) -> list[dict[str, Any]]:
    """The journal's entries for these answers; their pictures are on the disk then."""
    entries = []
    for number, record, text in new:
        parsed = parse(text)
        status, reasons = "kept", list(parsed.errors)
        if not parsed.well_formed:
            status = "malformed"
        elif not is_right(parsed.conclusion, record.answer, matching):
            status, reasons = "wrong", [f"{parsed.conclusion!r} is not {record.answer!r}"]
        picture = write_picture(folder, number, record.image)
        entries.append(
            {
                "number": number,
                "status": status,
                "reasons": reasons,
                "votes": [],
                "id": record.id,
                "image": picture,
                "question": record.question,
                "answer": record.answer,
                "response": text,
            }
        )
    right = [i for i, entry in enumerate(entries) if entry["status"] == "kept"]
    for judge in judges:
        verdicts = _ask(judge, [(new[i][1], new[i][2]) for i in right])
        for i, verdict in zip(right, verdicts, strict=True):
            if verdict not in VERDICTS:
                raise ValueError(f"a judge must say {', '.join(VERDICTS)}, got {verdict!r}")
            entries[i]["votes"].append(verdict)
    for i in right:
        if judges and entries[i]["votes"].count("incorrect") >= review_votes:
            entries[i]["status"] = "review"
    return entries


def _ask(judge: Judge, pairs: Sequence[tuple[Record, str]]) -> list[str]:
    """Verdicts on all pairs; an endpoint is asked about several at a time."""
    if not isinstance(judge, EndpointJudge):
        return [judge(record, text) for record, text in pairs]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(lambda pair: judge(*pair), pairs))
