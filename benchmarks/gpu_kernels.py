"""The CUDA kernels beside what people use today, each row with its goal.

`python -m benchmarks.gpu_kernels --out FILE` measures; `--device cpu --small` only shows that every
row runs. Peers (FlashInfer, flash-attn) are measured when they are installed:
`pip install flashinfer-python` and `pip install flash-attn --no-build-isolation`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor

from lookagain_ext import VisualContext, ops
from lookagain_ext.bench import table
from lookagain_ext.bench.measure import Comparison, Row
from lookagain_ext.bench.problems import MODELS, ModelShape, Problem
from lookagain_ext.reference import rotate

from .gpu_plots import plot_kernels
from .gpu_timing import candidate, compare, copies, copy_bandwidth, describe

SHAPE = MODELS["qwen2.5-vl-7b"]
BFLOAT16 = torch.bfloat16
Peer = Callable[[Tensor, Tensor, Tensor], Tensor]


class Setting:
    """Device, shapes and patience of a run."""

    def __init__(self, device: str, small: bool, seconds: float) -> None:
        self.device = torch.device(device)
        self.seconds = seconds
        self.shape = ModelShape(4, 2, 64) if small else SHAPE
        self.batches = (2,) if small else (32,)
        self.lengths = (96,) if small else (4096, 8192, 32768)
        self.visual = 32 if small else 1024
        self.copy = copy_bandwidth(self.device)

    def problem(self, batch: int, keys: int, reinjections: int = 0) -> Problem:
        """A decode step with a picture at the front."""
        return Problem(
            self.shape,
            BFLOAT16,
            keys,
            batch=batch,
            visual_tokens=self.visual,
            reinjections=reinjections,
        )

    def inputs(self, problem: Problem) -> list[tuple[Tensor, ...]]:
        """Query, key and value on the device, made there; as often as the caches need."""
        shape, batch = problem.shape, problem.batch
        sizes = ((shape.query_heads, 1), (shape.key_heads, problem.keys))
        draw = [
            torch.randn(batch, *size, shape.head_dim, dtype=BFLOAT16, device=self.device)
            for size in (*sizes, sizes[1])
        ]
        return copies(tuple(draw))

    def visuals(self, problem: Problem) -> VisualContext:
        """The problem's re-injections on the device."""
        return problem.visual().to(self.device)


def sdpa_peers(device: torch.device) -> dict[str, Peer]:
    """torch's SDPA with each of its backends."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def with_backend(backend: SDPBackend) -> Peer:
        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

        return call

    names = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    if device.type == "cuda":
        names |= {
            "cuDNN": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
        }
        names.pop("math")
    return {f"SDPA {name}": with_backend(backend) for name, backend in names.items()}


def other_peers(problem: Problem, setting: Setting) -> dict[str, Peer]:
    """FlexAttention, FlashInfer and flash-attn, where they can run."""
    peers: dict[str, Peer] = {}
    if setting.device.type != "cuda":
        return peers
    if problem.keys == setting.lengths[0]:  # it compiles for each length
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        # Its own decode kernel takes groups of a power of two only.
        options = {"FORCE_USE_FLEX_ATTENTION": True}
        peers["FlexAttention"] = lambda q, k, v: compiled(
            q, k, v, enable_gqa=True, kernel_options=options
        )
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_with_kvcache

        def flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            turned = (x.transpose(1, 2) for x in (query, key, value))
            return flash_attn_with_kvcache(*turned).transpose(1, 2)

        peers["flash-attn"] = flash
    if importlib.util.find_spec("flashinfer"):
        peers["FlashInfer"] = flashinfer(problem, setting.device)
    return peers


def flashinfer(problem: Problem, device: torch.device) -> Peer:
    """FlashInfer's paged decode in pages of 16, planned beforehand, on the caches as they lie."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    page, shape, batch = 16, problem.shape, problem.batch
    pages = problem.keys // page  # of one head; those of the next head lie behind them
    strides = (page * shape.head_dim, problem.keys * shape.head_dim, shape.head_dim, 1)
    total = (batch - 1) * shape.key_heads * pages + pages
    rows = torch.arange(batch, dtype=torch.int32, device=device)
    numbers = rows[:, None] * (shape.key_heads * pages) + torch.arange(
        pages, dtype=torch.int32, device=device
    )
    workspace = torch.zeros(128 * 2**20, dtype=torch.uint8, device=device)
    # Its kernel for CUDA cores does not take groups of 7.
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace, "HND", use_tensor_cores=True, backend="fa2"
    )
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32, device=device) * pages,
        numbers.flatten(),
        torch.full_like(rows, page),
        shape.query_heads,
        shape.key_heads,
        shape.head_dim,
        page,
        q_data_type=BFLOAT16,
        kv_data_type=BFLOAT16,
    )

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        size = (total, shape.key_heads, page, shape.head_dim)
        caches = tuple(x.as_strided(size, strides) for x in (key, value))
        return wrapper.run(query[:, :, 0], caches)[:, :, None]

    return call


