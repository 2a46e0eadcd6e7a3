"""Supervised fine-tuning of models that look again, on TRL's SFT trainer. Needs the extra `train`.

The last stage of Qwen Look Again (arXiv 2505.23558): the base model learns answers with
reflections, and sees the picture again in each of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..config import LookAgainConfig
from .looking import LookingTrainer, check_adapter, read_look_again
from .trainable import TrainableParts

try:
    from trl import SFTConfig, SFTTrainer
except ModuleNotFoundError as error:
    from .extras import missing_extra

    raise missing_extra(__name__, error) from error

__all__ = ["LookAgainSFTConfig", "LookAgainSFTTrainer"]


@dataclass
class LookAgainSFTConfig(SFTConfig):
    """Settings of a `LookAgainSFTTrainer`: an `SFTConfig` with the paper's values as defaults.

    Attributes:
        look_again: what a reflection of an answer shows: a LookAgainConfig, a dict of its fields,
            "copy", "route" or "off". Kept as a dict.
        train_vision: whether vision tower and projector train.
        train_tags_only: of embedding and head, train only the rows of the template's tags; all
            others keep their bits. With PEFT these two are frozen anyway: name the tags in its
            `trainable_token_indices`.
        log_visual_attention: measure the attention on the picture at each log, see
            `LookingTrainer`.

    Raises:
        ValueError: if a value is not allowed, or does not go with a model that looks again.
    """

    # arXiv 2505.23558, "Settings" of SFT, unless said otherwise.
    learning_rate: float = field(default=1e-5, metadata={"help": "Of AdamW."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Rows of a device."})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "Batches of a step."})
    num_train_epochs: float = field(default=13.0, metadata={"help": "Passes over the data."})
    adam_beta1: float = field(default=0.9, metadata={"help": "Of AdamW."})
    adam_beta2: float = field(default=0.999, metadata={"help": "Of AdamW."})
    warmup_steps: float = field(default=0.01, metadata={"help": "Below 1: a share of all steps."})
    train_vision: bool = field(default=False, metadata={"help": "Train the vision tower."})
    train_tags_only: bool = field(
        default=True, metadata={"help": "Of embedding and head, train the tags' rows only."}
    )
    # This package's own: nothing is cut off, since a cut could go through a picture.
    max_length: int | None = field(default=None, metadata={"help": "TRL has 1024."})
    completion_only_loss: bool | None = field(
        default=True, metadata={"help": "No loss on prompts; TRL decides by the columns."}
    )
    look_again: dict | str | None = field(
        default="copy", metadata={"help": "'copy', 'route', 'off', or fields as a dict or JSON."}
    )

    log_visual_attention: bool = field(
        default=True, metadata={"help": "Measure the attention on the picture at each log."}
    )

    def __post_init__(self) -> None:
        """Check, and bring `look_again` into one form."""
        looking = read_look_again(self.look_again)
        if looking.looks:
            self._check_looking(looking.strategy)
        self.look_again = looking.to_dict()
        super().__post_init__()

    def _check_looking(self, strategy: str) -> None:
        together = f"does not work with look_again={strategy!r}:"
        for name in ("packing", "eval_packing", "padding_free"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}=True {together} sequences that share a row have their visual tokens "
                    f"and positions in one; set {name}=False"
                )
        if not self.completion_only_loss and not self.assistant_only_loss:
            raise ValueError(
                f"completion_only_loss={self.completion_only_loss} {together} a reflection in a "
                "prompt must not trigger, and only the loss tells prompt from answer; give "
                "prompts and completions, or set assistant_only_loss=True"
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} {together} TRL then calls "
                "the model without labels; set it to 0"
            )

    @property
    def look_again_config(self) -> LookAgainConfig:
        """`look_again` as a LookAgainConfig."""
        return LookAgainConfig.from_dict(self.look_again)


class LookAgainSFTTrainer(TrainableParts, LookingTrainer, SFTTrainer):
    """Supervised fine-tuning in which every reflection of an answer is shown the picture again.

    An SFTTrainer with these differences: its forwards run under `look_again`; vision tower and
    projector are frozen; of embedding and head only the rows of the template's tags train. The
    loss is on the answer alone, a mean over all tokens of a step's answers, whatever the number of
    processes and accumulated batches they are spread over. Re-injected tokens are no tokens of the
    sequence, so there is no place where they could have a loss.

    Args:
        model: as in SFTTrainer: a name, a model or a PEFT model. Its vocabulary must have the
            tags: `lookagain_ext.add_reflection_tokens` adds them.
        args: the settings; None: `LookAgainSFTConfig`'s defaults.
        **keywords: as in SFTTrainer. `train_dataset` has the columns `prompt`, `completion` and
            `images` (or `image`).

    Raises:
        ValueError: if `compute_loss_func` comes with "copy" or "route": TRL then calls the model
            without labels, so without a boundary between prompt and answer. If an adapter by
            prompt learning (prompt or prefix tuning) comes with them.
    """

    _tag_names = ["trl", "sft"]

    def __init__(
        self,
        model: str | nn.Module,
        args: LookAgainSFTConfig | None = None,
        **keywords: Any,  # noqa: ANN401 - as SFTTrainer's
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = LookAgainSFTConfig(f"{name.rstrip('/').split('/')[-1]}-SFT")
        self.look_again_config = args.look_again_config
        check_adapter(model, keywords.get("peft_config"), self.look_again_config)
        if self.look_again_config.looks and keywords.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func does not work with "
                f"look_again={self.look_again_config.strategy!r}: TRL then calls the model "
                "without labels"
            )
        super().__init__(model, args=args, **keywords)
        # TRL's loss takes the number of tokens of the whole batch; transformers counts them only
        # for models that say their own forward takes it, which Qwen's do not.
        self.model_accepts_loss_kwargs = True
        self._choose_trainable(args.train_vision, args.train_tags_only)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ANN401 - as SFTTrainer's
    ) -> Any:  # noqa: ANN401 - a loss, or with the outputs
        """SFTTrainer's; the outputs' logits are those of the forward that the loss is of.

        SFTTrainer asks for them without labels. No boundary between prompt and answer is known
        then: a reflection in a prompt would trigger, and ROUTE rank by another attention.
        """
        told = {"num_items_in_batch": num_items_in_batch}
        if not (return_outputs and self.look_again_config.looks):
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **told)
        loss = super().compute_loss(model, inputs, **told)
        with torch.no_grad():
            return loss, model(**inputs)
