"""The one flag of every trainer, `look_again`, and the sessions that it opens and closes."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import LookAgainConfig
from ..generation import LookAgainSession, look_again
from ..models import unwrap
from ..models.loading import ADAPTER_CONFIG
from ..trace import Trace
from .checkpoint import write_atomically

__all__ = ["LookingTrainer", "check_adapter", "read_look_again"]

_STRATEGIES = ("copy", "route", "off")


def read_look_again(value: LookAgainConfig | dict[str, Any] | str | None) -> LookAgainConfig:
    """The configuration that a trainer's `look_again` stands for.

    Args:
        value: a LookAgainConfig, a dict of its fields (or the same as JSON, from a command line),
            one of "copy", "route" and "off", or None for "off".

    Raises:
        TypeError: if it is none of these.
        ValueError: if a word or a field is unknown, or what it asks for cannot be trained.
    """
    if value is None:
        value = "off"
    if isinstance(value, str):
        if value.lstrip().startswith("{"):
            value = json.loads(value)
        elif value in _STRATEGIES:
            value = {"strategy": value}
        else:
            wanted = ", ".join(map(repr, _STRATEGIES))
            raise ValueError(f"look_again must be one of {wanted} or a dict, got {value!r}")
    if isinstance(value, dict):
        value = LookAgainConfig.from_dict(value)
    if not isinstance(value, LookAgainConfig):
        hint = ": in YAML, put off in quotes" if value is False else ""
        raise TypeError(
            "look_again must be a LookAgainConfig, a dict of its fields, 'copy', 'route' or "
            f"'off', got {value!r}{hint}"
        )
    if value.looks and value.keep == "latest":
        raise ValueError(
            "look_again: keep='latest' cannot be trained, since one forward over a whole sequence "
            "cannot forget a re-injection; use keep='all'"
        )
    return value


class LookingTrainer:
    """What a trainer needs to look again; to be put before a transformers Trainer.

    Sessions are open while the trainer trains, evaluates, predicts or saves, on every model that
    `_models_that_look` names, and closed when it is done, also by an error. What is saved says how
    the model looks again. With "off" nothing is opened but for the moment in which
    `visual_attention` is measured.

    TRL's metric `num_tokens` gets two beside it: `tokens_per_second`, without the time of
    evaluations, and `visual_attention`, the share of the answers' attention that is on the picture,
    re-injected tokens included. It is that of one batch with a picture in each step that is logged
    (by `logging_steps`), of its rows with a picture, counted in the step's own backward, and
    changes nothing about the step. The mean is over heads and over the layers that the backward
    runs through: not those below everything that trains. With "off", backend "reencode" or
    `torch_compile`, where other attention trains, it takes a forward of its own, in evaluation mode
    and without gradients, which leaves the random numbers of the step as they were; the mean is
    over all layers then, and of "reencode" it is the share that "virtual" would have. Where that
    forward fails the metric is left out, with a warning.

    Weights are read back from checkpoints through `from_pretrained`. The Trainer's own way takes
    the names in the file for those of the module, which for Qwen2.5-VL they are not, and goes on
    from the weights that the model had, with no more than a warning about missing keys. A
    checkpoint of the last step is taken as it is: nothing is trained on top of it.

    Attributes:
        look_again_config: how the models look again.
        look_again_sessions: the open sessions, the policy's first; empty when none is open.
    """

    look_again_config: LookAgainConfig
    look_again_sessions: tuple[LookAgainSession, ...] = ()
    _pace: tuple[float, float] | None = None
    _paused = 0.0
    _measured = 0
    _measurable = True
    _measuring: LookAgainSession | None = None

    def _models_that_look(self) -> list[nn.Module]:
        """The models to open sessions on; a trainer with more than one adds to it."""
        return [self.model]

    @contextmanager
    def looking(self) -> Iterator[tuple[LookAgainSession, ...]]:
        """The models look again within this context; it may nest.

        Yields:
            The sessions, one for each model; none with "off".
        """
        if self.look_again_sessions or not self.look_again_config.looks:
            yield self.look_again_sessions
            return
        with ExitStack() as stack:
            opened = []
            for model in self._models_that_look():
                session = look_again(model, self.look_again_config, self.processing_class)
                opened.append(stack.enter_context(session))
            self.look_again_sessions = tuple(opened)
            try:
                yield self.look_again_sessions
            finally:
                self.look_again_sessions = ()

    def train(self, *args: Any, **keywords: Any) -> Any:  # noqa: ANN401 - as the Trainer's
        """Train within `looking`; arguments and result are the Trainer's."""
        self._measured, self._measuring = 0, None  # an earlier run's may have been cut off
        self._pace, self._paused = None, 0.0
        with self.looking():
            return super().train(*args, **keywords)

    def _run_epoch(self, *args: Any, **keywords: Any) -> None:  # noqa: ANN401 - as the Trainer's
        """The Trainer's; nothing when all steps are done.

        The Trainer compares with the last step only after a step, so that resuming from the last
        checkpoint would train one more.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **keywords)

    def log(self, logs: dict[str, float], *args: Any, **keywords: Any) -> None:  # noqa: ANN401
        """The Trainer's; also the tokens a second since the log before, and what was measured."""
        metrics = self._metrics["train"]
        if self.model.training and metrics.get("num_tokens"):
            tokens, now = metrics["num_tokens"][-1], time.perf_counter()
            if self._pace is not None and tokens > self._pace[0]:
                speed = (tokens - self._pace[0]) / (now - self._pace[1] - self._paused)
                metrics["tokens_per_second"] = [speed]
            self._pace, self._paused = (tokens, now), 0.0
        session, self._measuring = self._measuring, None
        share = None if session is None else _share(session.trace)
        if share is not None:
            metrics["visual_attention"] = [share]
        super().log(logs, *args, **keywords)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        *args: Any,  # noqa: ANN401 - as the Trainer's
        **keywords: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """The Trainer's; when a log is due, its backward counts the attention on the picture."""
        if not self._is_measured(inputs):
            return super().compute_loss(model, inputs, *args, **keywords)
        self._measured = self.state.global_step + 1
        looking = self.look_again_config
        if not looking.looks or looking.backend == "reencode" or self.args.torch_compile:
            share = self._share_beside_the_step(model, inputs)
            if share is not None:
                self._metrics["train"]["visual_attention"] = [share]
            return super().compute_loss(model, inputs, *args, **keywords)
        config = replace(looking, track_attention=True)
        # What is checkpointed now is recomputed so, though the session ends before the backward.
        with look_again(self.model, config, self.processing_class) as self._measuring:
            return super().compute_loss(model, inputs, *args, **keywords)

    def _is_measured(self, inputs: dict[str, Any]) -> bool:
        """Whether this is the first batch with a picture of a step that will be logged."""
        step, every = self.state.global_step + 1, max(1, int(self.state.logging_steps))
        first = self.args.logging_first_step and step == 1
        due = self.args.logging_strategy == "steps" and (first or step % every == 0)
        due = due and self.args.log_visual_attention and self._measurable and self.model.training
        pictures = ("pixel_values", "pixel_values_videos")
        pictured = any(inputs.get(name) is not None for name in pictures)
        padded = bool({"attention_mask", "completion_mask"} & set(inputs))  # not packed
        return due and pictured and padded and step != self._measured

    def _share_beside_the_step(self, model: nn.Module, inputs: dict[str, Any]) -> float | None:
        """`_share_of_a_forward`; None, and one warning, if this model cannot be measured."""
        try:
            with _undisturbed(self.model):
                return self._share_of_a_forward(model, inputs)
        except Exception as error:
            self._measurable = False
            reason = " ".join(str(error).split())
            warnings.warn(
                f"visual_attention is left out, its forward failed ({type(error).__name__}: "
                f"{reason}); log_visual_attention=False leaves it out without a try",
                stacklevel=2,
            )
            return None

    @torch.no_grad()
    def _share_of_a_forward(self, model: nn.Module, inputs: dict[str, Any]) -> float | None:
        """Share of the answers' attention that is on the picture, by a forward of its own."""
        names = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
        given = {name: inputs[name] for name in names if inputs.get(name) is not None}
        if "completion_ids" in inputs:
            kinds = ("prompt", "completion")
            ids, mask = (torch.cat([inputs[f"{k}_{n}"] for k in kinds], 1) for n in ("ids", "mask"))
            labels = ids.masked_fill(mask == 0, -100)
            labels[:, : inputs["prompt_ids"].shape[1]] = -100
        else:
            ids, mask, labels = (inputs[n] for n in ("input_ids", "attention_mask", "labels"))
        given |= {"input_ids": ids, "attention_mask": mask, "labels": labels}
        config = replace(self.look_again_config, track_attention=True, backend="virtual")
        with (
            look_again(self.model, config, self.processing_class) as session,
            self.accelerator.autocast(),
        ):
            model(**given, use_cache=False, fused_lm_head=True)  # as TRL calls it
            return _share(session.trace)

    @contextmanager
    def _beside_training(self) -> Iterator[None]:
        """What is done within this context does not count in `tokens_per_second`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begun

    def evaluate(self, *args: Any, **keywords: Any) -> Any:  # noqa: ANN401 - as the Trainer's
        """Evaluate within `looking`; arguments and result are the Trainer's."""
        with self.looking(), self._beside_training():
            return super().evaluate(*args, **keywords)

    def predict(self, *args: Any, **keywords: Any) -> Any:  # noqa: ANN401 - as the Trainer's
        """Predict within `looking`; arguments and result are the Trainer's."""
        with self.looking(), self._beside_training():
            return super().predict(*args, **keywords)

    def save_model(
        self,
        output_dir: str | None = None,
        *args: Any,  # noqa: ANN401 - as the Trainer's
        **keywords: Any,  # noqa: ANN401
    ) -> None:
        """The Trainer's; what is saved says how the model looks again, "off" too.

        A model says it in its `config.json`. An adapter has none: it says it in `lookagain.json`,
        which `lookagain_ext.load` reads.
        """
        with self.looking() as sessions:
            used = sessions[0].config if sessions else self.look_again_config
            with _written_in(unwrap(self.model).config, used):
                super().save_model(output_dir, *args, **keywords)
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if self.args.should_save and (folder / "adapter_config.json").is_file():
            plain = json.dumps(used.to_dict(), indent=2) + "\n"
            write_atomically(folder / ADAPTER_CONFIG, plain)

    def _load_from_checkpoint(self, folder: str, model: nn.Module | None = None) -> None:
        """The Trainer's, by the names that `save_pretrained` gave to the weights."""
        target = self.model if model is None else model
        if self._reads_back(target):
            loaded = type(target).from_pretrained(folder, dtype=target.dtype)
            target.load_state_dict(loaded.state_dict())
        else:
            super()._load_from_checkpoint(folder, model)

    def _load_best_model(self) -> None:
        """The Trainer's, by the names that `save_pretrained` gave to the weights."""
        if self._reads_back(self.model) and not self.is_deepspeed_enabled:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _reads_back(self, model: nn.Module) -> bool:
        """Whether a checkpoint of it is what its class's `from_pretrained` reads."""
        whole = isinstance(model, PreTrainedModel) and not self.is_fsdp_enabled
        return whole and not getattr(model, "is_quantized", False)


