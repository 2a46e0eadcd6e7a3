"""The CUDA kernels on an emulated GPU: compiled for the host, called with CPU tensors."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lookagain_ext.ops import _cuda

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("c++") or shutil.which("g++")
LAUNCHES = (
    "launch_routed_attention",
    "launch_visual_mass",
    "launch_many_queries",
    "join",
    "select_visual_tokens",
    "launch_append_visual_",
)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class HeadsView(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("batch_stride", "head_stride", "row_stride")
    ]


PAGED_CACHE = [
    ("block_table", ctypes.c_void_p),
    ("block_table_stride", ctypes.c_int64),
    ("block_size", ctypes.c_int64),
    ("num_blocks", ctypes.c_int64),
]


class VisualParams(ctypes.Structure):
    _fields_ = [
        ("spans", ctypes.c_void_p),
        ("num_spans", ctypes.c_int64),
        ("inv_freq", ctypes.c_void_p),
        ("half", ctypes.c_int64),
        ("shift", ctypes.c_void_p),
        ("start", ctypes.c_void_p),
        ("num_reinjections", ctypes.c_int64),
        ("selected", ctypes.c_void_p),
        ("selected_batch_stride", ctypes.c_int64),
        ("selected_stride", ctypes.c_int64),
        ("selected_width", ctypes.c_int64),
    ]


ATTENTION_SIZES = [
    *PAGED_CACHE,
    ("dtype", ctypes.c_int),
    *[
        (name, ctypes.c_int64)
        for name in ("batch", "query_heads", "key_heads", "queries", "keys", "head_dim")
    ],
    ("scale", ctypes.c_double),
    ("num_threads", ctypes.c_int),
    ("key_start", ctypes.c_void_p),
    ("key_length", ctypes.c_void_p),
]


class AttentionParams(ctypes.Structure):
    _fields_ = [
        *ATTENTION_SIZES,
        *[(name, HeadsView) for name in ("query", "key", "value", "out")],
        ("lse", ctypes.c_void_p),
        ("mass", ctypes.c_void_p),
        ("mass_batch_stride", ctypes.c_int64),
        ("mass_head_stride", ctypes.c_int64),
        ("mass_from", ctypes.c_void_p),
        ("visual", VisualParams),
    ]


class BackwardParams(ctypes.Structure):
    _fields_ = [
        *ATTENTION_SIZES,
        *[(name, HeadsView) for name in ("grad_out", "query", "key", "value", "out")],
        ("lse", ctypes.c_void_p),
        *[(name, HeadsView) for name in ("grad_query", "grad_key", "grad_value")],
        ("mass", ctypes.c_void_p),
        ("mass_batch_stride", ctypes.c_int64),
        ("mass_head_stride", ctypes.c_int64),
        ("num_visual", ctypes.c_int64),
        ("counted", ctypes.c_void_p),
        ("visual", VisualParams),
    ]


class MassParams(ctypes.Structure):
    _fields_ = [
        *ATTENTION_SIZES,
        ("query", HeadsView),
        ("key", HeadsView),
        ("lse", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("num_ranges", ctypes.c_int64),
        ("num_visual", ctypes.c_int64),
        ("mass", ctypes.c_void_p),
        ("visual", VisualParams),
    ]


class JoinParams(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        *[(name, ctypes.c_int64) for name in ("queries", "heads", "head_dim")],
        ("out", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("out_query_stride", "out_head_stride")],
        ("lse", ctypes.c_void_p),
        ("lse_stride", ctypes.c_int64),
        ("part", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("part_query_stride", "part_head_stride")],
        ("part_lse", ctypes.c_void_p),
        ("part_lse_stride", ctypes.c_int64),
    ]


class SelectParams(ctypes.Structure):
    _fields_ = [
        ("mass", ctypes.c_void_p),
        ("mass_stride", ctypes.c_int64),
        ("num_visual", ctypes.c_void_p),
        ("ratio", ctypes.c_double),
        ("batch", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
    ]


class AppendParams(ctypes.Structure):
    _fields_ = [
        *PAGED_CACHE,
        ("dtype", ctypes.c_int),
        ("batch", ctypes.c_int64),
        ("key_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("num_threads", ctypes.c_int),
        ("key", HeadsView),
        ("value", HeadsView),
        ("key_length", ctypes.c_void_p),
        ("spans", ctypes.c_void_p),
        ("num_spans", ctypes.c_int64),
        ("shift", ctypes.c_void_p),
        ("inv_freq", ctypes.c_void_p),
        ("half", ctypes.c_int64),
        ("selected", ctypes.c_void_p),
        ("selected_stride", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels compiled for the host: by one process for all, and again when they change."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    flags = os.environ.get("LOOKAGAIN_EMULATOR_FLAGS", "-O2").split()
    folder, source = ROOT / "csrc", ROOT / "python_tests" / "emulator"
    command = [COMPILER, "-std=c++17", *flags, "-shared", "-fPIC", "-I", str(folder)]
    command += ["-I", str(source), str(source / "emulated.cpp"), "-o"]
    made_of = hashlib.sha256(repr(command).encode())
    for file in sorted([*folder.rglob("*.*"), *source.iterdir()]):
        made_of.update(file.read_bytes())
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    built = build / f"emulated-{made_of.hexdigest()[:16]}.so"
    with open(build / "emulated.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            part = built.with_suffix(".part")
            run = subprocess.run([*command, str(part)], capture_output=True, text=True)
            assert run.returncode == 0, run.stderr[-4000:]
            for old in build.glob("emulated-*.so"):
                old.unlink()
            part.rename(built)
        loaded = ctypes.CDLL(str(built))
    sizes = (
        *(AttentionParams, VisualParams, SelectParams, AppendParams, MassParams),
        *(BackwardParams, JoinParams),
    )
    found = (ctypes.c_int64 * len(sizes))()
    loaded.emulated_sizes(found)
    assert list(found) == [ctypes.sizeof(kind) for kind in sizes], "params.h has changed"
    return loaded


def _call(name: str, *arguments: object) -> None:
    """A function of the library; RuntimeError with what it threw."""
    if getattr(library(), name)(*arguments):
        library().emulated_message.restype = ctypes.c_char_p
        raise RuntimeError(library().emulated_message().decode())


def device(seed: int = 1, multiprocessors: int = 4, shared: int = 227 << 10) -> None:
    """Sets up the emulated device; the seed shuffles the order in which threads run."""
    library().emulated_set(
        ctypes.c_uint64(seed), ctypes.c_int(multiprocessors), ctypes.c_int64(shared)
    )


def heads(tensor: Tensor) -> HeadsView:
    """A [B, H, L, D] tensor as the kernels see it."""
    return HeadsView(tensor.data_ptr(), *tensor.stride()[:3])


def pointer(tensor: Tensor | None) -> int | None:
    """Where a contiguous tensor lies."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def visual_params(
    spans: Tensor, inv_freq: Tensor, shift: Tensor, start: Tensor, selected: Tensor | None
) -> VisualParams:
    """The fields of a visual context as the kernels see them."""
    visual = VisualParams(
        spans=pointer(spans),
        num_spans=spans.shape[1],
        inv_freq=pointer(inv_freq),
        half=inv_freq.shape[0],
        shift=pointer(shift),
        start=pointer(start),
        num_reinjections=shift.shape[1],
    )
    if selected is not None:
        visual.selected = pointer(selected)
        visual.selected_batch_stride, visual.selected_stride = selected.stride()[:2]
        visual.selected_width = selected.shape[2]
    return visual


