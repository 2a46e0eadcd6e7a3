"""Where a batch's visual tokens lie in the key cache, and when they are seen again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter, type(None))
NEVER = torch.iinfo(torch.int32).max
"""`start` of a re-injection that a row does not have."""


@dataclass(frozen=True)
class VisualContext:
    """The visual tokens of a batch and their re-injections, as the attention ops read them.

    A *re-injection* is one more sighting of a row's visual tokens: the same cached key and value
    rows, at rotary positions moved by `shift`, seen by every query from key index `start` on. On
    models with multimodal rotary positions the same shift goes to time, height and width, so it
    is a plain rotation by `shift` with the model's inverse frequencies.

    Attributes:
        spans: int32 [B, S, 2], (first key index, length) of each run of visual keys, ascending
            and disjoint within a row; length 0 pads. Key indices count left padding.
        inv_freq: float32 [rotary_dim / 2], the model's inverse frequencies. Features past
            rotary_dim are not rotated; the layout is NeoX (rotate-half).
        shift: int32 [B, R], rotary offset of re-injection r.
        start: int32 [B, R], first key index whose query sees it; `NEVER` = none in this row.
        selected: bool [B, R, L_c], which visual tokens are shown again (ROUTE), counted through
            the row's spans in order; None = all of them (COPY).
    """

    spans: Tensor
    inv_freq: Tensor
    shift: Tensor
    start: Tensor
    selected: Tensor | None = None

    @classmethod
    def from_spans(cls, spans: Tensor, inv_freq: Tensor) -> VisualContext:
        """A context without re-injections (R = 0).

        Args:
            spans: integer [B, S, 2], see the class.
            inv_freq: floating [rotary_dim / 2].

        Raises:
            TypeError: if an argument is no tensor or has a dtype of another kind.
            ValueError: if a shape does not fit, or spans hold what int32 does not.
        """
        _check_tensor("spans", spans)
        _check_tensor("inv_freq", inv_freq)
        if spans.dim() != 3 or spans.shape[-1] != 2:
            raise ValueError(f"spans must have shape [B, S, 2], got {list(spans.shape)}")
        if inv_freq.dim() != 1:
            raise ValueError(
                f"inv_freq must have shape [rotary_dim / 2], got {list(inv_freq.shape)}"
            )
        if not inv_freq.is_floating_point():
            raise TypeError(f"inv_freq must be floating, got {inv_freq.dtype}")
        spans = as_int32("spans", spans)
        empty = torch.empty(spans.shape[0], 0, dtype=torch.int32, device=spans.device)
        inv_freq = inv_freq.to(device=spans.device, dtype=torch.float32)
        return cls(spans, inv_freq, empty, empty.clone())

    def reinject(
        self,
        rows: Tensor,
        shift: Tensor | int,
        start: Tensor | int,
        selected: Tensor | None = None,
    ) -> VisualContext:
        """A context with one more re-injection column for the given rows.

        Args:
            rows: bool [B], the rows that look again.
            shift: int or integer [B], rotary offset.
            start: int or integer [B], first key index whose query sees the re-injection.
            selected: bool [B, L_c], tokens shown again; None shows all of them.

        Returns:
            A new context with R + 1 columns; `self` is unchanged.

        Raises:
            TypeError: if an argument is no tensor (or number) or has a dtype of another kind.
            ValueError: if a shape does not fit, or a number does not fit into int32.
        """
        _check_tensor("rows", rows)
        if selected is not None:
            _check_tensor("selected", selected)
        batch, device = self.spans.shape[0], self.spans.device
        if rows.dtype != torch.bool or rows.shape != (batch,):
            raise ValueError(f"rows must be bool [{batch}], got {rows.dtype} {list(rows.shape)}")
        column = _column(shift, "shift", batch, device)
        first = _column(start, "start", batch, device)
        first = torch.where(rows.to(device), first, NEVER)
        return replace(
            self,
            shift=torch.cat([self.shift, column[:, None]], dim=1),
            start=torch.cat([self.start, first[:, None]], dim=1),
            selected=self._append_selection(selected),
        )

    def _append_selection(self, selected: Tensor | None) -> Tensor | None:
        batch, count = self.shift.shape
        if selected is None and self.selected is None:
            return None
        tokens = selected.shape[-1] if selected is not None else self.selected.shape[-1]
        if selected is None:
            selected = torch.ones(batch, tokens, dtype=torch.bool, device=self.spans.device)
        if selected.dtype != torch.bool or selected.shape != (batch, tokens):
            raise ValueError(
                f"selected must be bool [{batch}, L_c], got {selected.dtype} {list(selected.shape)}"
            )
        earlier = self.selected
        if earlier is None:
            earlier = selected.new_ones(batch, count, tokens)
        if earlier.shape[-1] != tokens:
            raise ValueError(
                f"selected must cover the {earlier.shape[-1]} visual tokens of the earlier "
                f"columns, got {tokens}"
            )
        return torch.cat([earlier, selected[:, None].to(earlier.device)], dim=1)

    def row(self, number: int) -> VisualContext:
        """The context of one row, as a batch of one; a view."""
        part = slice(number, number + 1)
        selected = None if self.selected is None else self.selected[part]
        fields = (self.spans[part], self.inv_freq, self.shift[part], self.start[part])
        return VisualContext(*fields, selected)

    @property
    def num_reinjections(self) -> int:
        """R, the number of re-injection columns."""
        return self.shift.shape[1]

    def num_visual(self) -> Tensor:
        """int32 [B], the number of visual tokens of each row."""
        return self.spans[..., 1].sum(-1, dtype=torch.int32)

    def token_keys(self, max_visual: int | None = None) -> tuple[Tensor, Tensor]:
        """The key index of every visual token.

        Args:
            max_visual: L_c, the width of the result; default: the largest row (one device sync).

        Returns:
            (keys, valid): int64 [B, L_c] key indices, 0 where a row has fewer tokens, and
            bool [B, L_c].
        """
        first, length = self.spans.long().unbind(-1)
        if max_visual is None:
            max_visual = int(length.sum(-1).max()) if length.numel() else 0
        number = torch.arange(max_visual, device=first.device).expand(first.shape[0], -1)
        if first.shape[1] == 0:
            return torch.zeros_like(number), torch.zeros_like(number, dtype=torch.bool)
        end = length.cumsum(-1)
        span = torch.searchsorted(end, number.contiguous(), right=True)
        valid = span < first.shape[1]
        span = span.clamp(max=first.shape[1] - 1)
        keys = (first - (end - length)).gather(1, span) + number
        return torch.where(valid, keys, 0), valid

    def to(self, device: torch.device | str) -> VisualContext:
        """The same context on another device."""
        selected = None if self.selected is None else self.selected.to(device)
        return VisualContext(
            self.spans.to(device),
            self.inv_freq.to(device),
            self.shift.to(device),
            self.start.to(device),
            selected,
        )


def _column(value: Tensor | int, name: str, batch: int, device: torch.device) -> Tensor:
    wanted = f"{name} must be an int or an integer tensor [{batch}]"
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{wanted}, got {value!r}")
        if not -NEVER - 1 <= value <= NEVER:
            raise ValueError(f"{name} must fit into int32, got {value}")
        return torch.full((batch,), int(value), dtype=torch.int32, device=device)
    if value.shape != (batch,) or not is_integer(value):
        raise ValueError(f"{wanted}, got {value.dtype} {list(value.shape)}")
    return as_int32(name, value).to(device)


def is_integer(tensor: Tensor) -> bool:
    """Whether a tensor's dtype is an integer's; bool is not."""
    kind = tensor.dtype
    return not (kind.is_floating_point or kind.is_complex or kind == torch.bool)


def as_int32(name: str, tensor: Tensor) -> Tensor:
    """An integer tensor as int32.

    Values are looked at only where that waits for no device and is no part of a traced graph.

    Raises:
        TypeError: if the dtype is not an integer's.
        ValueError: if a value does not fit.
    """
    if not is_integer(tensor):
        raise TypeError(f"{name} must be an integer tensor, got {tensor.dtype}")
    wide = torch.iinfo(tensor.dtype).max > NEVER
    if wide and tensor.device.type == "cpu" and tensor.numel() and not is_traced(tensor):
        low, high = (int(bound) for bound in tensor.long().aminmax())
        if low < -NEVER - 1 or high > NEVER:
            got = low if low < -NEVER - 1 else high
            raise ValueError(f"{name} must fit into int32, got {got}")
    return tensor.to(torch.int32)


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether the values of tensors are not to be read here: a kernel would bypass a tracer.

    So it is under `torch.compile` and `torch.export`, under a dispatch mode (FakeTensorMode,
    make_fx, a profiler's) and for tensors of a subclass, which may have no memory.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return any(type(tensor) not in _PLAIN for tensor in tensors)


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
