"""Configuration of a run of a TRL trainer, as it stands in a YAML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .accuracy import MATCHING
from .checks import check_names, is_number, is_whole
from .config import PACKAGED, load_yaml
from .rewards import PRESETS

KINDS = ("brpo", "sft")
_REWARDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "preset": (lambda value: value in PRESETS, f"one of {', '.join(PRESETS)}"),
    "matching": (lambda value: value in MATCHING, f"one of {', '.join(MATCHING)}"),
    "target_length": (lambda value: is_number(value) and value > 0, "a number above 0"),
    "min_length": (lambda value: value is None or is_whole(value, 1), "a whole number from 1 on"),
    "max_reflections": (lambda value: is_whole(value, 1), "a whole number from 1 on"),
    "weights": (
        lambda value: isinstance(value, list) and all(map(is_number, value)),
        "a list of numbers, one for each reward",
    ),
}


@dataclass(frozen=True)
class RunConfig:
    """What a run of `lookagain train` on TRL does.

    Attributes:
        output: folder of the run.
        model: "lookagain-tiny", a folder, or a name on the hub; its vocabulary has the tags.
        data: `{scenes: N, seed: S}` draws N questions; `{path: FILE}` reads a JSONL or Parquet
            file, or a dataset on the hub, with the columns `question`, `image`, and `answer`
            (BRPO) or `completion` (SFT); with `reader: llava-cot` or `geometry` it holds records
            of that shape, see `lookagain_ext.training.records`.
        trainer: fields of `BRPOConfig` or `LookAgainSFTConfig`, `look_again` among them.
        writer: for a cold start, who writes the reflections: `{endpoint: URL, model: NAME}` (with
            the other arguments of `ChatEndpoint`, and `show_image: false` to keep the picture
            back), or `{model: NAME}` for one that is loaded here; None: the records have them.
        rewards: for BRPO, keywords of `brpo_rewards`, and `weights`, one for each reward.
        lora: fields of PEFT's LoraConfig; None trains the model itself. With
            `trainable_token_indices: tags` the tags' rows of embedding and head train too.
        dtype: of the parameters; None: as they were saved.
        threads: of PyTorch; 0 leaves them.

    Raises:
        ValueError: if an entry is missing, unknown or wrong, by name.
    """

    output: str
    model: str
    data: dict[str, Any]
    trainer: dict[str, Any] = field(default_factory=dict)
    rewards: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    writer: dict[str, Any] | None = None
    dtype: str | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        """Check what can be checked without TRL."""
        for name in ("output", "model"):
            if not isinstance(value := getattr(self, name), str) or not value:
                raise ValueError(f"{name} must be a text, got {value!r}")
        if not (self.dtype is None or isinstance(self.dtype, str)):
            raise ValueError(f"dtype must be a text such as bfloat16, got {self.dtype!r}")
        if not is_whole(self.threads, 0):
            raise ValueError(f"threads must be a whole number from 0 on, got {self.threads!r}")
        for name in ("data", "trainer", "rewards", "lora", "writer"):
            value = getattr(self, name)
            if not isinstance(value, dict) and (
                name not in ("lora", "writer") or value is not None
            ):
                raise ValueError(f"{name} must hold names and values, got {value!r}")
        self._check_data()
        self._check_rewards()
        if self.writer is not None and "model" not in self.writer:
            raise ValueError(f"writer must name a model, got {self.writer!r}")
        if "output_dir" in self.trainer:
            raise ValueError("trainer: the folder is named by output, not by output_dir")

    def _check_data(self) -> None:
        check_names("data", self.data, ("scenes", "seed", "path", "split", "reader"))
        if ("scenes" in self.data) == ("path" in self.data):
            raise ValueError(f"data must have one of scenes and path, got {sorted(self.data)}")
        if "reader" in self.data and "path" not in self.data:
            raise ValueError("data: a reader needs a path")
        for name, least in (("scenes", 1), ("seed", 0)):
            if not is_whole(self.data.get(name, least), least):
                raise ValueError(
                    f"data: {name} must be a whole number from {least} on, got {self.data[name]!r}"
                )
        for name in ("path", "split", "reader"):
            if not isinstance(self.data.get(name, ""), str):
                raise ValueError(f"data: {name} must be a text, got {self.data[name]!r}")

    def _check_rewards(self) -> None:
        check_names("rewards", self.rewards, _REWARDS)
        for name, value in self.rewards.items():
            if not _REWARDS[name][0](value):
                raise ValueError(f"rewards: {name} must be {_REWARDS[name][1]}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it stands in YAML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunConfig:
        """Check and build."""
        names = {one.name for one in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - names):
            raise ValueError(
                f"the configuration has no entry {', '.join(unknown)}; known are: "
                f"{', '.join(sorted(names))}"
            )
        if missing := sorted({"output", "model", "data"} - set(data)):
            raise ValueError(f"the configuration needs {', '.join(missing)}")
        return cls(**data)

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read a YAML file, or a packaged one such as "configs/tiny/brpo.yaml"."""
        return cls.from_dict(read_yaml(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's names and values; a file that is not here is looked for among the packaged.

    Raises:
        ValueError: if there is none, or it is no YAML of names and values.
    """
    given = Path(path)
    inside = [part for part in given.parts if part != "configs"]
    found = given if given.is_file() else PACKAGED.joinpath(*inside)
    if given.is_absolute() or not found.is_file():
        found = given
    if not found.is_file():
        packaged = sorted(str(one.relative_to(PACKAGED)) for one in PACKAGED.rglob("*.yaml"))
        raise ValueError(f"no configuration {given}; packaged ones are: {', '.join(packaged)}")
    try:
        data = load_yaml(found.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{found} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{found} must hold names and values, got {type(data).__name__}")
    return data
