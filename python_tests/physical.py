"""The independent reference: visual rows gathered, turned and appended, then a plain softmax.

Shares nothing with `lookagain_ext.reference`: lists of key slots, row by row, and rotation as
complex multiplication.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from cases import Problem
from torch import Tensor

from lookagain_ext import NEVER


class Answer(NamedTuple):
    """What a query sees, summed up."""

    out: Tensor  # [B, H_q, L_q, D]
    lse: Tensor  # [B, H_q, L_q]
    mass: Tensor  # [B, H_kv, L_c], queries from mass_from on


def turn(key: Tensor, shift: int, inv_freq: Tensor) -> Tensor:
    """Rotary offset as multiplication by exp(i · shift · inv_freq), in float64."""
    half = len(inv_freq)
    pairs = torch.complex(key[..., :half].double(), key[..., half : 2 * half].double())
    pairs = pairs * torch.polar(torch.ones(half).double(), shift * inv_freq.double().cpu())
    return torch.cat([pairs.real, pairs.imag, key[..., 2 * half :].double()], -1)


def attend(problem: Problem, *, scale: float | None = None, dtype: torch.dtype) -> Answer:
    """Attention over physically appended rows, one row of the batch at a time.

    Args:
        problem: tensors on the CPU.
        scale: default 1 / sqrt(D).
        dtype: float64 for the exact answer, else what an eager model in that dtype computes
            (turned keys and probabilities rounded to it, softmax in float32).
    """
    scale = problem.query.shape[-1] ** -0.5 if scale is None else scale
    rows = [_attend_row(problem, row, scale, dtype) for row in range(problem.query.shape[0])]
    return Answer(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def _attend_row(problem: Problem, row: int, scale: float, dtype: torch.dtype) -> Answer:
    query, key, value = (x[row].to(dtype) for x in problem[:3])
    heads, queries, _ = query.shape
    kv_heads = key.shape[0]
    start, length = int(problem.key_start[row]), int(problem.key_length[row])
    tokens = [j for a, n in problem.visual.spans[row].tolist() for j in range(a, a + n)]

    # One entry for each key that can be seen: its slot, its (turned) key, and from which query on.
    slots = list(range(start, length))
    first = list(slots)
    keys = [key[:, start:length]]
    for r in range(problem.visual.num_reinjections):
        begin = int(problem.visual.start[row, r])
        if begin == NEVER:
            continue
        shown = tokens
        if problem.visual.selected is not None:
            shown = [j for c, j in enumerate(tokens) if problem.visual.selected[row, r, c]]
        shift = int(problem.visual.shift[row, r])
        keys.append(turn(key[:, shown], shift, problem.visual.inv_freq).to(dtype))
        slots += shown
        first += [begin] * len(shown)

    positions = torch.arange(length - queries, length)
    seen = positions[:, None] >= torch.tensor(first, dtype=torch.long)
    empty = ~seen.any(-1)
    turned = torch.cat(keys, dim=1).repeat_interleave(heads // kv_heads, 0)
    soft = torch.promote_types(dtype, torch.float32)
    logits = (query @ turned.mT).to(soft) * scale
    logits = logits.masked_fill(~seen, -torch.inf).masked_fill(empty[:, None], 0.0)
    weight = logits.softmax(-1).masked_fill(~seen, 0.0)
    out = weight.to(dtype) @ value[:, slots].repeat_interleave(heads // kv_heads, 0)
    lse = logits.logsumexp(-1).masked_fill(empty, -torch.inf)

    counted = weight.detach()[:, positions >= int(problem.mass_from[row])].sum(1)
    grouped = counted.unflatten(0, (kv_heads, -1)).sum(1)
    mass = torch.zeros(kv_heads, problem.max_visual, dtype=soft)
    for number, j in enumerate(tokens):
        mass[:, number] = grouped[:, [n for n, slot in enumerate(slots) if slot == j]].sum(-1)
    return Answer(out, lse, mass)


def error(found: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinities must agree, NaN never passes."""
    found, exact = found.double().cpu(), exact.double().cpu()
    same = found == exact
    difference = torch.where(same, 0.0, (found - exact).abs())
    worst = float(difference.max()) if difference.numel() else 0.0
    return float("inf") if worst != worst else worst


def assert_as_accurate_as(found: Tensor, exact: Tensor, eager: Tensor, name: str) -> None:
    """The error is at most twice that of the same-dtype eager computation.

    The floor asks for nothing impossible where the eager error happens to be near zero: one
    rounding of the result in a 16-bit type; some more in float32 and float64, where two right
    answers differ by the order of their sums.
    """
    assert found.shape == exact.shape, f"{name}: shape {list(found.shape)}"
    finite = exact[exact.isfinite()]
    top = float(finite.abs().max()) if finite.numel() else 1.0
    roundings = {torch.float64: 64, torch.float32: 8}.get(found.dtype, 1)
    floor = roundings * torch.finfo(found.dtype).eps * max(top, 1e-3)
    allowed = 2 * max(error(eager, exact), floor)
    assert error(found, exact) <= allowed, f"{name}: {error(found, exact):.3g} > {allowed:.3g}"