def _share(trace: Trace | None) -> float | None:
    """`Trace.answer_share` of the rows with a picture; None if nothing was measured."""
    if trace is None or trace.answer_attention is None:  # its forward or its backward failed
        return None
    rows = torch.tensor([bool(grids) for grids in trace.grids])
    tokens = int(trace.answer_tokens[rows].sum())
    return float(trace.answer_attention[rows].sum() / tokens) if tokens else None


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards every module's mode and the random numbers are as before."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    others = {} if device.type in ("cpu", "mps") else {"device_type": device.type}
    with torch.random.fork_rng([device] if others else [], **others):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def _written_in(config: Any, looking: LookAgainConfig) -> Iterator[None]:  # noqa: ANN401
    """A model's configuration says how it looks within this context, and then what it said."""
    before = vars(config).get("lookagain")
    config.lookagain = looking.to_dict()
    try:
        yield
    finally:
        if before is None:
            del config.lookagain
        else:
            config.lookagain = before


def check_adapter(model: Any, adapter: Any, looking: LookAgainConfig) -> None:  # noqa: ANN401
    """Refuse adapters with which a model cannot look again.

    Args:
        model: a name, a model or a PEFT model.
        adapter: PEFT's configuration of an adapter that the model gets, or None.
        looking: how the model looks.

    Raises:
        ValueError: if the adapter puts learned vectors before the tokens (prompt learning).
    """
    if adapter is None:
        adapter = getattr(model, "active_peft_config", None)
    if looking.looks and getattr(adapter, "is_prompt_learning", False):
        raise ValueError(
            f"{type(adapter).__name__} does not work with look_again={looking.strategy!r}: it puts "
            "learned vectors before the tokens, whose places are then others; use LoRA, or "
            "look_again='off'"
        )
