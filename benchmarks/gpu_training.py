"""Attention of a training step on a GPU: forward, backward and visual mass, with re-injections.

`python -m benchmarks.gpu_training --out FILE` measures; `--device cpu --small` only shows that
every row runs. Baselines are torch's SDPA kernels and flash-attn on the *same FLOP*: plain causal
attention over a sequence so long that it has as many (query, key) pairs as ours with its
re-injections; and FlexAttention, which can be told to compute the very same. What is not there or
fails is named in its row.

The optimiser step of a whole model: `benchmarks/gpu_training_step.py`.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor

from lookagain_ext import VisualContext, ops, reference
from lookagain_ext.bench import table
from lookagain_ext.bench.measure import Comparison, Row
from lookagain_ext.ops import _cuda_many
from lookagain_ext.ops._counted_mass import CountedMass
from lookagain_ext.ops.visual_mass import forward as known_width

from .gpu_kernels import row, same
from .gpu_plots import plot_kernels
from .gpu_timing import compare, describe
from .gpu_training_peers import (
    Attention,
    FlexAttention,
    LeftOut,
    Peer,
    first_line,
    index_fields,
    own_kernels,
    peers,
    sdpa,
    through,
)
from .gpu_training_problems import Setting, Shape

FLOP_OF_PAIR = {"forward": 4, "backward": 10}  # times D, for a query head, query and key
AT_LEAST = 1 / 0.9  # time over the baseline's: 0.9 of its rate


def ours(visual: VisualContext | None) -> Attention:
    """routed_attention with these re-injections."""
    return lambda query, key, value: ops.routed_attention(query, key, value, visual)


def both_ways(
    setting: Setting, attention: Attention, tensors: tuple[Tensor, ...]
) -> tuple[Callable[[], float], Callable[[], float]]:
    """Timed forward, with what it keeps for the backward, and timed backward."""
    *inputs, upstream = tensors
    out = attention(*inputs)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, upstream, retain_graph=True)

    return setting.timed(lambda: attention(*inputs)), setting.timed(backward)


def attention(setting: Setting, console: Console) -> Iterator[Row]:
    """Forward and backward beside every peer; ours is checked first."""
    del console
    flex = FlexAttention(setting.compile_seconds, setting.on_gpu)
    for shape in setting.shapes:
        tensors, visual = setting.tensors(shape.length), setting.visual(shape)
        plain = setting.tensors(shape.same_flop)
        check(setting, shape, tensors, visual)
        there, back = both_ways(setting, ours(visual), tensors)
        ways = {"forward": {"ours": there}, "backward": {"ours": back}}
        measured, missing = {}, {}
        for name, peer in peers(setting, shape, visual, flex).items():
            try:
                if isinstance(peer, LeftOut):
                    raise peer
                with flex.paying(name):
                    there, back = both_ways(
                        setting, peer.call, tensors if peer.same_work else plain
                    )
                    there(), back()
                if peer.same_work:
                    agree(ours(visual), peer.call, tensors)
            except LeftOut as reason:
                missing[name] = str(reason)
                continue
            except Exception as error:  # noqa: BLE001 - whatever it is, its row tells
                missing[name] = first_line(error)
                continue
            measured[name] = peer
            ways["forward"][name], ways["backward"][name] = there, back
        for way, calls in ways.items():
            comparison = compare(calls, setting.seconds)
            yield from against_peers(setting, shape, way, comparison, measured)
            for name, why in missing.items():
                yield Row.left_out(f"{way} {shape}", name, why)
        del ways, measured, tensors, plain


def against_peers(
    setting: Setting, shape: Shape, way: str, comparison: Comparison, measured: dict[str, Peer]
) -> Iterator[Row]:
    """One row for each baseline, its and our rate beside; the goal is torch's fastest SDPA."""
    model = setting.model
    flop = FLOP_OF_PAIR[way] * model.head_dim * model.query_heads * shape.batch
    mine = flop * shape.pairs / comparison.timing("ours").p50 / 1e12
    baselines = [name for name in measured if name.startswith("SDPA")]
    fastest = comparison.fastest(*baselines) if baselines else None
    for name, peer in measured.items():
        length = shape.length if peer.same_work else shape.same_flop
        pairs = shape.pairs if peer.same_work else length * (length + 1) / 2
        theirs = flop * pairs / comparison.timing(name).p50 / 1e12
        note = f"{mine:.0f} beside {theirs:.0f} TFLOP/s"
        goal = AT_LEAST if name == fastest else None
        against = f"{name}, L={length}"
        yield row(f"{way} {shape}", against, comparison, "ours", name, goal, note)


