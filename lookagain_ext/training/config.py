"""What a training run is: a YAML file read into dataclasses, every mistake in it named."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

PACKAGED = Path(__file__).parents[1] / "configs"
TASKS: tuple[str, ...] = ("vision", "exercise", "short", "answer", "plain")
STRATEGIES: tuple[str, ...] = ("off", "copy", "route")


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: of the stage, unique in the run; the model is written to a folder of this name.
        task: "vision" matches every visual token with the words that are true of it (kind,
            colour, size, cell); "exercise" trains small looks at one picture; "short" trains looks
            and conclusions for many questions about one picture; "answer" trains whole answers in
            the template; "plain" the same answers without their reflections, and so without the
            evidence in them.
        steps: optimizer steps.
        batch_size: pictures a step.
        learning_rate: the highest; it rises over ``warmup`` steps and falls as a cosine to a
            tenth of it.
        warmup: steps.
        look_again: what is put before a reflection in the training forward: "off", "copy", or
            "route".
        route_ratio: the share of visual tokens that "route" takes.
        train_vision: False leaves the vision tower and its projector as they are, which is
            faster.
        rehearsal: share of the rows of an "answer" or "plain" stage that are short answers instead.
    """

    name: str
    task: str
    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 100
    look_again: str = "off"
    route_ratio: float = 0.5
    train_vision: bool = True
    rehearsal: float = 0.0

    def __post_init__(self) -> None:
        """Check every entry."""
        _one_of("task", self.task, TASKS)
        _one_of("look_again", self.look_again, STRATEGIES)
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of stage {self.name!r} must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        for name in ("route_ratio", "rehearsal"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.task == "vision" and self.look_again != "off":
            raise ValueError("look_again must be off in a vision stage: it has no reflections")


@dataclass(frozen=True)
class SFTConfig:
    """A run of supervised fine-tuning on the synthetic scenes.

    Attributes:
        output: folder of checkpoint, metrics, curves and models.
        stages: in order.
        seed: of weights and data; the same seed, threads and machine give the same bits.
        init: "lookagain-tiny" or the folder of a model to start from; None builds a fresh one.
        model: sizes for :func:`~lookagain_ext.synthetic.tiny.build_tiny`.
        precision: "fp32", or "bf16" for autocast.
        weight_decay: of matrices; vectors have none.
        max_grad_norm: gradient clipping.
        checkpoint_every: steps between checkpoints: what a kill can lose.
        log_every: steps between lines of the metrics file.
        threads: of torch; 0 leaves torch's choice.
        workers: processes that make data; 0 makes it in the training process.
        held_out: questions answered by generation at the end of the run; 0 for none.
    """

    output: str
    stages: tuple[Stage, ...]
    seed: int = 0
    init: str | None = None
    model: dict[str, int] = field(default_factory=dict)
    precision: str = "fp32"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    checkpoint_every: int = 100
    log_every: int = 10
    threads: int = 0
    workers: int = 1
    held_out: int = 500

    def __post_init__(self) -> None:
        """Check every entry."""
        if not self.stages:
            raise ValueError("stages must name at least one stage")
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages must have different names, got {', '.join(names)}")
        _one_of("precision", self.precision, ("fp32", "bf16"))
        for name in ("checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def total_steps(self) -> int:
        """Steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it stands in YAML."""
        plain = dataclasses.asdict(self)
        plain["stages"] = [dict(stage) for stage in plain["stages"]]
        return plain

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SFTConfig:
        """Check and build; ValueError names an unknown, missing or wrong entry."""
        data = dict(_known(cls, data, "the configuration"))
        stages = data.pop("stages", None)
        if not isinstance(stages, list | tuple):
            raise ValueError("stages must be a list of stages")
        built = tuple(_build(Stage, stage, f"stage {i + 1}") for i, stage in enumerate(stages))
        return _build(cls, {**data, "stages": built}, "the configuration")

    @classmethod
    def load(cls, path: str | Path) -> SFTConfig:
        """Read a YAML file; a name that is no file here is looked for among the packaged ones.

        Raises:
            ValueError: no such file, not YAML, or a wrong entry.
        """
        given = Path(path)
        found = given if given.is_file() else PACKAGED / given.name
        if not found.is_file():
            packaged = ", ".join(sorted(one.name for one in PACKAGED.glob("*.yaml")))
            raise ValueError(f"no configuration {given}; packaged ones are: {packaged}")
        try:
            data = load_yaml(found.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{found} is not YAML: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"{found} must hold names and values, got {type(data).__name__}")
        return cls.from_dict(data)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number, as in its version 1.2; PyYAML wants a point in it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def load_yaml(text: str) -> Any:  # noqa: ANN401 - whatever stands there
    """What a YAML text holds.

    Raises:
        yaml.YAMLError: if it is none.
    """
    return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        hint = "; write it in quotes, YAML reads a bare off as false" if value is False else ""
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}{hint}")


def _known(cls: type, data: dict[str, Any], where: str) -> dict[str, Any]:
    """``data``, after a check that it has only fields of ``cls``."""
    if not isinstance(data, dict):
        raise ValueError(f"{where} must hold names and values, got {type(data).__name__}")
    names = {one.name for one in dataclasses.fields(cls)}
    if unknown := sorted(set(data) - names):
        known = ", ".join(sorted(names))
        raise ValueError(f"{where} has no entry {', '.join(unknown)}; known are: {known}")
    return data


def _build(cls: type, data: dict[str, Any], where: str) -> Any:  # noqa: ANN401 - an instance of cls
    """An instance of ``cls``; a missing entry or a wrong type is named."""
    _known(cls, data, where)
    try:
        return cls(**data)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error
