"""Every CUDA kernel once, on small shapes, compared with the reference: for a memory checker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lookagain_ext import VisualContext, ops, reference
from lookagain_ext.ops import _cuda_many
from lookagain_ext.ops._counted_mass import CountedMass

DEVICE = "cuda"
BATCH, HEADS, KEYS, TOKENS = 2, 2, 300, 90
QUERIES = 150  # of visual_mass
MANY_ROWS = 64  # of a batch that fills the device without cutting the key axis


@dataclass(frozen=True)
class Attention:
    """One way through the attention kernels."""

    dtype: torch.dtype = torch.bfloat16
    size: int = 128
    groups: int = 7
    queries: int = 1
    mass: bool = True
    aligned: bool = True
    paged: int = 0  # slots of a block
    batch: int = BATCH

    def check(self) -> None:
        """Compare with the reference: re-injections, ragged rows, pieces of the key axis."""
        shapes = ((HEADS * self.groups, self.queries), (HEADS, KEYS), (HEADS, KEYS))
        query, key, value = (
            torch.randn(self.batch, *shape, self.size, device=DEVICE, dtype=self.dtype)
            for shape in shapes
        )
        if not self.aligned:
            key = torch.nn.functional.pad(key, (3, 2))[..., 3:-2]
        spans = torch.tensor([[[5, TOKENS]]] * self.batch, dtype=torch.int32, device=DEVICE)
        half = self.size // 2
        inv_freq = 1e4 ** -(torch.arange(half, device=DEVICE) / half)
        everyone = torch.ones(self.batch, dtype=torch.bool, device=DEVICE)
        visual = VisualContext.from_spans(spans, inv_freq).reinject(everyone, 70, 200)
        visual = visual.reinject(everyone, 190, KEYS - self.queries)
        length = torch.tensor([KEYS, 230] * self.batch, dtype=torch.int32, device=DEVICE)
        keywords = {"key_length": length[: self.batch]}
        cache, table = (key, value), None
        if self.paged:
            cache, table = paged(key, self.paged), paged_table(self.batch, self.paged)
            cache = (cache, paged(value, self.paged))
        results = []
        for call, tensors, blocks in (
            (ops.routed_attention, cache, table),
            (reference.routed_attention, (key, value), None),
        ):
            mass = torch.zeros(self.batch, HEADS, TOKENS, device=DEVICE) if self.mass else None
            out = call(query, *tensors, visual, visual_mass=mass, block_table=blocks, **keywords)
            results.append((out, mass))
        for ours, expected in zip(*results, strict=True):
            if ours is not None:
                torch.testing.assert_close(ours, expected, atol=2e-2, rtol=2e-2)


def paged(cache: Tensor, size: int) -> Tensor:
    """[B, H, L, D] as blocks in reverse order."""
    blocks = -(-KEYS // size)
    padded = torch.nn.functional.pad(cache, (0, 0, 0, blocks * size - KEYS))
    parts = padded.unflatten(2, (blocks, size)).transpose(1, 2).flatten(0, 1)
    return parts.flip(0).contiguous()


def paged_table(batch: int, size: int) -> Tensor:
    """The table of `paged`."""
    total = batch * -(-KEYS // size)
    order = torch.arange(total - 1, -1, -1, dtype=torch.int32, device=DEVICE)
    return order.view(batch, -1)


def mass(dtype: torch.dtype, size: int, groups: int = 7, aligned: bool = True) -> None:
    """visual_mass of two ranges of many queries, a selection, ragged rows."""
    query = torch.randn(BATCH, HEADS * groups, QUERIES, size, device=DEVICE, dtype=dtype)
    key = torch.randn(BATCH, HEADS, KEYS, size, device=DEVICE, dtype=dtype)
    if not aligned:
        query = torch.nn.functional.pad(query, (3, 2))[..., 3:-2]
    spans = torch.tensor([[[5, 40], [60, 50]]] * BATCH, dtype=torch.int32, device=DEVICE)
    inv_freq = 1e4 ** -(torch.arange(size // 2, device=DEVICE) / (size // 2))
    everyone = torch.ones(BATCH, dtype=torch.bool, device=DEVICE)
    visual = VisualContext.from_spans(spans, inv_freq)
    for shift, start in ((70, 160), (300, 250)):
        chosen = torch.rand(BATCH, TOKENS, device=DEVICE) < 0.5
        visual = visual.reinject(everyone, shift, start, chosen)
    length = torch.tensor([KEYS, 230], dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([[[0, KEYS], [220, 290]]] * BATCH, dtype=torch.int32, device=DEVICE)
    arguments = (query, key, visual, rows)
    found = ops.visual_mass(*arguments, key_length=length)
    expected = reference.visual_mass(*arguments, key_length=length)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def training(
    dtype: torch.dtype,
    size: int,
    packed: bool = False,
    again: int = 2,
    select: bool = True,
    groups: int = 7,
) -> None:
    """Forward and backward with many queries by our own kernels, and the mass within it.

    Ragged rows, or sequences packed into one, of which one is empty.
    """
    heads, tokens = (HEADS * groups, HEADS, HEADS), 22
    edges = [0, QUERIES, QUERIES, 2 * QUERIES] if packed else None
    batch, keys, rows = (1, edges[-1], 3) if packed else (BATCH, QUERIES, BATCH)
    query, key, value = (
        torch.randn(batch, n, keys, size, device=DEVICE, dtype=dtype) for n in heads
    )
    inv_freq = 1e4 ** -(torch.arange(size // 2, device=DEVICE) / (size // 2))
    everyone = torch.ones(rows, dtype=torch.bool, device=DEVICE)
    spans = torch.tensor([[[2, 10], [15, 12]]] * rows, dtype=torch.int32, device=DEVICE)
    visual = VisualContext.from_spans(spans, inv_freq)
    for shift, start in ((40, 30), (60, QUERIES - 9))[:again]:
        chosen = torch.rand(rows, tokens, device=DEVICE) < 0.6 if select else None
        visual = visual.reinject(everyone, shift, start, chosen)
    limits = (None, None)
    if not packed:
        limits = [torch.tensor(x, device=DEVICE).int() for x in ([0, 4], [QUERIES, QUERIES - 7])]
    fields = (visual.spans, visual.inv_freq, visual.shift, visual.start, visual.selected)
    fields, scale = (*limits, *fields), size**-0.5
    bounds = None if edges is None else tuple(edges)
    out, lse = _cuda_many.forward(query, key, value, fields, scale, bounds)
    mass = torch.zeros(rows, HEADS, tokens, device=DEVICE)
    wanted = CountedMass(mass, None)
    upstream = torch.randn_like(out)
    tensors = (upstream, query, key, value, out, lse)
    grads = _cuda_many.backward(*tensors, fields, scale, bounds, wanted)
    for row in range(rows):
        part = slice(*edges[row : row + 2]) if packed else slice(None)
        mine = slice(0, 1) if packed else slice(row, row + 1)
        inputs = [x[mine, :, part].detach().requires_grad_() for x in (query, key, value)]
        if inputs[0].shape[2] == 0:
            continue
        expected_mass = torch.zeros(1, HEADS, tokens, device=DEVICE)
        ragged = {} if packed else dict(zip(("key_start", "key_length"), limits, strict=True))
        expected = reference.routed_attention(
            *inputs,
            visual.row(row),
            scale=scale,
            visual_mass=expected_mass,
            **{name: limit[mine] for name, limit in ragged.items()},
        )
        exact = torch.autograd.grad(expected, inputs, upstream[mine, :, part])
        found = [out[mine, :, part], mass[row : row + 1], *(x[mine, :, part] for x in grads)]
        for ours, other in zip(found, [expected, expected_mass, *exact], strict=True):
            torch.testing.assert_close(ours, other, atol=4e-2, rtol=4e-2)


def captured(dtype: torch.dtype) -> None:
    """Forward and backward within a CUDA graph, where the first call of their kernels is made."""
    heads = [torch.randn(1, n, 40, 128, device=DEVICE, dtype=dtype) for n in (14, 2, 2)]
    inputs = [x.requires_grad_() for x in heads]
    spans = torch.tensor([[[2, 10]]], dtype=torch.int32, device=DEVICE)
    visual = VisualContext.from_spans(spans, 1e4 ** -(torch.arange(64, device=DEVICE) / 64))
    visual = visual.reinject(torch.tensor([True], device=DEVICE), 40, 20)

    def step(attention: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        out = attention(*inputs, visual)
        return out, *torch.autograd.grad(out, inputs, torch.ones_like(out))

    expected = step(reference.routed_attention)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(ops.routed_attention)
    graph.replay()
    for ours, other in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, other, atol=4e-2, rtol=4e-2)


def append(dtype: torch.dtype, size: int) -> None:
    """append_visual_ of a selection."""
    batch, keys = 3, 200
    caches = [torch.randn(batch, HEADS, keys, size, device=DEVICE, dtype=dtype) for _ in range(2)]
    again = [x.clone() for x in caches]
    length = torch.tensor([100, 60, 140], dtype=torch.int32, device=DEVICE)
    spans = torch.tensor([[[3, 40]]] * batch, dtype=torch.int32, device=DEVICE)
    shift = torch.tensor([7, 300, 5], dtype=torch.int32, device=DEVICE)
    inv_freq = 1e4 ** -(torch.arange(size // 2, device=DEVICE) / (size // 2))
    mass = torch.rand(batch, 40, device=DEVICE)
    counts = torch.full((batch,), 40, dtype=torch.int32, device=DEVICE)
    chosen = ops.select_visual_tokens(mass, 0.5, counts)
    assert torch.equal(chosen, reference.select_visual_tokens(mass, 0.5, counts))
    for call, pair in ((ops.append_visual_, caches), (reference.append_visual_, again)):
        call(*pair, length.clone(), spans, shift, inv_freq, selected=chosen)
    for ours, expected in zip(caches, again, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-2, rtol=1e-2)


def main() -> None:
    """All kernels: every compiled head size and number of rows, and each way around them."""
    for dtype in (torch.bfloat16, torch.float16):
        for size in (64, 80, 128, 256):
            Attention(dtype, size).check()
            Attention(dtype, size, groups=3, queries=5).check()
        Attention(dtype, aligned=False).check()
        Attention(dtype, paged=16).check()
        Attention(dtype, paged=5, mass=False).check()
        Attention(dtype, batch=MANY_ROWS, mass=False).check()
        Attention(dtype, paged=16, groups=1, queries=40).check()
        for size in (64, 80, 128, 256):
            mass(dtype, size)
        mass(dtype, 128, groups=1)
        mass(dtype, 128, aligned=False)
    Attention(torch.float32).check()
    Attention(torch.float32, paged=5, mass=False).check()
    mass(torch.float32, 128)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        append(dtype, 128)
        append(dtype, 40)
    for dtype in (torch.bfloat16, torch.float16):
        captured(dtype)
        for size in (64, 80, 128):
            training(dtype, size)
        training(dtype, 128, packed=True)
        training(dtype, 128, select=False)
        training(dtype, 128, again=0)
        training(dtype, 128, groups=1)  # key blocks in one piece
    torch.cuda.synchronize()
    print("every kernel ran and agreed with the reference")


if __name__ == "__main__":
    main()
