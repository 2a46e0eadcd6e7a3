"""torch.func and forward-mode differentiation: what the ops do where these follow a tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference
from ..visual import VisualContext

_is_batched = torch._C._functorch.is_legacy_batchedtensor
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
transforms = torch._C._functorch.peek_interpreter_stack
"""The innermost transform of torch.func that is in force, or None."""


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func or forward-mode differentiation follows one of the tensors.

    A kernel reads memory: it would drop a dual tensor's tangent, and a wrapped tensor has none.
    Under torch.compile nobody asks: `refuse_tangents` stands in the compiled op.
    """
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level < 0 and transforms() is None:
        return False
    return any(
        tensor is not None
        and (_is_wrapped(tensor) or forward_ad.unpack_dual(tensor).tangent is not None)
        for tensor in tensors
    )


def refuse_tangents() -> None:
    """Raise within a compiled op where tensors may be dual: tangents do not come that far."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            "routed_attention has no forward-mode derivative under torch.compile or another "
            "tracer: call it outside of a compiled function there, or use "
            "lookagain_ext.reference.routed_attention"
        )


def refuse_transform(**given: object) -> None:
    """Raise by name if something is given that works with a plain `backward()` only."""
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(
                f"routed_attention with {name} works under neither forward-mode differentiation "
                "nor torch.func; leave it out there, or call backward() without them"
            )


def refuse_batch(grad_out: Tensor) -> None:
    """Raise if a gradient is a batch of them that torch's older vmap made."""
    if _is_batched(grad_out):
        raise NotImplementedError(
            "routed_attention's backward takes no batch of gradients from is_grads_batched or "
            "vectorize=True: use torch.func.jacrev, or torch.func.vmap over torch.autograd.grad"
        )


def transformed_backward(
    grad_out: Tensor, tensors: list[Tensor | None], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, the first three of `tensors`.

    `grad_out` is several gradients at once, or one with a tangent.
    """
    query, key, value, key_start, key_length, *fields = tensors
    visual = None if fields[0] is None else VisualContext(*fields)
    limits = {"key_start": key_start, "key_length": key_length}
    heads = (query, key, value)
    return reference.routed_attention_backward(grad_out, *heads, visual, scale=scale, **limits)