def same(found: Tensor, expected: Tensor) -> None:
    """A benchmark of a wrong result is worthless: raises AssertionError unless they agree."""
    off = ((found.float() - expected.float()).norm() / expected.float().norm()).item()
    if not off <= 2e-2:
        raise AssertionError(f"results differ by {off:.1%}")


def usable(peers: dict[str, Peer], inputs: tuple[Tensor, ...], console: Console) -> dict[str, Peer]:
    """The peers that run here and agree with us."""
    expected = ops.routed_attention(*inputs)
    good = {}
    for name, call in peers.items():
        try:
            same(call(*inputs), expected)
            good[name] = call
        except (RuntimeError, AssertionError, ImportError, TypeError) as error:
            console.print(f"{name} left out: {str(error).splitlines()[0][:120]}", highlight=False)
    return good


def row(
    name: str,
    against: str,
    comparison: Comparison,
    ours: str,
    baseline: str,
    most: float | None = None,
    note: str = "",
) -> Row:
    """Ours over the baseline; met when at most `most`."""
    ratio, seconds = comparison.ratio(ours, baseline), comparison.timing(ours).p50
    goal, met = ("", None) if most is None else (f"<= {most:.3g}x", ratio.p50 <= most)
    return Row(name, against, ratio.p50, ratio.p20, ratio.p80, seconds * 1e3, goal, met, note)


def share(
    name: str, setting: Setting, comparison: Comparison, bytes: int, goal: float | None
) -> Row:
    """Of the device's copy bandwidth, taken round by round."""
    ratio = comparison.ratio("copy", "ours")
    factor = bytes / setting.copy.bytes
    seconds, copy = comparison.timing("ours").p50, comparison.timing("copy").p50
    return Row(
        f"{name}, share of copy bandwidth",
        f"copying at {setting.copy.bytes / copy / 1e9:.0f} GB/s",
        ratio.p50 * factor,
        ratio.p20 * factor,
        ratio.p80 * factor,
        seconds * 1e3,
        "" if goal is None else f">= {goal}",
        None if goal is None else ratio.p50 * factor >= goal,
        f"{bytes / seconds / 1e9:.0f} GB/s",
    )


def decode(setting: Setting, console: Console) -> Iterator[Row]:
    """Batches against the memory, single rows against the fastest peer; both with the mass."""
    for batch in (1, *setting.batches):
        for keys in setting.lengths:
            if batch * keys > 32 * 8192:
                continue
            problem = setting.problem(batch, keys)
            inputs, visual = setting.inputs(problem), setting.visuals(problem)
            peers = sdpa_peers(setting.device) | other_peers(problem, setting)
            peers = usable(peers, inputs[0], console)
            mass = torch.zeros(
                batch, setting.shape.key_heads, setting.visual, device=setting.device
            )
            calls = {
                "plain": candidate(ops.routed_attention, inputs),
                "ours": candidate(
                    lambda q, k, v, c=visual, m=mass: ops.routed_attention(
                        q, k, v, c, visual_mass=m
                    ),
                    inputs,
                ),
                "copy": setting.copy,
                **{name: candidate(call, inputs) for name, call in peers.items()},
            }
            comparison = compare(calls, setting.seconds)
            name = f"decode B={batch} L={keys}"
            for peer in peers:
                fastest = peer == comparison.fastest(*peers)
                most = 1.0 if batch == 1 and fastest else None
                yield row(name, peer, comparison, "plain", peer, most)
            extra = comparison.timing("ours").p50 - comparison.timing("plain").p50
            note = f"{extra * 1e6:+.2f} us a layer"
            entry = row(
                f"{name} with visual_mass", "without", comparison, "ours", "plain", None, note
            )
            if batch == 1:
                entry = replace(entry, goal="<= 1 us more", met=extra <= 1e-6)
            yield entry
            goal = 0.9 if batch > 1 else None
            yield share(f"{name} with visual_mass", setting, comparison, problem.cache_bytes, goal)


def reinjections(setting: Setting, console: Console) -> Iterator[Row]:
    """Four COPY re-injections: against none, real rows, and replicated queries with a merge."""
    for batch in (1, *setting.batches):
        keys = setting.lengths[0]
        plain, again = setting.problem(batch, keys), setting.problem(batch, keys, 4)
        inputs, visual = setting.inputs(plain), setting.visuals(again)
        longer = keys + 4 * setting.visual
        rows = setting.inputs(setting.problem(batch, longer))
        span = (0, setting.visual)
        same(ops.routed_attention(*inputs[0], visual), replicated(*inputs[0], visual, span))
        flash = next(iter(usable(sdpa_peers(setting.device), rows[0], console).items()))
        comparison = compare(
            {
                "none": candidate(ops.routed_attention, inputs),
                "ours": candidate(
                    lambda q, k, v, c=visual: ops.routed_attention(q, k, v, c), inputs
                ),
                "rows": candidate(ops.routed_attention, rows),
                "sdpa": candidate(flash[1], rows),
                "replicated": candidate(
                    lambda q, k, v, c=visual, s=span: replicated(q, k, v, c, s), inputs
                ),
            },
            setting.seconds,
        )
        name = f"decode B={batch} L={keys}, 4 x COPY of {setting.visual}"
        yield row(name, "no re-injection", comparison, "ours", "none", 1.1)
        yield row(
            name, f"{longer - keys} appended rows, our kernel", comparison, "ours", "rows", 1.0
        )
        yield row(name, f"appended rows, {flash[0]}", comparison, "ours", "sdpa")
        yield row(
            name, "queries turned, one pass each, LSE merge", comparison, "ours", "replicated"
        )