def agree(first: Attention, second: Attention, tensors: tuple[Tensor, ...]) -> None:
    """Raises AssertionError unless results and gradients are the same."""
    *inputs, upstream = tensors
    results = []
    for call in (first, second):
        out = call(*inputs)
        results.append((out, *torch.autograd.grad(out, inputs, upstream)))
    for found, expected in zip(*results, strict=True):
        same(found, expected)


def check(
    setting: Setting, shape: Shape, tensors: tuple[Tensor, ...], visual: VisualContext | None
) -> None:
    """A benchmark of a wrong result is worthless: without re-injections against SDPA, with them
    against the reference where that fits (one key head, the last queries).
    """
    if visual is None:
        agree(ours(None), next(iter(sdpa(setting.on_gpu).values())), tensors)
        return
    query, key, value, _ = tensors
    group = setting.model.query_heads // setting.model.key_heads
    last = min(32, shape.length)
    with torch.no_grad():
        found = ops.routed_attention(query, key, value, visual)
        part = query[:, :group, -last:], key[:, :1], value[:, :1]
        expected = reference.routed_attention(*part, visual)
    same(found[:, :group, -last:], expected)


def versions(setting: Setting, console: Console) -> Iterator[Row]:
    """Beside SDPA once more, with each FlashAttention that torch can use in place of its own."""
    shapes = [replace(shape, flex=False) for shape in setting.shapes]
    for version in ("FA3", "FA4"):
        try:
            with through(version), setting.only(shapes):
                for entry in attention(setting, console):
                    if entry.against.startswith("SDPA"):
                        yield replace(entry, name=f"{entry.name}, through {version}")
        except Exception as error:  # noqa: BLE001 - whatever it is, its row tells
            why = str(error) if isinstance(error, LeftOut) else first_line(error)
            yield Row.left_out("attention", f"through {version}", why)


