"""What else computes a training step's attention: SDPA, FlexAttention, flash-attn, our own kernels.

A kernel that knows causal masks only is given as much work as ours has: plain causal attention over
a sequence so long that it has as many (query, key) pairs. FlexAttention is given the very same
work, as one would write it without us: the picture's keys and values appended once for each
re-injection, the keys turned to their new positions, and a block mask that lets a query see the
copies from `start` on. The copying is part of what is timed, making the mask is not.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lookagain_ext import VisualContext
from lookagain_ext.ops import _cuda, _cuda_many
from lookagain_ext.rope import turn

from .gpu_training_problems import Setting, Shape

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
FLASH_ATTENTION = {"flash-attn": "flash_attn", "flash-attn 3": "flash_attn_interface"}


@dataclass(frozen=True)
class Peer:
    """One way to compute a shape's attention, or a replacement of as many FLOP.

    Attributes:
        call: the attention.
        same_work: whether it takes our inputs and gives our results; otherwise it is given plain
            causal attention of `Shape.same_flop` tokens.
    """

    call: Attention
    same_work: bool = False


class LeftOut(Exception):  # noqa: N818 - a measurement that is not made
    """Why a peer is not measured."""


def sdpa(on_gpu: bool) -> dict[str, Attention]:
    """torch's SDPA with the backends that are to be compared with."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def with_backend(backend: SDPBackend) -> Attention:
        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=True
                )

        return call

    if not on_gpu:
        return {"SDPA math": with_backend(SDPBackend.MATH)}
    return {
        "SDPA flash": with_backend(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": with_backend(SDPBackend.CUDNN_ATTENTION),
    }


@contextmanager
def through(version: str) -> Iterator[None]:
    """Has all that goes through torch's FlashAttention go through another version of it.

    Args:
        version: "FA3" or "FA4", as torch names them.

    Raises:
        LeftOut: if torch cannot, or that version is not there.
    """
    from torch.nn import attention

    if not hasattr(attention, "activate_flash_attention_impl"):
        raise LeftOut(f"torch {torch.__version__} has its own FlashAttention only")
    try:
        attention.activate_flash_attention_impl(version)
    except ModuleNotFoundError as error:
        raise LeftOut(f"{error.name} is not installed") from None
    except Exception as error:  # noqa: BLE001 - see `first_line`
        raise LeftOut(first_line(error)) from None
    try:
        yield
    finally:
        attention.restore_flash_attention_impl()


def flash_attention(module: str) -> Attention:
    """flash-attn's causal attention: of `flash_attn`, or version 3's `flash_attn_interface`.

    Raises:
        LeftOut: if it is not there.
    """
    try:
        function = importlib.import_module(module).flash_attn_func
    except ModuleNotFoundError:
        raise LeftOut(f"{module} is not installed") from None
    except Exception as error:  # noqa: BLE001 - a build for another torch fails in many ways
        raise LeftOut(f"{module} cannot be imported: {first_line(error)}") from None

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        turned = (x.transpose(1, 2) for x in (query, key, value))
        out = function(*turned, causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def appended(key: Tensor, value: Tensor, visual: VisualContext) -> tuple[Tensor, Tensor]:
    """Keys and values with a copy of the picture's behind them for each re-injection.

    Args:
        key: [B, H_kv, L, D].
        value: [B, H_kv, L, D].
        visual: one span, the same in every row, and R re-injections.
    """
    first, count = visual.spans[0, 0].tolist()
    angle = visual.shift[0].to(visual.inv_freq)[:, None] * visual.inv_freq
    angle = torch.cat([angle, angle], dim=-1)[:, None]  # [R, 1, D]
    picture, shown = key[:, :, None, first : first + count], value[:, :, first : first + count]
    copies = turn(picture.float(), angle.cos(), angle.sin()).to(key.dtype).flatten(2, 3)
    again = [shown] * len(angle)
    return torch.cat([key, copies], dim=2), torch.cat([value, *again], dim=2)


class _OwnKernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:  # noqa: ANN401 - autograd's own
        *heads, visual = args
        out, lse = _cuda_many.forward(*heads, index_fields(visual), heads[0].shape[-1] ** -0.5)
        ctx.save_for_backward(*heads, out, lse)
        ctx.visual = visual
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        query, *_ = saved = ctx.saved_tensors
        fields, scale = index_fields(ctx.visual), query.shape[-1] ** -0.5
        return *_cuda_many.backward(grad_out, *saved, fields, scale), None


def own_kernels(setting: Setting, visual: VisualContext | None) -> Attention:
    """Our kernels of one pass, which `LOOKAGAIN_CUDA_TRAINING=kernels` would choose.

    Raises:
        LeftOut: where there is no GPU, or they are not wanted.
    """
    if not setting.own_kernels:
        raise LeftOut("not asked for")
    if not _cuda.on_gpu(torch.empty(0, device=setting.device)):
        raise LeftOut("needs a GPU")
    return lambda query, key, value: _OwnKernels.apply(query, key, value, visual)


def index_fields(visual: VisualContext | None) -> tuple[Tensor | None, ...]:
    """The context as those kernels take it, no row cut short."""
    if visual is None:
        return (None,) * 7
    fields = (visual.spans, visual.inv_freq, visual.shift, visual.start, visual.selected)
    return (None, None, *fields)


class FlexAttention:
    """FlexAttention, compiled for each shape, as long as the time for that lasts.

    Args:
        seconds: to spend on first calls, all shapes together; then it is left out.
        on_gpu: compile to kernels; elsewhere, where it has none for a backward, only trace.
    """

    def __init__(self, seconds: float, on_gpu: bool) -> None:
        self.seconds = seconds
        self.backend = "inductor" if on_gpu else "aot_eager"

    def __call__(self, shape: Shape, visual: VisualContext | None, device: torch.device) -> Peer:
        """The peer for one shape.

        Raises:
            LeftOut: if the time is spent.
        """
        from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

        if self.seconds <= 0:
            raise LeftOut("the time for compiling was spent on the shapes before")
        length, tokens = shape.length, shape.tokens
        starts = torch.tensor(shape.starts or [0], device=device)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            del batch, head
            number = ((key - length) // tokens).clamp(min=0)
            return torch.where(key < length, query >= key, query >= starts[number])

        def plain(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            del batch, head
            return query >= key

        keys = length + shape.again * tokens
        mask = create_block_mask(sees if shape.again else plain, None, None, length, keys, device)

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
            if visual is not None:
                key, value = appended(key, value, visual)
            return flex_attention(query, key, value, block_mask=mask, enable_gqa=True)

        torch._dynamo.reset()  # the shapes before are done with, and count as recompilations
        torch._functorch.config.donated_buffer = False  # the timed backward runs again and again
        compiled = torch.compile(attend, dynamic=False, backend=self.backend)
        return Peer(lambda query, key, value: compiled(query, key, value, mask), same_work=True)

    @contextmanager
    def paying(self, name: str) -> Iterator[None]:
        """First calls of the peer `name`: if it is this one, they count as compiling."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            if name.startswith(type(self).__name__):
                self.seconds -= time.perf_counter() - begin


def peers(
    setting: Setting, shape: Shape, visual: VisualContext | None, flex: FlexAttention
) -> dict[str, Peer | LeftOut]:
    """Every peer of a shape by its name, or why it is not there."""
    found: dict[str, Peer | LeftOut] = {}
    plain = shape.again == 0
    for name, call in sdpa(setting.on_gpu).items():
        found[name] = Peer(call, same_work=plain)
    try:
        found["own kernels"] = Peer(own_kernels(setting, visual), same_work=True)
    except LeftOut as reason:
        found["own kernels"] = reason
    for name, module in FLASH_ATTENTION.items():
        try:
            found[name] = Peer(flash_attention(module), same_work=plain)
        except LeftOut as reason:
            found[name] = reason
    if shape.flex:
        name = "FlexAttention" if plain else "FlexAttention, copies appended"
        try:
            found[name] = flex(shape, visual, setting.device)
        except LeftOut as reason:
            found[name] = reason
        except Exception as error:  # noqa: BLE001 - see `first_line`
            found[name] = LeftOut(first_line(error))
    return found


def first_line(error: Exception) -> str:
    """What a peer that failed said: its row tells, and the run goes on."""
    lines = [line for line in str(error).splitlines() if line.strip()] or ["no message"]
    return f"{type(error).__name__}: {lines[0][:120]}"
