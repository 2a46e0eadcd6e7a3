"""Sequences packed into rows without padding, and what belongs to each of them.

Transformers' flattening collators put several sequences into one row; their position ids begin
anew at each. The attention reads them in place. All that is small (token ids, positions, labels) is
looked at here as a padded batch with a row for each sequence.

What is packed by its position ids is attended so in every family; transformers' own attention looks
at the text positions only, the first of four axes, and sees none where a model makes three of two
dimensional ids (Qwen2-VL, Qwen2.5-VL).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ops._packed import checked_bounds


@dataclass(frozen=True)
class Packing:
    """Where the S sequences of a packed batch lie.

    Attributes:
        bounds: where each begins among the B · L tokens, and the end of the last.
        batch: B.
        index: int64 [S, L_s], the place of each token among the B · L; 0 on padding.
        real: bool [S, L_s], False on padding at the end.
    """

    bounds: tuple[int, ...]
    batch: int
    index: Tensor
    real: Tensor

    @classmethod
    def find(
        cls, position_ids: Tensor, mask: Tensor | None, cu_seqlens: object = None
    ) -> Packing | None:
        """The packing of a batch; None if it is not packed.

        Args:
            position_ids: int64 [3 or 4, B, L]. With four, the first are the text's, and a sequence
                begins where they do not go up by one.
            mask: [B, L], or None. What is packed has no padding.
            cu_seqlens: `cu_seq_lens_q` of the call, or None; wins over the positions.

        Raises:
            TypeError: if `cu_seqlens` holds anything but integers.
            ValueError: if it does not hold the bounds of sequences in B · L tokens, or is given
                together with padding.
        """
        batch, length = position_ids.shape[1:]
        padded = mask is not None and not bool(mask.all())
        if cu_seqlens is not None:
            bounds = checked_bounds("cu_seq_lens_q", cu_seqlens, batch * length)
            if padded:
                raise ValueError("attention_mask has padding: with cu_seq_lens_q there can be none")
            if not set(range(0, batch * length, length)) <= set(bounds):
                raise ValueError(f"cu_seq_lens_q has a sequence in two rows, got {list(bounds)}")
        elif position_ids.shape[0] == 4 and not padded:
            begins = torch.diff(position_ids[0], dim=-1) != 1
            if not bool(begins.any()):
                return None
            begins = torch.nn.functional.pad(begins, (1, 0), value=True)
            bounds = (*begins.flatten().nonzero().flatten().tolist(), batch * length)
        else:
            return None
        ends = torch.tensor(bounds)
        first, lengths = ends[:-1, None], ends.diff()
        place = torch.arange(int(lengths.max()))
        real = place < lengths[:, None]
        device = position_ids.device
        index = torch.where(real, first + place, 0)
        return cls(bounds, batch, index.to(device), real.to(device))

    def rows(self, packed: Tensor, padding: float = 0) -> Tensor:
        """A row for each sequence, [..., S, L_s], of packed [..., B, L]."""
        rows = packed.flatten(-2)[..., self.index]
        return rows.masked_fill(~self.real, padding)

    def pack(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`: [..., B, L] of [..., S, L_s]."""
        return rows[..., self.real].unflatten(-1, (self.batch, -1))

    def unpacked(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """The decoder's keywords for a padded batch with a row for each sequence."""
        changed = {"inputs_embeds": keywords["inputs_embeds"].flatten(0, 1)[self.index]}
        if keywords.get("visual_pos_masks") is not None:
            changed["visual_pos_masks"] = self.rows(keywords["visual_pos_masks"])
        kept = {k: v for k, v in keywords.items() if not k.startswith(("cu_seq_lens", "max_len"))}
        return {**kept, **changed}

    def repack(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, L, E] of those of a padded batch, [S, L_s, E]."""
        return hidden[self.real].unflatten(0, (self.batch, -1))