def attention_sizes(query: Tensor, key: Tensor, block_table: Tensor | None) -> dict[str, int]:
    """What every attention kernel is told of the shapes."""
    batch, query_heads, queries, size = query.shape
    slots = key.shape[2] * (1 if block_table is None else block_table.shape[1])
    return {
        "dtype": DTYPES[query.dtype],
        "batch": batch,
        "query_heads": query_heads,
        "key_heads": key.shape[1],
        "queries": queries,
        "keys": slots,
        "head_dim": size,
        "query": heads(query),
        "key": heads(key),
    }


def launch_routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor | None,
    mass: Tensor | None,
    mass_from: Tensor | None,
    key_start: Tensor | None,
    key_length: Tensor | None,
    spans: Tensor | None,
    inv_freq: Tensor | None,
    shift: Tensor | None,
    start: Tensor | None,
    selected: Tensor | None,
    block_table: Tensor | None,
    scale: float,
    plan: list[int] | None = None,
) -> None:
    """Stands in for the binding; `plan` gets how the work was cut."""
    params = AttentionParams(
        **attention_sizes(query, key, block_table),
        scale=scale,
        key_start=pointer(key_start),
        key_length=pointer(key_length),
        value=heads(value),
        out=heads(out),
        lse=pointer(lse),
        mass_from=pointer(mass_from),
    )
    page(params, block_table, key)
    width = 0
    if mass is not None and mass.shape[-1] > 0:
        width = mass.shape[-1]
        params.mass = mass.data_ptr()
        params.mass_batch_stride, params.mass_head_stride = mass.stride()[:2]
    if spans is not None:
        params.visual = visual_params(spans, inv_freq, shift, start, selected)
    if plan is not None:
        found = (ctypes.c_int32 * 6)()
        _call("emulated_plan", ctypes.byref(params), ctypes.c_int64(width), found)
        plan[:] = list(found)
    _call("emulated_routed_attention", ctypes.byref(params), ctypes.c_int64(width))


def launch_visual_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    rows: Tensor,
    mass: Tensor,
    key_start: Tensor | None,
    key_length: Tensor | None,
    spans: Tensor,
    inv_freq: Tensor,
    shift: Tensor,
    start: Tensor,
    selected: Tensor | None,
    block_table: Tensor | None,
    scale: float,
) -> None:
    """Stands in for the binding."""
    params = MassParams(
        **attention_sizes(query, key, block_table),
        scale=scale,
        key_start=pointer(key_start),
        key_length=pointer(key_length),
        lse=pointer(lse),
        rows=pointer(rows),
        num_ranges=rows.shape[1],
        num_visual=mass.shape[-1],
        mass=pointer(mass),
        visual=visual_params(spans, inv_freq, shift, start, selected),
    )
    page(params, block_table, key)
    _call("emulated_visual_mass", ctypes.byref(params))


