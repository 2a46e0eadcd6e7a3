"""Every CUDA kernel once, on small shapes, compared with the reference: for a memory checker."""

from __future__ import annotations

import torch

from lookagain_ext import VisualContext, ops, reference


def attend(dtype: torch.dtype, size: int, groups: int, queries: int) -> None:
    """routed_attention with re-injections, mass and several pieces of the key axis."""
    device, batch, heads, keys, tokens = "cuda", 2, 2, 300, 90
    shapes = ((heads * groups, queries), (heads, keys), (heads, keys))
    tensors = [torch.randn(batch, *x, size, device=device, dtype=dtype) for x in shapes]
    spans = torch.tensor([[[5, tokens]]] * batch, dtype=torch.int32, device=device)
    inv_freq = 1e4 ** -(torch.arange(size // 2, device=device) / (size // 2))
    everyone = torch.ones(batch, dtype=torch.bool, device=device)
    visual = VisualContext.from_spans(spans, inv_freq).reinject(everyone, 70, 200)
    visual = visual.reinject(everyone, 190, keys - queries)
    length = torch.tensor([keys, 230], dtype=torch.int32, device=device)
    results = []
    for call in (ops.routed_attention, reference.routed_attention):
        mass = torch.zeros(batch, heads, tokens, device=device)
        out = call(*tensors, visual, key_length=length, visual_mass=mass)
        results.append((out, mass))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-2, rtol=2e-2)


def append(dtype: torch.dtype, size: int) -> None:
    """append_visual_ of a selection."""
    device, batch, heads, keys = "cuda", 3, 2, 200
    caches = [torch.randn(batch, heads, keys, size, device=device, dtype=dtype) for _ in range(2)]
    again = [x.clone() for x in caches]
    length = torch.tensor([100, 60, 140], dtype=torch.int32, device=device)
    spans = torch.tensor([[[3, 40]]] * batch, dtype=torch.int32, device=device)
    shift = torch.tensor([7, 300, 5], dtype=torch.int32, device=device)
    inv_freq = 1e4 ** -(torch.arange(size // 2, device=device) / (size // 2))
    mass = torch.rand(batch, 40, device=device)
    chosen = ops.select_visual_tokens(mass, 0.5, torch.full((batch,), 40, device=device))
    for call, pair in ((ops.append_visual_, caches), (reference.append_visual_, again)):
        call(*pair, length.clone(), spans, shift, inv_freq, selected=chosen)
    for ours, expected in zip(caches, again, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-2, rtol=1e-2)


def main() -> None:
    """All kernels, every compiled head size."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for size in (64, 80, 128, 256):
            for groups, queries in ((7, 1), (3, 5)):
                attend(dtype, size, groups, queries)
        append(dtype, 128)
        append(dtype, 40)
    torch.cuda.synchronize()
    print("every kernel ran and agreed with the reference")


if __name__ == "__main__":
    main()
