"""What a model looked at: attention curves, and maps before and during each reflection.

Works on the trace that a `LookAgainSession` leaves behind; plain numpy, no model needed. The share
of attention that goes to the picture falls as an answer grows, for a plain reason: the softmax
divides one unit of attention over more and more keys. So every share comes with the *uniform
share*, what the visual tokens would get if all visible keys were attended alike, and with the
ratio of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .trace import Trace

    Floats = NDArray[np.float32]


@dataclass(frozen=True)
class AttentionCurve:
    """Attention on the picture, for each generated token of one row.

    Attributes:
        share: float32 [steps], in [0, 1], mean over layers and heads.
        uniform: float32 [steps], the share if all visible keys were attended alike.
        reflections: the steps that open a reflection.
        ends: for each of them the step after the last token of its reflection.
    """

    share: Floats
    uniform: Floats
    reflections: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def ratio(self) -> Floats:
        """float32 [steps], share over uniform share: 1 is no interest in the picture."""
        return self.share / np.maximum(self.uniform, np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class ReflectionMap:
    """Where one row looked before a reflection and during it.

    Attributes:
        step: the generated token that opened the reflection.
        end: the step after its last token.
        before: float32 [L_c], mean over the tokens generated before, or None when there are none.
        during: float32 [L_c], mean over the reflection's tokens, or None.
        shown: bool [L_c], the visual tokens that were put in front of the model again; none of
            them in a text-only reflection.
    """

    step: int
    end: int
    before: Floats | None
    during: Floats | None
    shown: NDArray[np.bool_]


def array(values: object, dtype: type = np.float32) -> NDArray:
    """A tensor (on any device) or a sequence as a numpy array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=dtype)


def uniform_share(
    prompt_length: int, num_visual: int, steps: int, reflections: Sequence[tuple[int, int]] = ()
) -> Floats:
    """The visual tokens' share of the keys that each generated token sees.

    (L_c + k) / (L + k), with k the visual tokens shown again so far (Chu et al., Theorem 3.2). The
    token of step i is the input of its own forward pass, so it sees itself: L = prompt + i + 1.

    Args:
        prompt_length: prompt tokens, the visual ones included, left padding not.
        num_visual: L_c.
        steps: how many tokens were generated.
        reflections: (step, number of visual tokens shown again), in order.

    Returns:
        float32 [steps].

    Raises:
        ValueError: `num_visual` or `prompt_length` is out of range.
    """
    if not 0 <= num_visual <= prompt_length:
        raise ValueError(
            f"num_visual must be between 0 and prompt_length = {prompt_length}, got {num_visual}"
        )
    step = np.arange(steps)
    again = np.zeros(steps)
    for start, shown in reflections:
        again[step >= start] += shown
    return ((num_visual + again) / (prompt_length + 1 + step + again)).astype(np.float32)


def reflection_ends(starts: Sequence[int], steps: int, closings: Sequence[int]) -> tuple[int, ...]:
    """For each reflection the step after its last token.

    Args:
        starts: the steps that open a reflection, ascending.
        steps: how many tokens were generated.
        closings: the steps whose token closes a reflection; a reflection that is never closed
            lasts until the next one or to the end.
    """
    ends = []
    for start, bound in zip(starts, [*starts[1:], steps], strict=False):
        closed = [step + 1 for step in closings if start < step < bound]
        ends.append(min([*closed, max(bound, start + 1)]))
    return tuple(ends)


def attention_curve(
    trace: Trace, prompt_length: int, row: int = 0, closings: Sequence[int] = ()
) -> AttentionCurve:
    """How much attention went to the picture while a row was generated.

    Args:
        trace: of a session with `track_attention=True`.
        prompt_length: the row's prompt tokens, left padding not counted.
        row: of the batch.
        closings: steps whose token is `</REFLECTION>`.

    Raises:
        ValueError: the trace holds no attention, or no such row.
    """
    if trace.attention is None:
        raise ValueError(
            "trace.attention must hold the tracked attention, got None: "
            "set track_attention=True in the LookAgainConfig"
        )
    rows = array(trace.attention)
    if not 0 <= row < len(rows):
        raise ValueError(f"row must be between 0 and {len(rows) - 1}, got {row}")
    share = rows[row]
    found = trace.reflections[row]
    starts = [reflection.step for reflection in found]
    visual = sum(t * h * w for t, h, w in trace.grids[row])
    again = [(reflection.step, reflection.num_shown) for reflection in found]
    uniform = uniform_share(prompt_length, visual, len(share), again)
    return AttentionCurve(
        share, uniform, tuple(starts), reflection_ends(starts, len(share), closings)
    )


def reflection_maps(
    trace: Trace, row: int = 0, closings: Sequence[int] = ()
) -> list[ReflectionMap]:
    """Attention on each visual token before and during each reflection of a row.

    Args:
        trace: of a session; without tracked attention only `before` is known, and only where the
            strategy needed it (ROUTE).
        row: of the batch.
        closings: steps whose token is `</REFLECTION>`.

    Returns:
        One map for each reflection, in order.
    """
    found = trace.reflections[row]
    tracked = None if trace.attention_map is None else array(trace.attention_map)[row]
    starts = [reflection.step for reflection in found]
    steps = len(tracked) if tracked is not None else max(starts, default=0) + 1
    maps = []
    for reflection, end in zip(found, reflection_ends(starts, steps, closings), strict=True):
        before, during = reflection.mass_before, None
        before = None if before is None else array(before)
        if tracked is not None:
            before = _mean(tracked[: reflection.step])
            during = _mean(tracked[reflection.step : end])
        shown = array(reflection.shown, bool)
        maps.append(ReflectionMap(reflection.step, end, before, during, shown))
    return maps


def answer_map(trace: Trace, row: int = 0) -> Floats | None:
    """float32 [L_c], mean attention on each visual token over a whole answer, or None."""
    return None if trace.attention_map is None else _mean(array(trace.attention_map)[row])


def _mean(values: Floats) -> Floats | None:
    """Mean over steps, or None without one."""
    return values.mean(0) if len(values) else None


def to_grids(values: NDArray, grids: Sequence[tuple[int, int, int]]) -> list[NDArray]:
    """Cut the values of a row's visual tokens into one array [t, h, w] for each image.

    Args:
        values: [L_c], counted through the images in order; longer rows of a batch may leave a
            tail, which is dropped.
        grids: (t, h, w) of each image, after merging patches.

    Raises:
        ValueError: fewer values than the grids hold.
    """
    sizes = [t * h * w for t, h, w in grids]
    if len(values) < sum(sizes):
        raise ValueError(f"values must cover the grids' {sum(sizes)} tokens, got {len(values)}")
    bounds = np.cumsum([0, *sizes])
    return [
        values[first : first + size].reshape(grid)
        for first, size, grid in zip(bounds, sizes, grids, strict=False)
    ]