def memory(setting: Setting, console: Console) -> Iterator[Row]:
    """Peak of a forward and backward at two lengths: linear growth is the ratio of the lengths."""
    del console
    for again in (0, 2, 8):
        peaks = []
        for length in setting.growth:
            shape = Shape(length, again, setting.growth[0] // 8)
            *inputs, upstream = setting.tensors(length)
            call = ours(setting.visual(shape))

            def step(call: Attention = call, inputs: list = inputs, up: Tensor = upstream) -> None:
                torch.autograd.grad(call(*inputs), inputs, up)

            peaks.append(max(setting.peak(step), 1))
        short, long = setting.growth
        ratio, most = peaks[1] / peaks[0], 1.1 * long / short
        note = ", ".join(
            f"{peak / length / 1e3:.1f} KB a token at L={length}"
            for peak, length in zip(peaks, setting.growth, strict=True)
        )
        name = f"peak memory, {again} re-injections, L={short} to {long}"
        yield Row(name, "itself", ratio, ratio, ratio, 0, f"<= {most:.3g}x", ratio <= most, note)


def mass(setting: Setting, console: Console) -> Iterator[Row]:
    """visual_mass of the last half of the queries, beside the forward whose LSE it uses; and as
    column sums within the backward of our own kernels.
    """
    del console
    for shape in setting.shapes:
        if not shape.again:
            continue
        yield mass_of(setting, shape)
        try:
            yield mass_within(setting, shape)
        except Exception as error:  # noqa: BLE001 - whatever it is, its row tells
            why = str(error) if isinstance(error, LeftOut) else first_line(error)
            yield Row.left_out(f"visual_mass {shape} within the backward", "own kernels", why)


def mass_within(setting: Setting, shape: Shape) -> Row:
    """The row of one shape; raises LeftOut where there is no GPU."""
    visual = setting.visual(shape)
    own_kernels(setting, visual)
    query, key, value, upstream = (x.detach() for x in setting.tensors(shape.length))
    fields, scale = index_fields(visual), query.shape[-1] ** -0.5
    out, lse = _cuda_many.forward(query, key, value, fields, scale)
    counted = torch.arange(shape.length, device=setting.device)[None] >= shape.length // 2
    total = torch.zeros(1, key.shape[1], shape.tokens, device=setting.device)

    def backward(mass: Tensor | None) -> tuple[Tensor, ...]:
        tensors = (upstream, query, key, value, out, lse)
        wanted = None if mass is None else CountedMass(mass, counted)
        return _cuda_many.backward(*tensors, fields, scale, mass=wanted)

    backward(total)
    rows = torch.tensor([[[shape.length // 2, shape.length]]], device=setting.device).int()
    same(total, ops.visual_mass(query, key, visual, rows, lse=lse)[:, 0])
    calls = {"with": lambda: backward(total), "without": lambda: backward(None)}
    timed = {name: setting.timed(call) for name, call in calls.items()}
    comparison = compare(timed, setting.seconds)
    name = f"visual_mass {shape} within the backward"
    return row(name, "the same backward without", comparison, "with", "without", None, "")


def mass_of(setting: Setting, shape: Shape) -> Row:
    """The row of one shape."""
    query, key, value, _ = (x.detach() for x in setting.tensors(shape.length))
    visual, counted = setting.visual(shape), shape.length // 2
    first = shape.length - counted
    rows = torch.tensor([[[first, shape.length]]], dtype=torch.int32, device=setting.device)
    _, lse = ops.routed_attention(query, key, value, visual, return_lse=True)
    found = ops.visual_mass(query, key, visual, rows, lse=lse)
    group = setting.model.query_heads // setting.model.key_heads
    few = torch.tensor([[[shape.length - 16, shape.length]]], dtype=torch.int32)
    few = few.to(setting.device)
    same(
        ops.visual_mass(query, key, visual, few, lse=lse)[:, :, :1],
        reference.visual_mass(query[:, :group, -16:], key[:, :1], visual, few),
    )
    # Neither may wait for the device: the number of tokens is known, and a forward that has a
    # backward remembers its layout.
    fields, scale = index_fields(visual), query.shape[-1] ** -0.5
    leaves = [x.requires_grad_() for x in (query, key, value)]
    calls = {
        "ours": lambda: known_width(query, key, rows, shape.tokens, lse, *fields, scale),
        "forward": lambda: ops.routed_attention(*leaves, visual),
    }
    same(calls["ours"](), found)
    timed = {name: setting.timed(call) for name, call in calls.items()}
    comparison = compare(timed, setting.seconds)
    seen = counted + sum(shape.length - max(start, first) for start in shape.starts)
    flop = 2 * setting.model.head_dim * setting.model.query_heads * seen * found.shape[-1]
    note = f"{flop / comparison.timing('ours').p50 / 1e12:.0f} TFLOP/s"
    name = f"visual_mass {shape}, {counted} queries"
    return row(name, "the forward", comparison, "ours", "forward", None, note)


def new_lengths(setting: Setting, console: Console) -> Iterator[Row]:
    """The first call at a length that has not been seen, which libraries may plan for."""
    del console
    first, again = [], []
    for number in range(4):
        length = (64 if not setting.on_gpu else 3072) + 8 * number
        *inputs, upstream = setting.tensors(length)
        for times in (first, again):
            if setting.on_gpu:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            torch.autograd.grad(ours(None)(*inputs), inputs, upstream)
            if setting.on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    ratio = sorted(a / b for a, b in zip(first, again, strict=True))
    spread = (ratio[2], ratio[1], ratio[-1])
    yield Row("first call at a length", "the second", *spread, max(first) * 1e3, "", None)


def packing(setting: Setting, console: Console) -> Iterator[Row]:
    """Uneven sequences packed into one row, 2 x COPY in each, beside a padded batch and one by one.

    All three do the same arithmetic but for what a library spends on padding.
    """
    del console
    unit, tokens = (1024, 512) if setting.on_gpu else (32, 8)
    shapes = [Shape(unit * n // 2, 2, tokens) for n in (16, 9, 6, 5, 4, 3, 2, 2)]
    lengths = [shape.length for shape in shapes]
    bounds = [0, *itertools.accumulate(lengths)]
    contexts = [setting.visual(shape) for shape in shapes]
    fields = ("spans", "shift", "start")
    rows = {name: torch.cat([getattr(each, name) for each in contexts]) for name in fields}
    visual = replace(contexts[0], **rows)
    *packed, upstream = setting.tensors(bounds[-1])
    *padded, padded_upstream = setting.tensors(lengths[0], len(lengths))
    left = torch.tensor([lengths[0] - n for n in lengths], dtype=torch.int32)
    left = left.to(setting.device)
    moved = replace(
        visual,
        spans=torch.stack([visual.spans[..., 0] + left[:, None], visual.spans[..., 1]], -1),
        start=visual.start + left[:, None],
    )
    parts = list(itertools.pairwise(bounds))
    with torch.no_grad():
        for number, (begin, end) in enumerate(parts):
            for whole, one in zip(padded, packed, strict=True):
                whole[number, :, lengths[0] - (end - begin) :] = one[0, :, begin:end]

    def together(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.routed_attention(query, key, value, visual, cu_seqlens=bounds)

    def one_by_one(*heads: Tensor) -> Tensor:
        each = zip(*(x.split(lengths, 2) for x in heads), contexts, strict=True)
        return torch.cat([ops.routed_attention(*one) for one in each], 2)

    def batch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.routed_attention(query, key, value, moved, key_start=left)

    agree(together, one_by_one, (*packed, upstream))
    with torch.no_grad():
        found = batch(*padded)
        for number, (begin, end) in enumerate(parts):
            same(found[number, :, lengths[0] - (end - begin) :], together(*packed)[0, :, begin:end])
    ours_there, ours_back = both_ways(setting, together, (*packed, upstream))
    others = {
        "a padded batch": both_ways(setting, batch, (*padded, padded_upstream)),
        "a call for each sequence": both_ways(setting, one_by_one, (*packed, upstream)),
    }
    for number, way in enumerate(("forward", "backward")):
        calls = {"ours": (ours_there, ours_back)[number]}
        comparison = compare(
            calls | {n: both[number] for n, both in others.items()}, setting.seconds
        )
        for name in others:
            title = f"{way}, {len(lengths)} packed sequences of {lengths[-1]} to {lengths[0]}"
            yield row(title, name, comparison, "ours", name, None, "2 x COPY in each")


SUITES = {
    "attention": attention,
    "versions": versions,
    "mass": mass,
    "packing": packing,
    "memory": memory,
    "new_lengths": new_lengths,
}


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the suite.")] = "cuda",
    small: Annotated[bool, typer.Option(help="Tiny shapes: does every row run?")] = False,
    seconds: Annotated[float, typer.Option(help="For each comparison.")] = 0.6,
    suite: Annotated[list[str] | None, typer.Option(help="Names of suites; all if none.")] = None,
    compile_seconds: Annotated[
        float, typer.Option(help="For FlexAttention's first calls, all shapes together.")
    ] = 110.0,
    own_kernels: Annotated[bool, typer.Option(help="Rows of our own kernels.")] = True,
) -> None:
    """Measure every row and print the table."""
    console = Console(width=170)
    setting = Setting(device, small, seconds, compile_seconds, own_kernels)
    where = describe(setting.device)
    rows = []
    for name in suite or SUITES:
        for entry in SUITES[name](setting, console):
            rows.append(entry)
            measured = ""
            if entry.ratio is not None:
                measured = f"{entry.ratio:.3g} | {entry.milliseconds:.3f} ms | "
            console.print(
                f"{entry.name} | {entry.against} | {measured}{entry.note}", highlight=False
            )
            if out is not None:  # kept row by row: a run that is cut off keeps what it found
                out.parent.mkdir(parents=True, exist_ok=True)
                result = {"machine": where, "rows": [row.as_dict() for row in rows]}
                out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(table(rows))
    if out is not None:
        plot_kernels(result, out.with_suffix(".png"))
        console.print(f"Results: {out}, {out.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