def replicated(
    query: Tensor, key: Tensor, value: Tensor, visual: VisualContext, span: tuple[int, int]
) -> Tensor:
    """COPY with today's parts: one attention for each sighting, merged by log-sum-exp."""
    outs, sums = [], []
    first, length = span
    for number in range(-1, visual.num_reinjections):
        turned, keys, values = query, key, value
        if number >= 0:
            shift = -visual.shift[:, number, None, None]
            turned = rotate(query, shift, visual.inv_freq).to(query.dtype)
            keys, values = (x[:, :, first : first + length] for x in (key, value))
        out, lse = ops.routed_attention(turned, keys, values, return_lse=True)
        outs.append(out.float())
        sums.append(lse)
    weight = torch.stack(sums).softmax(0)
    return (torch.stack(outs) * weight[..., None]).sum(0).to(query.dtype)


def append(setting: Setting, console: Console) -> Iterator[Row]:
    """append_visual_ against copying as such, and against gather, rotate and cat."""
    del console
    for batch in (1, *setting.batches):
        yield from _append(setting, batch)


def _append(setting: Setting, batch: int) -> Iterator[Row]:
    tokens, keys, shape = setting.visual, setting.lengths[0], setting.shape
    problem = setting.problem(batch, keys + tokens)
    inputs, visual = setting.inputs(problem), setting.visuals(problem)
    shift = torch.full((batch,), 5000, dtype=torch.int32, device=setting.device)
    start = torch.full((batch,), keys, dtype=torch.int32, device=setting.device)
    length = start.clone()

    def ours(_: Tensor, key: Tensor, value: Tensor) -> None:
        length.copy_(start)
        ops.append_visual_(
            key, value, length, visual.spans, shift, visual.inv_freq, check_room=False
        )

    def by_torch(_: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        seen = key[:, :, :tokens]
        turned = rotate(seen, shift[:, None, None], visual.inv_freq).to(key.dtype)
        new = (turned, value[:, :, :tokens])
        old = (x[:, :, :keys] for x in (key, value))
        return tuple(torch.cat(pair, 2) for pair in zip(old, new, strict=True))

    ours(*inputs[0])
    same(inputs[0][1], by_torch(*inputs[0])[0])
    comparison = compare(
        {
            "ours": candidate(ours, inputs),
            "torch": candidate(by_torch, inputs),
            "copy": setting.copy,
        },
        setting.seconds,
    )
    name = f"append_visual_ B={batch}, {tokens} tokens to {keys}"
    yield row(name, "gather + rotate + cat", comparison, "ours", "torch", 0.2)
    moved = 4 * batch * tokens * shape.key_heads * shape.head_dim * 2
    yield share(name, setting, comparison, moved, 0.85 if batch > 1 else None)


def limits(setting: Setting, console: Console) -> Iterator[Row]:
    """The device's own rates: copying, and a bf16 matrix product."""
    del console
    size = 8192 if setting.device.type == "cuda" else 128
    left, right = (torch.randn(size, size, dtype=BFLOAT16, device=setting.device) for _ in range(2))
    comparison = compare(
        {"copy": setting.copy, "product": candidate(torch.mm, [(left, right)])}, setting.seconds
    )
    copy, product = comparison.timing("copy").p50, comparison.timing("product").p50
    note = f"{setting.copy.bytes / copy / 1e9:.0f} GB/s read and written"
    yield Row("device copy", "itself", 1, 1, 1, copy * 1e3, "", None, note)
    note = f"{2 * size**3 / product / 1e12:.1f} TFLOP/s"
    yield Row(f"bf16 product {size}^3", "itself", 1, 1, 1, product * 1e3, "", None, note)


SUITES = {"limits": limits, "decode": decode, "reinjections": reinjections, "append": append}


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the suite.")] = "cuda",
    small: Annotated[bool, typer.Option(help="Tiny shapes: does every row run?")] = False,
    seconds: Annotated[float, typer.Option(help="For each comparison.")] = 2.0,
    suite: Annotated[list[str] | None, typer.Option(help="Names of suites; all if none.")] = None,
) -> None:
    """Measure every row and print the table."""
    console = Console(width=170)
    setting = Setting(device, small, seconds)
    where = describe(setting.device)
    rows = []
    for name in suite or SUITES:
        for entry in SUITES[name](setting, console):
            rows.append(entry)
            console.print(f"{entry.name} | {entry.against} | {entry.ratio:.3g}", highlight=False)
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
