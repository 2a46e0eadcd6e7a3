"""Dense caches cut into shuffled blocks, NaN wherever nothing of a row lies."""

from __future__ import annotations

from typing import NamedTuple

import torch
from cases import Problem
from torch import Tensor


class Paged(NamedTuple):
    """A paged cache as the ops take it."""

    key: Tensor  # [num_blocks, H_kv, block_size, D]
    value: Tensor
    block_table: Tensor  # int32 [B, blocks], a view with gaps

    def block(self, row: int, slot: int) -> tuple[int, int]:
        """The block and the slot in it."""
        size = self.key.shape[2]
        return int(self.block_table[row, slot // size]), slot % size


def page(
    key: Tensor,
    value: Tensor,
    begin: Tensor,
    end: Tensor,
    block_size: int,
    *,
    room: int = 0,
    seed: int = 0,
) -> Paged:
    """Move slots begin[b] … end[b] - 1 of [B, H_kv, L_k, D] into blocks.

    Each row also gets blocks for `room` more slots. Keys lie [num_blocks, block_size, H_kv, D],
    values [num_blocks, H_kv, block_size, D] with gaps; a third of the blocks is nobody's.
    """
    batch, heads, keys, size = key.shape
    wide = -(-(keys + room) // block_size) + 1
    total = batch * wide * 3 // 2 + 1
    draw = torch.Generator().manual_seed(seed)
    order = iter(torch.randperm(total, generator=draw).tolist())
    nhd = key.new_full((total, block_size, heads, size), torch.nan).transpose(1, 2)
    gaps = value.new_full((total, heads, block_size, size + 8), torch.nan)[..., :size]
    table = torch.full((batch, 2 * wide), -7, dtype=torch.int32, device=key.device)[:, ::2]
    table[:] = -1
    paged = Paged(nhd, gaps, table)
    for row in range(batch):
        first, last = int(begin[row]), int(end[row])
        if first < last + room:
            for entry in range(first // block_size, -(-(last + room) // block_size)):
                table[row, entry] = next(order)
        for slot in range(first, last):
            block, within = paged.block(row, slot)
            nhd[block, :, within] = key[row, :, slot]
            gaps[block, :, within] = value[row, :, slot]
    return paged


def paged_problem(problem: Problem, block_size: int, seed: int = 0) -> tuple[Problem, Tensor]:
    """The same problem with its cache in blocks, and the block table."""
    limits = problem.key_start, problem.key_length
    paged = page(problem.key, problem.value, *limits, block_size, seed=seed)
    return problem._replace(key=paged.key, value=paged.value), paged.block_table
