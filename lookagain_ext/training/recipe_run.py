"""Running a recipe: which command may begin, their processes, and a journal of what is done.

Interrupted, even by ``kill -9``, the same call goes on: finished stages are skipped, those that
were interrupted go on by their own means.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import functools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from .checkpoint import write_atomically
from .journal import Journal
from .recipe import RecipeConfig, Step, steps
from .recipe_check import check_files

JOURNAL = "recipe.jsonl"
_NOT_THE_WORK = ("output", "launch", "jobs")  # how and where, which may change on the way
_QUIET = {  # bars for the loading of small files, and warnings for authors, hide what matters
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
_LAST_LINES = 20  # of a failed step's log that are shown
_POLL = 0.1  # seconds between two looks at what runs


def run_recipe(config: RecipeConfig, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Run what is not done yet; the journal's entries come back, one a step in the recipe's order.

    Up to `config.jobs` commands run at the same time, each as soon as what it needs is done. More
    than one do not share the terminal: each writes to `logs/NAME.log` in the recipe's folder, and
    each has an equal share of the cores' threads unless OMP_NUM_THREADS is set. When one fails no
    other begins; those that run are let end, so that their work is kept.

    Args:
        config: the recipe.
        say: told what begins, what is skipped and what it took.

    Raises:
        ValueError: the folder holds another recipe, or a file of data is not there.
        RuntimeError: a command failed; what is done stays done.
    """
    folder = Path(config.output)
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    about = {k: v for k, v in dataclasses.asdict(config).items() if k not in _NOT_THE_WORK}
    with Journal(folder / JOURNAL, about) as journal:
        planned = steps(config)
        heads = [f"[{n}/{len(planned)}] {step.name}" for n, step in enumerate(planned, 1)]
        waiting = []
        for number in range(len(planned)):
            if number in journal.done:
                say(f"{heads[number]}: done, {journal.done[number]['seconds']:.0f} s")
            else:
                check_files(planned[number])
                waiting.append(number)
        finished = {planned[number].name for number in journal.done}
        running: dict[int, tuple[subprocess.Popen[bytes], float]] = {}
        failures = []
        try:
            while running or (waiting and not failures):
                ready = [n for n in waiting if finished.issuperset(planned[n].needs)]
                for number in [] if failures else ready[: config.jobs - len(running)]:
                    waiting.remove(number)
                    say(f"{heads[number]}: {shlex.join(planned[number].command)}")
                    try:
                        running[number] = _begin(planned[number], config), time.perf_counter()
                    except OSError as error:
                        failures.append(f"{planned[number].name} cannot be started: {error}")
                        break
                time.sleep(_POLL)
                for number in [n for n, (one, _) in running.items() if one.poll() is not None]:
                    process, begun = running.pop(number)
                    step, head = planned[number], heads[number]
                    seconds, words = round(time.perf_counter() - begun, 1), shlex.join(step.command)
                    if process.returncode:
                        code = process.returncode
                        failures.append(f"{step.name} failed with exit code {code}: {words}")
                        outcome = f"failed after {seconds:.0f} s\n{_last_lines(step, config)}"
                    else:
                        entry = {"number": number, "name": step.name, "jobs": config.jobs}
                        journal.add([{**entry, "command": words, "seconds": seconds}])
                        finished.add(step.name)
                        outcome = f"ended after {seconds:.0f} s"
                    if config.jobs > 1:
                        say(f"{head}: {outcome}")
        finally:  # something is left only when this process is interrupted
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.wait()
        if failures:
            raise RuntimeError("; ".join(failures))
        return [journal.done[number] for number in range(len(planned))]


def _begin(step: Step, config: RecipeConfig) -> subprocess.Popen[bytes]:
    """Write a step's configuration and start it."""
    if step.settings is not None:
        plain = yaml.safe_dump(step.settings, sort_keys=False)
        file = Path(config.output) / "configs" / f"{step.name.removesuffix('-data')}.yaml"
        write_atomically(file, plain)
    start = functools.partial(
        subprocess.Popen,
        _argv(step, config.launch),
        preexec_fn=functools.partial(_die_with_parent, os.getpid()),
    )
    environment = {**_QUIET, **os.environ}
    if config.jobs == 1:
        return start(env=environment)
    if not step.alone:
        share = max(1, len(os.sched_getaffinity(0)) // config.jobs)
        environment.setdefault("OMP_NUM_THREADS", str(share))
    log = _log(step, config)
    log.parent.mkdir(exist_ok=True)
    with open(log, "ab") as file:
        return start(env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)


def _log(step: Step, config: RecipeConfig) -> Path:
    return Path(config.output) / "logs" / f"{step.name}.log"


def _last_lines(step: Step, config: RecipeConfig) -> str:
    if config.jobs == 1:  # it wrote to the terminal
        return ""
    log = _log(step, config)
    with open(log, encoding="utf-8", errors="replace") as lines:
        last = collections.deque(lines, _LAST_LINES)
    return "".join(last).rstrip() + f"\n(the whole log: {log})"


def _argv(step: Step, launch: tuple[str, ...]) -> list[str]:
    """What is executed: this interpreter, or the launcher, with the step's words."""
    words = list(step.command)
    start = ["-m", "lookagain_ext.cli", *words[1:]] if words[0] == "lookagain" else words[1:]
    return [*launch, *start] if launch and step.launched else [sys.executable, *start]


def _die_with_parent(parent: int) -> None:
    """Ask Linux to end a step when the recipe is killed: else two could run at once.

    Linux watches the thread that started the step, not the process: it must live as long.
    """
    parent_death_signal = 1  # PR_SET_PDEATHSIG in <sys/prctl.h>
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)
    if os.getppid() != parent:  # it was killed before this was asked
        os.kill(os.getpid(), signal.SIGTERM)
