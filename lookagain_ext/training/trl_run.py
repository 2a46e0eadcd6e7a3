"""Runs of the TRL trainers from a configuration: data, checkpoints, metrics, samples.

Needs the extra `train`. A run that was interrupted, even by `kill -9`, goes on from its latest
whole checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from .checkpoint import METRICS, read_metrics, rewind_metrics, write_atomically
from .checks import check_data, check_run
from .curves import plot_runs
from .run_config import KINDS, RunConfig
from .trainable import tag_ids

try:
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback
    from transformers.trainer_utils import set_seed

    from .brpo import BRPOConfig, BRPOTrainer
    from .run_data import read_data
    from .trl_sft import LookAgainSFTConfig, LookAgainSFTTrainer
except ModuleNotFoundError as error:
    from .extras import missing_extra

    raise missing_extra(__name__, error) from error

__all__ = ["last_checkpoint", "make_trainer", "read_data", "run"]

SAMPLES = "samples.txt"
_SAMPLE = re.compile(r"^--- step (\d+), \{", re.MULTILINE)
_SHOWN = {
    "loss": "loss",
    "reward": "reward",
    "kl": "KL",
    "reflections/count": "reflections",
    "reflections/length": "tokens each",
    "mean_token_accuracy": "right tokens",
    "visual_attention": "on picture",
    "tokens_per_second": "tokens/s",
}


def run(
    kind: str,
    config: RunConfig | str | Path,
    *,
    output: str | Path | None = None,
    look_again: str | None = None,
    resume: bool = True,
    rewards: list[Callable[..., Any]] | None = None,
    console: Console | None = None,
) -> Path:
    """Train, and return the folder of the trained model.

    Writes to `output`: `config.yaml`, checkpoints, `metrics.jsonl` with a line for each log of the
    trainer, for BRPO `samples.txt` with answers as they were sampled, and at the end `model` and
    `curves.png`.

    Args:
        kind: "brpo" or "sft".
        config: the configuration, or its YAML file, or the name of a packaged one.
        output: replaces the configuration's folder.
        look_again: replaces the trainer's `look_again`.
        resume: go on from a checkpoint in the folder, and from one of the last step write the
            model and train nothing; False refuses to start where one lies.
        rewards: BRPO's reward functions; None: `brpo_rewards` with the configuration's keywords.
        console: to print to.

    Raises:
        ValueError: a wrong configuration, or a folder that holds another run.
    """
    config = config if isinstance(config, RunConfig) else RunConfig.load(config)
    changed = config.to_dict()
    if output is not None:
        changed["output"] = str(output)
    if look_again is not None:
        changed["trainer"]["look_again"] = look_again
    config, console = RunConfig.from_dict(changed), console or Console()
    if config.threads:
        torch.set_num_threads(config.threads)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = _checkpoint_to_resume(folder, config, resume)
    trainer = make_trainer(kind, config, rewards)
    first = trainer.is_world_process_zero()
    if first:
        step = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0
        rewind_metrics(folder / METRICS, step)
        _rewind_samples(folder / SAMPLES, step)
        if checkpoint:
            console.print(f"going on from step {step}", markup=False)
        else:
            plain = yaml.safe_dump(config.to_dict(), sort_keys=False)
            write_atomically(folder / "config.yaml", plain)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_Report(folder, trainer, console))
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from the latest checkpoint")
        raise
    done = folder / "model"
    trainer.save_model(str(done))
    if first:
        lines = read_metrics(folder / METRICS)
        if lines:
            plot_runs({kind: lines}, folder / "curves.png")
        console.print(f"{trainer.state.global_step} steps; model in {done}", markup=False)
    return done


def make_trainer(
    kind: str, config: RunConfig, rewards: list[Callable[..., Any]] | None = None
) -> BRPOTrainer | LookAgainSFTTrainer:
    """The trainer of a configuration, with its model and data.

    Args:
        kind: "brpo" or "sft".
        config: the configuration.
        rewards: BRPO's reward functions; None: `brpo_rewards`.

    Raises:
        ValueError: if an entry of the configuration is wrong, or the model lacks the tags.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if config.writer is not None:
        raise ValueError("writer: only a cold start has one (lookagain train coldstart)")
    if kind == "sft" and config.rewards:
        raise ValueError("rewards: only BRPO has them (lookagain train brpo)")
    from ..models.loading import load

    check_run(kind, config.trainer, config.lora)
    check_data(config.data)
    weights = dict(config.rewards).pop("weights", None)
    settings = {"reward_weights": weights} if kind == "brpo" and weights else {}
    try:
        made = BRPOConfig if kind == "brpo" else LookAgainSFTConfig
        args = made(config.output, **{**settings, **config.trainer})
    except TypeError as error:
        raise ValueError(f"trainer: {error}") from error
    set_seed(args.seed)
    model, processor = load(config.model, config.dtype)
    tag_ids(processor)
    keywords: dict[str, Any] = {
        "args": args,
        "train_dataset": read_data(kind, config.data),
        "processing_class": processor,
        "peft_config": _lora(config.lora, model, processor),
    }
    if kind == "sft":
        return LookAgainSFTTrainer(model, **keywords)
    if rewards is None:
        from .rewards import brpo_rewards

        named = {name: value for name, value in config.rewards.items() if name != "weights"}
        rewards = brpo_rewards(processor, **named)
    return BRPOTrainer(model, rewards, **keywords)


