"""Gradient checkpointing that computes again what it computed, whenever `backward` comes.

A layer chooses its attention function by the decoder's config, at the moment it runs. Recomputed
after a session ended, it would run as if the session had never been. So what is checkpointed under
look_again carries the choice along.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")
"""Where transformers' layers and PyTorch's `checkpoint_wrapper` keep what checkpoints them."""


def keep_attention(decoder: nn.Module, attention: str) -> None:
    """Let the checkpointed layers of a decoder be recomputed with the attention named.

    Args:
        decoder: the text decoder; layers that are bound already stay as they are.
        attention: name of the attention function.
    """
    for module in decoder.modules():
        for name in _ATTRIBUTES:
            function = module.__dict__.get(name)
            if function is not None and not _is_bound(function):
                # Not a closure: a copy of the model gets its own config.
                setattr(module, name, partial(_checkpoint, decoder.config, attention, function))


def release_attention(decoder: nn.Module) -> None:
    """Undo `keep_attention`; what was checkpointed until now keeps its attention function."""
    for module in decoder.modules():
        for name in _ATTRIBUTES:
            function = module.__dict__.get(name)
            if _is_bound(function):
                setattr(module, name, function.args[2])


def _is_bound(function: Callable[..., Any] | None) -> bool:
    return isinstance(function, partial) and function.func is _checkpoint


def _checkpoint(
    config: Any,  # noqa: ANN401 - a class per family
    attention: str,
    checkpoint: Callable[..., Any],
    function: Callable[..., Any],
    *args: Any,  # noqa: ANN401
    **keywords: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    return checkpoint(partial(_run, config, attention, function), *args, **keywords)


def _run(
    config: Any,  # noqa: ANN401
    attention: str,
    function: Callable[..., Any],
    *args: Any,  # noqa: ANN401
    **keywords: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    in_force = config._attn_implementation
    if in_force == attention:
        return function(*args, **keywords)
    config._attn_implementation = attention
    try:
        return function(*args, **keywords)
    finally:
        config._attn_implementation = in_force
