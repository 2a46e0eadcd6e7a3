"""BRPO (Qwen Look Again, arXiv 2505.23558): TRL's GRPO trainer with the paper's settings.

Needs the extra `train`. BRPO's loss is GRPO's; what makes it BRPO are its three rewards, which are
handed over as reward functions, and its settings, which are the defaults of `BRPOConfig`.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ..config import LookAgainConfig
from ..models import unwrap
from ..template import REFLECTION, REFLECTION_END
from .looking import LookingTrainer, check_adapter, read_look_again
from .trainable import TrainableParts

try:
    from trl import GRPOConfig, GRPOTrainer
except ModuleNotFoundError as error:
    from .extras import missing_extra

    raise missing_extra(__name__, error) from error

__all__ = ["BRPOConfig", "BRPOTrainer", "reflection_lengths"]


@dataclass
class BRPOConfig(GRPOConfig):
    """Settings of a `BRPOTrainer`: a `GRPOConfig` with the paper's values as defaults.

    What the paper does not give is TRL's default. Its batch (16, accumulated twice, on 8 GPUs) is
    left to you: set `per_device_train_batch_size` and `gradient_accumulation_steps`.

    Attributes:
        look_again: whether rollouts and log-probabilities see re-injected visual tokens: a
            LookAgainConfig, a dict of its fields, "copy", "route" or "off". "off" is the paper's
            BRPO, whose rollouts reflect on text alone. Kept as a dict.
        train_vision: whether vision tower and projector train.
        train_tags_only: of embedding and head, train only the rows of the template's tags.
        log_visual_attention: measure the attention on the picture at each log, see
            `LookingTrainer`.

    Raises:
        ValueError: if a value is not allowed, or rollouts that look again are asked of an engine
            that cannot do it.
    """

    # arXiv 2505.23558, "Settings" of BRPO, unless said otherwise.
    num_generations: int | None = field(default=8, metadata={"help": "Answers of a group, G."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling."})
    beta: float = field(default=0.1, metadata={"help": "Weight of the KL penalty."})
    learning_rate: float = field(default=1e-6, metadata={"help": "Of AdamW."})
    adam_beta1: float = field(default=0.9, metadata={"help": "Of AdamW."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Of AdamW; TRL has 0.999."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "Of AdamW."})
    warmup_steps: float = field(default=0.01, metadata={"help": "Below 1: a share of all steps."})
    max_completion_length: int | None = field(
        default=1024, metadata={"help": "Longest answer in tokens; re-injected ones not counted."}
    )
    # Eq. 2 of the paper: the mean over each answer's tokens, then over the answers.
    loss_type: str = field(default="grpo", metadata={"help": "TRL has 'dapo'."})
    # Eq. 3 of the paper: plain k3, not weighted by the ratio.
    use_bias_correction_kl: bool = field(default=False, metadata={"help": "TRL has True."})
    # This package's own.
    look_again: dict | str | None = field(
        default="off", metadata={"help": "'copy', 'route', 'off', or fields as a dict or JSON."}
    )
    train_vision: bool = field(default=True, metadata={"help": "Train the vision tower."})
    train_tags_only: bool = field(
        default=False, metadata={"help": "Of embedding and head, train the tags' rows only."}
    )

    log_visual_attention: bool = field(
        default=True, metadata={"help": "Measure the attention on the picture at each log."}
    )

    def __post_init__(self) -> None:
        """Check, and bring `look_again` into one form."""
        looking = read_look_again(self.look_again)
        for name in ("use_vllm", "use_transformers_continuous_batching"):
            if looking.looks and getattr(self, name):
                raise ValueError(
                    f"{name}=True does not work with look_again={looking.strategy!r}: that engine "
                    "does not show visual tokens again, so rollouts and log-probabilities would "
                    f"disagree; set {name}=False, or look_again='off'"
                )
        self.look_again = looking.to_dict()
        super().__post_init__()

    @property
    def look_again_config(self) -> LookAgainConfig:
        """`look_again` as a LookAgainConfig."""
        return LookAgainConfig.from_dict(self.look_again)


class BRPOTrainer(TrainableParts, LookingTrainer, GRPOTrainer):
    """Balanced Reflective Policy Optimization (arXiv 2505.23558), on models that look again.

    A GRPOTrainer with these differences:

    - With `look_again` "copy" or "route", answers are sampled under `look_again`, and the
      log-probabilities of the policy, of the old policy and of the reference model are computed
      under it as well, so that they are those of the answers as they were sampled. The reference
      is the reloaded model, or with PEFT the model without its adapter, as in TRL; a warning says
      so where the model was changed after it was loaded. Only a `<REFLECTION>` in the answer
      triggers.
    - ROUTE's choice of tokens is not carried from the rollout to the loss but computed again,
      deterministically, from the same attention: each model, the reference too, looks where its
      own attention was. Under the same parameters the choice is the rollout's, except where the
      two tokens at the cut are equal within the precision of the dtype.
    - It logs `reflections/count` (a mean over answers), `reflections/length` (tokens, a mean over
      reflections) and `reflections/answers` (the share of answers with any).
    - It logs the seconds of a step by part: `seconds/rollout` (answers are sampled),
      `seconds/scoring` (rewards, and log-probabilities of the old policy and of the reference)
      and `seconds/training` (forward and backward).
    - A resumed run takes its data in the order in which it would have gone on.
    - `train_vision` and `train_tags_only` choose what trains.

    Args:
        model: as in GRPOTrainer: a name, a model or a PEFT model.
        reward_funcs: reward functions in TRL's signature. Count tags on `completion_ids` unless
            they are ordinary tokens: special ones are missing from the text.
        args: the settings; None: `BRPOConfig`'s defaults.
        **keywords: as in GRPOTrainer.

    Raises:
        ValueError: if `tools`, `environment_factory` or `rollout_func` come with "copy" or
            "route": their prompts grow with what was answered, where reflections do not trigger.
            If an adapter by prompt learning (prompt or prefix tuning) comes with them.

    Example:
        >>> trainer = BRPOTrainer(
        ...     "Qwen/Qwen2.5-VL-7B-Instruct",
        ...     reward_funcs=rewards,
        ...     args=BRPOConfig("out", look_again="copy"),
        ...     train_dataset=dataset,  # columns: prompt, images, and what the rewards read
        ... )
        >>> trainer.train()
    """

    _tag_names = ["trl", "brpo"]
    _name = "BRPO"

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Any,  # noqa: ANN401 - as GRPOTrainer's
        args: BRPOConfig | None = None,
        **keywords: Any,  # noqa: ANN401 - as GRPOTrainer's
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = BRPOConfig(f"{name.rstrip('/').split('/')[-1]}-BRPO")
        self.look_again_config = args.look_again_config
        check_adapter(model, keywords.get("peft_config"), self.look_again_config)
        for name in ("tools", "environment_factory", "rollout_func"):
            if self.look_again_config.looks and keywords.get(name):
                raise ValueError(
                    f"{name} does not work with look_again={self.look_again_config.strategy!r}: "
                    "reflections of earlier turns would count in the loss but not in the rollout"
                )
        self._seconds: Counter[str] = Counter()
        self._logged_step: int | None = None
        super().__init__(model, reward_funcs, args=args, **keywords)
        self._choose_trainable(args.train_vision, args.train_tags_only)
        if not isinstance(model, str):
            self._compare_reference()

    def _compare_reference(self) -> None:
        """Warn if the reference, which TRL loads anew, is not the model that was handed over."""
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if self.ref_model is None or sharded:
            return
        theirs = dict(unwrap(self.ref_model).named_parameters())
        for name, ours in unwrap(self.model).named_parameters():
            if name not in theirs or not _equal(ours, theirs[name]):
                warnings.warn(
                    f"the reference model is {self.model.config._name_or_path!r} as it is saved, "
                    f"and {name} of the model is another: the KL penalty (beta={self.beta}) draws "
                    "it back from the first step on; save the model and load it from there, or "
                    "set beta=0",
                    stacklevel=3,
                )
                return

    def _models_that_look(self) -> list[nn.Module]:
        reference = [] if self.ref_model is None else [self.ref_model]
        return [*super()._models_that_look(), *reference]

    def _get_train_sampler(self, dataset: Any = None) -> Any:  # noqa: ANN401 - as GRPOTrainer's
        """GRPOTrainer's, with an order that depends on the epoch alone.

        Its own order goes on from the epoch before, so that a resumed run would see the first
        epoch's order again.
        """
        sampler = super()._get_train_sampler(dataset)
        generator = getattr(sampler, "generator", None)
        if generator is not None:
            sampler.set_epoch = partial(_seed_epoch, generator, self.args.seed)
        return sampler

    def _generate(self, *args: Any, **keywords: Any) -> Any:  # noqa: ANN401 - as GRPOTrainer's
        if not self.model.training:  # an evaluation's, no part of a step
            return super()._generate(*args, **keywords)
        return self._timed("rollout", super()._generate, *args, **keywords)

    def _generate_and_score_completions(self, *args: Any, **keywords: Any) -> Any:  # noqa: ANN401
        made = super()._generate_and_score_completions
        if not self.model.training:
            return made(*args, **keywords)
        return self._timed("scoring", made, *args, **keywords)

    def training_step(self, *args: Any, **keywords: Any) -> Any:  # noqa: ANN401
        """GRPOTrainer's, timed."""
        if self._logged_step is None:
            self._logged_step = self.state.global_step
        return self._timed("training", super().training_step, *args, **keywords)

    def train(self, *args: Any, **keywords: Any) -> Any:  # noqa: ANN401 - as GRPOTrainer's
        """GRPOTrainer's; its steps are timed from the first one on."""
        self._seconds.clear()
        self._logged_step = None
        return super().train(*args, **keywords)

    def _timed(self, part: str, work: Any, *args: Any, **keywords: Any) -> Any:  # noqa: ANN401
        """Do it, and count its seconds without those of the parts within it."""
        within, begun = self._seconds.total(), time.perf_counter()
        result = work(*args, **keywords)
        within = self._seconds.total() - within
        self._seconds[part] += time.perf_counter() - begun - within
        return result

    def log(self, logs: dict[str, float], *args: Any, **keywords: Any) -> None:  # noqa: ANN401
        """GRPOTrainer's; also says where the time of a step went."""
        first = self.state.global_step if self._logged_step is None else self._logged_step
        steps = self.state.global_step - first
        if self.model.training and steps > 0:
            for part, seconds in self._seconds.items():
                self._metrics["train"][f"seconds/{part}"] = [seconds / steps]
            self._seconds.clear()
            self._logged_step = self.state.global_step
        super().log(logs, *args, **keywords)

    def _calculate_rewards(
        self,
        inputs: Any,  # noqa: ANN401 - as GRPOTrainer's
        prompts: Any,  # noqa: ANN401
        completions: Any,  # noqa: ANN401
        completion_ids_list: list[list[int]],
    ) -> Any:  # noqa: ANN401
        """GRPOTrainer's; also notes how much was reflected."""
        vocabulary = self._tokenizer.get_vocab()
        opening, closing = vocabulary.get(REFLECTION), vocabulary.get(REFLECTION_END)
        if opening is not None and completion_ids_list:
            found = [reflection_lengths(ids, opening, closing) for ids in completion_ids_list]
            answers, lengths = len(found), sum(found, [])
            self._log_metric("reflections/count", len(lengths) / answers)
            self._log_metric("reflections/answers", sum(map(bool, found)) / answers)
            if lengths:
                self._log_metric("reflections/length", sum(lengths) / len(lengths))
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)


@torch.no_grad()
def _equal(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two parameters are the same to the lower precision of the two."""
    dtype = min(ours.dtype, theirs.dtype, key=lambda one: one.itemsize)
    return ours.shape == theirs.shape and torch.equal(ours.to(dtype), theirs.to(ours.device, dtype))


def _seed_epoch(generator: Generator, seed: int, epoch: int) -> None:
    generator.manual_seed(seed + epoch)


def reflection_lengths(ids: list[int], opening: int, closing: int | None) -> list[int]:
    """Tokens in each reflection of an answer, tags not counted.

    Args:
        ids: the answer's tokens.
        opening: id of the tag that opens a reflection.
        closing: id of the tag that closes it; one that is never closed ends with the answer, and
            a tag that opens one within another begins a new one.
    """
    lengths: list[int] = []
    inside = False
    for token in ids:
        if token == opening:
            inside = True
            lengths.append(0)
        elif token == closing:
            inside = False
        elif inside:
            lengths[-1] += 1
    return lengths
