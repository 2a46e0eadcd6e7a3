"""Sequences packed into rows without padding, and what belongs to each of them.

Transformers' flattening collators put several sequences into one row; their position ids begin
anew at each. The attention reads them in place. All that is small (token ids, positions, labels) is
looked at here as a padded batch with a row for each sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the S sequences of a packed batch lie.

    Attributes:
        bounds: int32 [S + 1] on the host, where each begins among the B · L tokens, and the end.
        batch: B.
        index: int64 [S, L_s], the place of each token among the B · L; 0 on padding.
        real: bool [S, L_s], False on padding at the end.
    """

    bounds: Tensor
    batch: int
    index: Tensor
    real: Tensor

    @classmethod
    def find(
        cls, position_ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Packing | None:
        """The packing of a batch, by the rules of transformers; None if it is not packed.

        Args:
            position_ids: int64 [3 or 4, B, L]. With four, the first are the text's, and a sequence
                begins where they do not go up by one, if there is no mask.
            mask: [B, L], or None.
            cu_seqlens: `cu_seq_lens_q` of the call, or None; wins over the positions.

        Raises:
            ValueError: if `cu_seqlens` does not hold the bounds of sequences in B · L tokens.
        """
        batch, length = position_ids.shape[1:]
        if cu_seqlens is not None:
            bounds = cu_seqlens.to("cpu", torch.int32)
            rising = bounds.dim() == 1 and len(bounds) > 1 and bool((bounds.diff() >= 0).all())
            if not rising or bounds[0] != 0 or bounds[-1] != batch * length:
                raise ValueError(
                    f"cu_seq_lens_q must go from 0 to the {batch * length} tokens without going "
                    f"back, got {bounds.tolist()}"
                )
            if batch > 1 and not set(range(0, batch * length, length)) <= set(bounds.tolist()):
                raise ValueError(f"cu_seq_lens_q has a sequence in two rows, got {bounds.tolist()}")
        elif mask is None and position_ids.shape[0] == 4:
            begins = torch.diff(position_ids[0], dim=-1) != 1
            if not bool(begins.any()):
                return None
            begins = torch.nn.functional.pad(begins, (1, 0), value=True)
            bounds = begins.flatten().nonzero().flatten()
            bounds = torch.nn.functional.pad(bounds, (0, 1), value=batch * length)
            bounds = bounds.to("cpu", torch.int32)
        else:
            return None
        first, lengths = bounds[:-1, None].long(), bounds.diff().long()
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
        embeddings = keywords["inputs_embeds"].flatten(0, 1)[self.index]
        changed = {"inputs_embeds": embeddings * self.real[..., None]}
        if keywords.get("visual_pos_masks") is not None:
            changed["visual_pos_masks"] = self.rows(keywords["visual_pos_masks"])
        kept = {k: v for k, v in keywords.items() if not k.startswith(("cu_seq_lens", "max_len"))}
        return {**kept, **changed}

    def repack(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, L, E] of those of a padded batch, [S, L_s, E]."""
        return hidden[self.real].unflatten(0, (self.batch, -1))