def launch_many_queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    mass: Tensor | None,
    counted: Tensor | None,
    key_start: Tensor | None,
    key_length: Tensor | None,
    spans: Tensor | None,
    inv_freq: Tensor | None,
    shift: Tensor | None,
    start: Tensor | None,
    selected: Tensor | None,
    bounds: Tensor | None,
    longest: int,
    scale: float,
) -> None:
    """Stands in for the binding."""
    params = BackwardParams(
        **attention_sizes(query, key, None),
        scale=scale,
        key_start=pointer(key_start),
        key_length=pointer(key_length),
        value=heads(value),
        out=heads(out),
        lse=pointer(lse),
        counted=pointer(counted),
    )
    if gradients is not None:
        names = ("grad_out", "grad_query", "grad_key", "grad_value")
        for name, tensor in zip(names, gradients, strict=True):
            setattr(params, name, heads(tensor))
    if mass is not None and mass.shape[-1] > 0:
        params.mass, params.num_visual = mass.data_ptr(), mass.shape[-1]
        params.mass_batch_stride, params.mass_head_stride = mass.stride()[:2]
    if spans is not None:
        params.visual = visual_params(spans, inv_freq, shift, start, selected)
    _call(
        "emulated_many_queries",
        ctypes.byref(params),
        ctypes.c_void_p(pointer(bounds)),
        ctypes.c_int64(0 if bounds is None else len(bounds) - 1),
        ctypes.c_int64(longest),
        ctypes.c_void_p(pointer(lse)),
        ctypes.c_int(gradients is not None),
    )


def page(params: ctypes.Structure, block_table: Tensor | None, cache: Tensor) -> None:
    """Notes the block table of a paged cache."""
    if block_table is not None:
        params.block_table = pointer(block_table)
        params.block_table_stride = block_table.stride(0)
        params.block_size = cache.shape[2]
        params.num_blocks = cache.shape[0]


def join(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Stands in for the call of the kernel."""
    assert all(x.stride(-1) == 1 for x in (out, lse, part, part_lse))
    queries, number, size = out.shape
    params = JoinParams(
        dtype=DTYPES[out.dtype],
        queries=queries,
        heads=number,
        head_dim=size,
        out=out.data_ptr(),
        out_query_stride=out.stride(0),
        out_head_stride=out.stride(1),
        lse=lse.data_ptr(),
        lse_stride=lse.stride(0),
        part=part.data_ptr(),
        part_query_stride=part.stride(0),
        part_head_stride=part.stride(1),
        part_lse=part_lse.data_ptr(),
        part_lse_stride=part_lse.stride(0),
    )
    _call("emulated_join", ctypes.byref(params))


def select_visual_tokens(mass: Tensor, ratio: float, num_visual: Tensor, out: Tensor) -> None:
    """Stands in for the call of the kernel."""
    params = SelectParams(
        mass=mass.data_ptr(),
        mass_stride=mass.stride(0),
        num_visual=pointer(num_visual.contiguous()),
        ratio=ratio,
        batch=mass.shape[0],
        width=mass.shape[1],
        out=out.data_ptr(),
        out_stride=out.stride(0),
    )
    _call("emulated_select", ctypes.byref(params))


def launch_append_visual_(
    key_cache: Tensor,
    value_cache: Tensor,
    key_length: Tensor,
    spans: Tensor,
    shift: Tensor,
    inv_freq: Tensor,
    selected: Tensor | None,
    rows: Tensor | None,
    block_table: Tensor | None,
    failed: Tensor,
) -> None:
    """Stands in for the binding."""
    params = AppendParams(
        dtype=DTYPES[key_cache.dtype],
        batch=key_length.shape[0],
        key_heads=key_cache.shape[1],
        head_dim=key_cache.shape[3],
        key=heads(key_cache),
        value=heads(value_cache),
        spans=pointer(spans),
        num_spans=spans.shape[1],
        shift=pointer(shift),
        inv_freq=pointer(inv_freq),
        half=inv_freq.shape[0],
        rows=pointer(rows),
    )
    page(params, block_table, key_cache)
    width = 0
    if selected is not None:
        width = selected.shape[1]
        params.selected, params.selected_stride = selected.data_ptr(), selected.stride(0)
    slots = key_cache.shape[2] * (1 if block_table is None else block_table.shape[1])
    _call(
        "emulated_append",
        ctypes.byref(params),
        ctypes.c_int64(slots),
        ctypes.c_void_p(pointer(key_length)),
        ctypes.c_int64(width),
        ctypes.c_void_p(pointer(failed)),
    )


def install(patch: pytest.MonkeyPatch) -> None:
    """Makes the ops take CPU tensors to the emulated device."""
    device()
    for name in LAUNCHES:
        patch.setattr(_cuda, name, globals()[name])
    patch.setattr(_cuda, "on_gpu", lambda tensor: True)
