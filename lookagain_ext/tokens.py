"""The template's tags as tokens of a model's vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .models import unwrap
from .template import TAGS


def find_reflection_token(tokenizer: Any, token: str) -> int:  # noqa: ANN401 - or a processor
    """Id of the token that opens a reflection.

    Args:
        tokenizer: a tokenizer, or a processor that has one.
        token: its text.

    Raises:
        ValueError: if there is no tokenizer, or the text is not one token of it.
    """
    if tokenizer is None:
        raise ValueError(
            f"the id of {token!r} is unknown: pass the tokenizer, or set reflection_token_id"
        )
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    number = tokenizer.get_vocab().get(token)
    if number is None:
        raise ValueError(
            f"{token!r} is not a token of this tokenizer; "
            "lookagain_ext.add_reflection_tokens(model, tokenizer) adds it"
        )
    return int(number)


@torch.no_grad()
def add_reflection_tokens(model: nn.Module, tokenizer: Any) -> dict[str, int]:  # noqa: ANN401
    """Add the template's ten tags to a vocabulary, with sensible embeddings.

    A tag's row in the input and output embedding becomes the mean of the rows of the tokens that
    spelled it so far. Tags that are tokens already are left as they are. The tags are ordinary
    added tokens, not special ones, so that decoding with `skip_special_tokens=True` keeps them.

    Args:
        model: the model; changed in place, and its embeddings grow if the vocabulary does not fit.
        tokenizer: its tokenizer or processor; changed in place.

    Returns:
        The id of each of the ten tags.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    inner = unwrap(model)
    vocabulary = tokenizer.get_vocab()
    new = [tag for tag in TAGS if tag not in vocabulary]
    pieces = {tag: tokenizer.encode(tag, add_special_tokens=False) for tag in new}
    tokenizer.add_tokens(new)
    ids = {tag: int(tokenizer.convert_tokens_to_ids(tag)) for tag in TAGS}
    rows = inner.get_input_embeddings().weight.shape[0]
    if max(ids.values()) >= rows:
        inner.resize_token_embeddings(max(ids.values()) + 1, mean_resizing=False)
    weights = {id(w): w for w in (_weight(inner.get_input_embeddings()), _weight(_head(inner)))}
    for weight in weights.values():
        if weight is not None:
            before = weight.detach().clone()
            for tag, parts in pieces.items():
                weight[ids[tag]] = before[parts].float().mean(0).to(weight.dtype)
    return ids


def _head(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings()


def _weight(module: nn.Module | None) -> torch.Tensor | None:
    return None if module is None else module.weight
