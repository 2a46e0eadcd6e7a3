"""What happened while a model looked again: its reflections and where its attention went."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Reflection:
    """One reflection that a row opened.

    Attributes:
        step: which generated token opened it, from 0; in a full forward, counted from the first
            token that could trigger.
        key_index: key index of that token.
        shift: rotary offset at which the visual tokens were seen again.
        num_visual: visual tokens that the row has.
        num_shown: visual tokens that were shown again; 0 for a text-only reflection.
        shown: bool [L_c] on the CPU, which ones. With route_scope="layer" those that some layer
            showed while decoding; a full forward, whose layers choose as they run, notes all.
        mass_before: float32 [L_c] on the CPU, mean attention on each visual token over the layers,
            heads and tokens generated before this reflection (Eq. 5 of Qwen Look Again, arXiv
            2505.23558); None unless attention was tracked or routed by.
        ignored: True when the row was past `max_reinjections`, so that it went on text-only.
    """

    step: int
    key_index: int
    shift: int
    num_visual: int
    num_shown: int
    shown: Tensor
    mass_before: Tensor | None
    ignored: bool


@dataclass(frozen=True)
class Trace:
    """What happened in the latest sequence of a session, copied from the device when asked for.

    Attributes:
        reflections: for each row, its reflections in order; of a generation the first 64 at most
            (those after them had their effect, but are not listed).
        attention: float32 [B, steps], share of the attention of each generated token that landed
            on visual tokens, mean over layers and heads; None unless tracked or routed by. The
            last token of an answer is never fed back, so it has no step. Rows that finished
            early go on with padding tokens: cut at the row's length. In a forward over whole
            sequences, a step is a token that could trigger; rows with fewer end in zeros.
        attention_map: float32 [B, steps, L_c], the same for each visual token; None unless
            `track_attention`.
        grids: for each row, (t, h, w) of each of its images in tokens, in order: visual token
            numbers run through them in row-major order.
        answer_attention: float32 [B, L_c], attention of a row's whole answer on each visual token:
            the sum over the tokens that could trigger, mean over layers and heads. Of a forward
            over whole sequences under `track_attention`. With gradients the backward counts it:
            None until that has run, and the mean is over the layers that it ran through, which
            are not those below everything that trains.
        answer_tokens: int64 [B], the tokens summed over; None where `answer_attention` is.
    """

    reflections: list[list[Reflection]]
    attention: Tensor | None
    attention_map: Tensor | None
    grids: list[list[tuple[int, int, int]]]
    answer_attention: Tensor | None = None
    answer_tokens: Tensor | None = None

    @property
    def answer_share(self) -> float | None:
        """Share of the attention of all answers' tokens that is on the picture, if tracked."""
        if self.answer_attention is None or not self.answer_tokens.any():
            return None
        return float(self.answer_attention.sum() / self.answer_tokens.sum())

    def summary(self) -> str:
        """One readable paragraph for each row."""
        return "\n\n".join(self._row_summary(row) for row in range(len(self.reflections)))

    def _row_summary(self, row: int) -> str:
        found = self.reflections[row]
        sizes = [t * h * w for t, h, w in self.grids[row]]
        images = "1 image" if len(sizes) == 1 else f"{len(sizes)} images"
        text = f"Row {row} ({images}, {sum(sizes)} visual tokens): "
        text += "no reflection." if not found else f"{_count(len(found), 'reflection')}."
        for number, reflection in enumerate(found, 1):
            text += f" Reflection {number}, at generated token {reflection.step}, "
            if reflection.num_shown:
                text += f"saw {reflection.num_shown} of {reflection.num_visual} visual tokens again"
            elif reflection.ignored:
                text += "came after max_reinjections and was text only"
            else:
                text += "was text only"
            text += self._attention_around(row, reflection.step)
        if self.attention is not None and self.attention.shape[1]:
            text += f" Mean attention on visual tokens: {self.attention[row].mean():.1%}."
        elif self.answer_attention is not None and self.answer_tokens[row]:
            share = self.answer_attention[row].sum() / self.answer_tokens[row]
            text += f" Mean attention on visual tokens: {share:.1%}."
        return text

    def _attention_around(self, row: int, step: int) -> str:
        if self.attention is None or not 0 < step < self.attention.shape[1]:
            return "."
        near = 8
        before = self.attention[row, max(0, step - near) : step].mean()
        after = self.attention[row, step : step + near].mean()
        return f"; attention on them went from {before:.1%} to {after:.1%}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
