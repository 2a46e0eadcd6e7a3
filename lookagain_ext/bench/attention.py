"""The attention ops against torch's SDPA and against what they replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..visual import VisualContext
from .measure import Comparison, Row, Timing, read_bandwidth
from .problems import MODELS, Problem, rotating

SHAPE = MODELS["qwen2.5-vl-7b"]


def sdpa_candidates(causal: bool) -> dict[str, object]:
    """Torch's SDPA as its users call it: with grouped heads, and with keys expanded before."""

    def grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)

    def expanded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    return {"grouped": grouped, "expanded": expanded}


def check(found: Tensor, expected: Tensor) -> None:
    """A benchmark of a wrong result is worthless."""
    tolerance = 4 * torch.finfo(found.dtype).eps ** (0.5 if found.dtype == torch.float32 else 1)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def decode(quick: bool) -> Iterator[Row]:
    """One query, long cache: against SDPA and against the machine's read bandwidth."""
    goals = {torch.bfloat16: 20.0, torch.float32: 1.5}
    for dtype, goal in goals.items():
        for keys in (4096, 32768) if quick else (4096, 16384, 32768):
            problem = Problem(SHAPE, dtype, keys)
            buffers = problem.buffers()
            sdpa = sdpa_candidates(causal=False)
            check(ops.routed_attention(*buffers[0]), sdpa["expanded"](*buffers[0]))
            read = read_bandwidth()
            comparison = Comparison(
                {
                    "ours": rotating(ops.routed_attention, buffers),
                    "read": read,
                    **{name: rotating(call, buffers) for name, call in sdpa.items()},
                },
                budget=2 if quick else 6,
            )
            best = comparison.fastest(*sdpa)
            ratio = comparison.ratio("ours", best)
            seconds = comparison.timing("ours").p50
            rate = problem.cache_bytes / seconds
            limit = 512 * 2**20 / comparison.timing("read").p20
            name = f"decode {_short(dtype)} L={keys}"
            yield _row(name, f"SDPA ({best})", ratio, seconds, 1 / goal, _speedup(goal))
            # The share is taken per round, so that both sides had the same neighbours.
            share = comparison.ratio("read", "ours")
            factor = problem.cache_bytes / (512 * 2**20)
            yield Row(
                f"{name}, share of read bandwidth",
                f"reading 512 MiB at {limit / 1e9:.1f} GB/s",
                share.p50 * factor,
                share.p20 * factor,
                share.p80 * factor,
                seconds * 1e3,
                ">= 0.85",
                share.p50 * factor >= 0.85,
                f"{rate / 1e9:.1f} GB/s of keys and values",
            )


def decode_mass(quick: bool) -> Iterator[Row]:
    """What reading out the attention on visual tokens adds to a decode."""
    mass = torch.zeros(1, SHAPE.key_heads, 1024)
    for keys in (4096, 32768):
        problem = Problem(SHAPE, torch.bfloat16, keys, visual_tokens=1024)
        buffers, visual = problem.buffers(), problem.visual()
        comparison = Comparison(
            {
                "plain": rotating(lambda q, k, v: ops.routed_attention(q, k, v), buffers),
                "mass": rotating(
                    lambda q, k, v, c=visual: ops.routed_attention(q, k, v, c, visual_mass=mass),
                    buffers,
                ),
            },
            budget=2 if quick else 6,
        )
        ratio, seconds = comparison.ratio("mass", "plain"), comparison.timing("mass").p50
        name = f"decode bf16 L={keys} with visual_mass, 1024 visual tokens"
        yield _row(name, "without", ratio, seconds, 1.03, "<= 1.03x")


def decode_paged(quick: bool) -> Iterator[Row]:
    """A cache in shuffled blocks of 16 slots against the same cache in one piece."""
    for dtype in (torch.bfloat16, torch.float32):
        for keys in (4096, 32768):
            problem = Problem(SHAPE, dtype, keys)
            dense, length = problem.buffers(), torch.tensor([keys], dtype=torch.int32)
            call = partial(_decode_blocks, length)
            candidates = {"dense": rotating(ops.routed_attention, dense)}
            for layout in ("HND", "NHD"):
                paged = [(q, *in_blocks(k, v, 16, layout)) for q, k, v in dense]
                check(call(*paged[0]), ops.routed_attention(*dense[0]))
                candidates[layout] = rotating(call, paged)
            comparison = Comparison(candidates, budget=2 if quick else 6)
            for layout in ("HND", "NHD"):
                ratio, seconds = comparison.ratio(layout, "dense"), comparison.timing(layout).p50
                name = f"decode {_short(dtype)} L={keys} in shuffled blocks of 16, {layout}"
                yield _row(name, "cache in one piece", ratio, seconds, None, "")


def _decode_blocks(
    length: Tensor, query: Tensor, key: Tensor, value: Tensor, block_table: Tensor
) -> Tensor:
    return ops.routed_attention(query, key, value, key_length=length, block_table=block_table)