def last_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint in a folder, or None; one cut short by a kill is passed over."""
    found = [one for one in folder.glob("checkpoint-*") if (one / "trainer_state.json").is_file()]
    found = [one for one in found if one.name.rsplit("-", 1)[1].isdigit()]
    for one in sorted(found, key=lambda path: -int(path.name.rsplit("-", 1)[1])):
        try:
            json.loads((one / "trainer_state.json").read_text(encoding="utf-8"))
            return one
        except json.JSONDecodeError:
            continue
    return None


def _checkpoint_to_resume(folder: Path, config: RunConfig, resume: bool) -> Path | None:
    """The checkpoint to go on from, after a check that it is of this configuration."""
    found, written = last_checkpoint(folder), folder / "config.yaml"
    if found is None:
        return None
    if not resume:
        raise ValueError(f"{folder} already holds {found.name}; resume it or choose another folder")
    if written.is_file():
        theirs = yaml.safe_load(written.read_text(encoding="utf-8"))
        ours = config.to_dict()
        different = sorted(k for k in ours if k != "output" and ours[k] != theirs.get(k))
        if different:
            names = ", ".join(different)
            raise ValueError(f"{folder} holds a run with another configuration ({names} differ)")
    return found


def _lora(fields: dict[str, Any] | None, model: Any, processor: Any) -> Any:  # noqa: ANN401
    """PEFT's LoraConfig; "tags" as `trainable_token_indices` stands for the rows of the tags."""
    if fields is None:
        return None
    from peft import LoraConfig

    if fields.get("trainable_token_indices") == "tags":
        ids = tag_ids(processor)
        tied = model.config.get_text_config().tie_word_embeddings
        names = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
        fields = {**fields, "trainable_token_indices": dict.fromkeys(names, ids)}
    try:
        return LoraConfig(**fields)
    except TypeError as error:
        raise ValueError(f"lora: {error}") from error


class _Report(TrainerCallback):
    """Writes what the trainer logs: a line of JSON, a line on the console, a few answers."""

    def __init__(self, folder: Path, trainer: Any, console: Console) -> None:  # noqa: ANN401
        self._folder, self._trainer, self._console = folder, trainer, console

    def on_log(self, _: Any, state: Any, __: Any, logs: Any = None, **___: Any) -> None:  # noqa: ANN401
        """Write one log of the main process."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        with open(self._folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        parts = [f"{word} {logs[name]:.4g}" for name, word in _SHOWN.items() if logs.get(name)]
        for name, value in logs.items():
            if name.startswith("rewards/") and name.endswith("/mean") and value is not None:
                parts.append(f"{name.split('/')[1].removesuffix('_reward')} {value:.3f}")
        line = f"step {state.global_step}/{state.max_steps}  " + "  ".join(parts)
        self._console.print(line, markup=False, highlight=False)
        answers = getattr(self._trainer, "_logs", {}).get("completion")
        if answers:
            self._write_sample(state.global_step)

    def _write_sample(self, step: int) -> None:
        """The latest answer with what it was asked and what it earned."""
        logs = self._trainer._logs
        earned = {name: round(values[-1], 3) for name, values in logs["rewards"].items()}
        prompt, answer = (_text(logs[name][-1]) for name in ("prompt", "completion"))
        with open(self._folder / SAMPLES, "a", encoding="utf-8") as file:
            file.write(f"--- step {step}, {earned}\n{prompt}\n>>> {answer}\n\n")


def _rewind_samples(path: Path, step: int) -> None:
    """Drop what was sampled after ``step``: it will be sampled again."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    later = (one.start() for one in _SAMPLE.finditer(text) if int(one[1]) > step)
    write_atomically(path, text[: next(later, len(text))])


def _text(messages: Any) -> str:  # noqa: ANN401 - a string or a list of messages
    """What a prompt or a completion says, pictures left out."""
    if isinstance(messages, str):
        return messages
    words = []
    for message in messages:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        words += [part["text"] for part in parts if part.get("text")]
    return " ".join(words)
