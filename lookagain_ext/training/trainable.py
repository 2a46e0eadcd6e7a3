"""Which parameters train: the vision tower frozen, single rows of the vocabulary trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..models import family_of, unwrap
from ..template import TAGS

__all__ = ["TrainableParts", "freeze_vision", "tag_ids", "train_only_rows"]

_KEEPS_ZERO_GRADIENT = ("adamw", "sgd", "lion", "paged_adamw", "paged_lion", "rmsprop", "adagrad")
"""Optimizers (first letters of their names) that leave a number alone whose gradients are all 0."""


def freeze_vision(model: nn.Module) -> list[str]:
    """Freeze the vision tower and the projector behind it.

    Args:
        model: a model of a known family, or a wrapper of one; changed in place.

    Returns:
        Names of the parameters that are frozen now, as in the unwrapped model.
    """
    visual = family_of(model).base.visual
    visual.requires_grad_(False)
    frozen = {id(parameter) for parameter in visual.parameters()}
    return [name for name, one in unwrap(model).named_parameters() if id(one) in frozen]


def tag_ids(tokenizer: Any) -> list[int]:  # noqa: ANN401 - tokenizers share no base class
    """Ids of the template's tags in a vocabulary, ascending.

    Args:
        tokenizer: a tokenizer, or a processor that has one.

    Raises:
        ValueError: if a tag is not one token of it.
    """
    vocabulary = getattr(tokenizer, "tokenizer", tokenizer).get_vocab()
    if missing := [tag for tag in TAGS if tag not in vocabulary]:
        raise ValueError(
            f"{', '.join(missing)} are not tokens of this tokenizer; "
            "lookagain_ext.add_reflection_tokens(model, tokenizer) adds them"
        )
    return sorted(vocabulary[tag] for tag in TAGS)


def train_only_rows(model: nn.Module, rows: Iterable[int]) -> list[nn.Parameter]:
    """Let only some rows of the input embedding and of the head train.

    The gradient of every other row becomes 0 before it is accumulated, so an optimizer without
    weight decay on these parameters leaves their bits alone. Parameters that do not require a
    gradient are left as they are; tied ones count as one.

    Args:
        model: the model; changed in place.
        rows: the ids whose rows train.

    Returns:
        The parameters concerned: keep weight decay off them.

    Raises:
        ValueError: if there is no such row.
    """
    inner = unwrap(model)
    modules = (inner.get_input_embeddings(), inner.get_output_embeddings())
    weights = {id(one.weight): one.weight for one in modules if one is not None}
    found = [weight for weight in weights.values() if weight.requires_grad]
    kept = torch.tensor(sorted(set(rows)), dtype=torch.int64)
    for weight in found:
        if len(kept) and not 0 <= int(kept[0]) <= int(kept[-1]) < weight.shape[0]:
            raise ValueError(
                f"rows must lie between 0 and {weight.shape[0] - 1}, got {kept.tolist()}"
            )
    for weight in found:
        weight.register_hook(_RowGradient(kept))
    return found


class _RowGradient:
    """A gradient hook: the rows that train keep theirs, all others get 0, whatever they had."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def __call__(self, gradient: Tensor) -> Tensor:
        self._rows = self._rows.to(gradient.device)
        return torch.zeros_like(gradient).index_copy_(0, self._rows, gradient[self._rows])


class TrainableParts:
    """What a trainer needs to freeze parts; to be put before a transformers Trainer."""

    _without_decay: frozenset[int] = frozenset()

    def _choose_trainable(self, vision: bool, tags_only: bool) -> None:
        """Freeze what does not train; to be called when the model is there.

        Args:
            vision: whether vision tower and projector train.
            tags_only: whether only the tags' rows of embedding and head train.

        Raises:
            ValueError: if `tags_only` cannot be exact here.
        """
        if not vision:
            freeze_vision(self.model)
        head = unwrap(self.model).get_output_embeddings()
        if not hasattr(head, "bias"):  # PEFT's wrapper of single rows: TRL's fused head asks for it
            head.bias = None
        if not tags_only:
            return
        ids = tag_ids(self.processing_class)
        if self.is_fsdp_enabled:
            raise ValueError(
                "train_tags_only=True does not work under FSDP, which hides the rows of a "
                "parameter; use DDP or DeepSpeed, or set train_tags_only=False"
            )
        tables = train_only_rows(self.model, ids)
        self._without_decay = frozenset(map(id, tables))
        self._check_optimizer()

    def _check_optimizer(self) -> None:
        """Refuse optimizers that move rows whose gradient is 0, the Trainer's own or given ones."""
        given, chosen = self.optimizer, self.optimizer_cls_and_kwargs
        name = str(getattr(self.args.optim, "value", self.args.optim))
        what, kind = f"optim={name!r}", name
        if given is not None or chosen is not None:
            name = type(given).__name__ if given is not None else chosen[0].__name__
            what, kind = f"the optimizer {name}", name.lower()
            kind = "paged_" + kind.removeprefix("paged") if kind.startswith("paged") else kind
        # transformers calls none of its own plain "adam"; without decay it keeps such rows too.
        if not kind.startswith(_KEEPS_ZERO_GRADIENT) and kind != "adam":
            raise ValueError(
                f"train_tags_only=True with {what}: this optimizer may move rows whose "
                "gradient is 0; use an AdamW or SGD, or set train_tags_only=False"
            )
        for group in [] if given is None else given.param_groups:
            decays = group.get("weight_decay", 0)
            if decays and not self._without_decay.isdisjoint(map(id, group["params"])):
                raise ValueError(
                    f"train_tags_only=True with an optimizer whose weight_decay of embedding and "
                    f"head is {decays}: it would move every row; put them in a group with "
                    "weight_decay=0, or set train_tags_only=False"
                )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The Trainer's, without parameters of which only some rows train."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        names = super().get_decay_parameter_names(model)
        return [one for one in names if id(parameters.get(one)) not in self._without_decay]