def in_blocks(
    key: Tensor, value: Tensor, block_size: int, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """A cache of one row in shuffled blocks.

    Args:
        key: [1, H_kv, L, D], L a multiple of `block_size`.
        value: [1, H_kv, L, D].
        block_size: slots of a block.
        layout: how a block lies, "HND" ([H_kv, block_size, D]) or "NHD".

    Returns:
        (key, value, block_table) as `ops.routed_attention` takes them.
    """
    order = torch.randperm(key.shape[2] // block_size, generator=torch.Generator().manual_seed(0))
    axes = (0, 1, 2, 3) if layout == "HND" else (0, 2, 1, 3)
    caches = []
    for cache in (key, value):
        blocks = cache[0].unflatten(1, (-1, block_size)).transpose(0, 1)
        paged = blocks.new_empty([blocks.shape[axis] for axis in axes]).permute(axes)
        paged[order] = blocks
        caches.append(paged)
    return *caches, order[None].to(torch.int32)


def decode_reinjections(quick: bool) -> Iterator[Row]:
    """Four COPY re-injections of 1024 tokens in 4096 keys."""
    for dtype in (torch.bfloat16, torch.float32):
        problem = Problem(SHAPE, dtype, 4096, visual_tokens=1024, reinjections=4)
        buffers, visual = problem.buffers(), problem.visual()
        appended = [_append(problem, *buffer) for buffer in buffers]
        check(ops.routed_attention(*buffers[0], visual), ops.routed_attention(*appended[0]))
        comparison = Comparison(
            {
                "none": rotating(ops.routed_attention, buffers),
                "virtual": rotating(
                    lambda q, k, v, c=visual: ops.routed_attention(q, k, v, c), buffers
                ),
                "rows": rotating(ops.routed_attention, appended),
            },
            budget=2 if quick else 6,
        )
        seconds = comparison.timing("virtual").p50
        name = f"decode {_short(dtype)} L=4096, 4 x COPY of 1024"
        ratio = comparison.ratio("virtual", "none")
        yield _row(name, "no re-injection", ratio, seconds, 1.35, "<= 1.35x")
        ratio = comparison.ratio("virtual", "rows")
        yield _row(name, "4096 physically appended rows, our kernel", ratio, seconds, 1.0, "< 1.0x")


def _append(
    problem: Problem, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    visual = problem.visual()
    extra = problem.visual_tokens * problem.reinjections
    length = torch.full((problem.batch,), problem.keys, dtype=torch.int32)
    caches = []
    for cache in (key, value):
        larger = cache.new_empty(*cache.shape[:2], problem.keys + extra, cache.shape[-1])
        larger[:, :, : problem.keys] = cache
        caches.append(larger)
    for number in range(problem.reinjections):
        shift = visual.shift[:, number].contiguous()
        ops.append_visual_(*caches, length, visual.spans, shift, visual.inv_freq)
    return query, *caches


def prefill(quick: bool) -> Iterator[Row]:
    """Causal forward, and forward with backward, as in a prefill and in training."""
    goals = {torch.bfloat16: 2.5, torch.float32: 1.0}
    for dtype, goal in goals.items():
        for length in (1024,) if quick else (1024, 4096):
            problem = Problem(SHAPE, dtype, length, queries=length)
            inputs = problem.tensors()
            sdpa = sdpa_candidates(causal=True)
            check(ops.routed_attention(*inputs), sdpa["expanded"](*inputs))
            budget = 3 if quick else 12
            calls = {"ours": ops.routed_attention, **sdpa}
            for training in (False, True):
                comparison = Comparison(
                    {
                        name: partial(_forward_backward, call, inputs, training)
                        for name, call in calls.items()
                    },
                    budget=budget,
                )
                best = comparison.fastest(*sdpa)
                ratio, seconds = comparison.ratio("ours", best), comparison.timing("ours").p50
                kind = "training forward + backward" if training else "prefill"
                flop = 2 * 2 * SHAPE.query_heads * SHAPE.head_dim * length**2 / 2
                flop *= 3.5 if training else 1
                name = f"{kind} {_short(dtype)} L={length}"
                note = f"{flop / seconds / 1e9:.0f} GFLOP/s"
                yield _row(name, f"SDPA ({best})", ratio, seconds, 1 / goal, _speedup(goal), note)


def _forward_backward(call: object, inputs: tuple[Tensor, ...], training: bool) -> None:
    if not training:
        with torch.no_grad():
            call(*inputs)
        return
    leaves = [x.detach().requires_grad_() for x in inputs]
    call(*leaves).sum().backward()


def training_reinjections(quick: bool) -> Iterator[Row]:
    """A training step's attention with two COPY re-injections against the plain step."""
    length, tokens = 1024, 256
    inputs = Problem(SHAPE, torch.bfloat16, length, queries=length).tensors()
    visual = _looking_twice(length, tokens)
    comparison = Comparison(
        {
            "plain": lambda: _forward_backward(ops.routed_attention, inputs, True),
            "again": lambda: _forward_backward(
                lambda q, k, v: ops.routed_attention(q, k, v, visual), inputs, True
            ),
        },
        budget=3 if quick else 8,
    )
    plain = length**2 / 2
    extra = tokens * ((length - 512) + (length - 768))
    yield _row(
        f"training step's attention bf16 L={length}, 2 x COPY of {tokens}",
        "no re-injection",
        comparison.ratio("again", "plain"),
        comparison.timing("again").p50,
        None,
        "",
        f"{1 + extra / plain:.2f}x the FLOP",
    )


def _looking_twice(length: int, tokens: int) -> VisualContext:
    """A picture in the first half, shown again after one half and after three quarters."""
    half = length // 2
    visual = Problem(SHAPE, torch.bfloat16, length, queries=half, visual_tokens=tokens).visual()
    for begin in (half, 3 * length // 4):
        visual = visual.reinject(torch.ones(1, dtype=torch.bool), begin, begin)
    return visual


def training_mass(quick: bool) -> Iterator[Row]:
    """What the answer's attention on the picture adds to a training step's backward."""
    length, tokens = (1024, 256) if quick else (2048, 512)
    visual = _looking_twice(length, tokens)
    answer = torch.arange(length)[None] >= length // 2
    rows = torch.tensor([[[length // 2, length]]], dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float32):
        inputs = Problem(SHAPE, dtype, length, queries=length).tensors()
        leaves = [x.detach().requires_grad_() for x in inputs]
        mass = torch.zeros(1, SHAPE.key_heads, tokens)
        given = {"visual_mass": mass, "mass_in_backward": True, "mass_queries": answer}
        plain, lse = ops.routed_attention(*leaves, visual, return_lse=True)
        counted = ops.routed_attention(*leaves, visual, **given)
        upstream = torch.randn_like(plain)
        given = {"inputs": leaves, "grad_outputs": upstream, "retain_graph": True}
        backward = partial(torch.autograd.grad, **given)
        own = partial(ops.visual_mass, *inputs[:2], visual, rows, lse=lse)
        backward(counted)
        torch.testing.assert_close(mass, own()[:, 0], rtol=1e-3, atol=1e-3)
        comparison = Comparison(
            {
                "plain": partial(backward, plain),
                "counted": partial(backward, counted),
                "apart": partial(_both, partial(backward, plain), own),
            },
            budget=6 if quick else 30,
        )
        name = f"training backward {_short(dtype)} L={length} with visual mass, {tokens} tokens"
        seconds = comparison.timing("counted").p50
        ratio = comparison.ratio("counted", "plain")
        yield _row(name, "without", ratio, seconds, 1.02, "<= 1.02x")
        ratio = comparison.ratio("counted", "apart")
        yield _row(name, "and a visual_mass pass of its own", ratio, seconds, 1.0, "< 1.0x")


def _both(first: Callable[[], object], second: Callable[[], object]) -> None:
    first()
    second()


def append(quick: bool) -> Iterator[Row]:
    """append_visual_ against gather, rotate and cat in torch."""
    from ..reference import rotate

    problem = Problem(SHAPE, torch.bfloat16, 8192)
    _, key, value = problem.tensors()
    spans = torch.tensor([[[16, 1024]]], dtype=torch.int32)
    shift = torch.tensor([5000], dtype=torch.int32)
    half = SHAPE.head_dim // 2
    inv_freq = 1e6 ** -(torch.arange(half) / half)
    room_key, room_value = torch.cat([key, key], 2), torch.cat([value, value], 2)

    def ours() -> None:
        length = torch.tensor([8192], dtype=torch.int32)
        ops.append_visual_(room_key, room_value, length, spans, shift, inv_freq)

    def by_torch() -> tuple[Tensor, Tensor]:
        turned = rotate(key[:, :, 16:1040], shift[:, None, None], inv_freq).to(key.dtype)
        return torch.cat([key, turned], 2), torch.cat([value, value[:, :, 16:1040]], 2)

    ours()
    expected = by_torch()
    check(room_key[:, :, : 8192 + 1024], expected[0])
    comparison = Comparison({"ours": ours, "torch": by_torch}, budget=2 if quick else 5)
    ratio, seconds = comparison.ratio("ours", "torch"), comparison.timing("ours").p50
    moved = 4 * 1024 * SHAPE.key_heads * SHAPE.head_dim * 2
    note = f"{moved / seconds / 1e9:.1f} GB/s read and written"
    yield _row(
        "append_visual_ bf16, 1024 tokens to 8192", "gather + rotate + cat", ratio, seconds,
        None, "", note,
    )  # fmt: skip


def _row(
    name: str,
    against: str,
    ratio: Timing,
    seconds: float,
    most: float | None,
    goal: str,
    note: str = "",
) -> Row:
    met = None if most is None else ratio.p50 <= most
    return Row(name, against, ratio.p50, ratio.p20, ratio.p80, seconds * 1e3, goal, met, note)


def _speedup(goal: float) -> str:
    return f"<= {1 / goal:.3g}x"


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
