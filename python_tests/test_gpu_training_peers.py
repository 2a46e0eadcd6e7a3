"""What the training attention is compared with computes the same, as far as a CPU can tell."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from lookagain_ext import VisualContext, ops

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks").is_dir(), reason="the benchmarks lie in the repository only"
)
if (ROOT / "benchmarks").is_dir():
    sys.path.insert(0, str(ROOT))
    from benchmarks import gpu_training, gpu_training_peers
    from benchmarks.gpu_training_peers import FlexAttention, LeftOut, Peer
    from benchmarks.gpu_training_problems import Setting, Shape


@pytest.fixture(autouse=True)
def as_before():
    """The setting of torch's that FlexAttention's timing changes is the process's."""
    with torch._functorch.config.patch(donated_buffer=True):
        yield


@pytest.fixture
def flex_backward(monkeypatch):
    """FlexAttention has a backward for a CPU, in plain operations, but refuses to run it."""
    module = importlib.import_module("torch.nn.attention.flex_attention")
    monkeypatch.setattr(module, "_validate_device", lambda *_: None)


def problem(shape: Shape, dtype=torch.float32):
    """Query, key, value, upstream gradient, and the re-injections or None."""
    setting = Setting("cpu", True, 0.02)
    torch.manual_seed(shape.length)
    tensors = [x.detach().to(dtype) for x in setting.tensors(shape.length, shape.batch)]
    return tensors, setting.visual(shape)


def with_gradients(call, tensors):
    *inputs, upstream = tensors
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = call(*inputs)
    first = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
    again = torch.autograd.grad(out, inputs, upstream, retain_graph=True)  # as it is timed
    for found, expected in zip(again, first, strict=True):
        torch.testing.assert_close(found, expected)
    return out, *first


@pytest.mark.usefixtures("flex_backward")
@pytest.mark.parametrize(
    "shape",
    [
        Shape(200),
        Shape(300, 2, 40, batch=2),
        Shape(260, 8, 24),
    ],
    ids=str,
)
def test_flex_attention_gives_our_numbers(shape):
    tensors, visual = problem(shape)
    peer = FlexAttention(100, on_gpu=False)(shape, visual, torch.device("cpu"))
    assert peer.same_work
    ours = with_gradients(gpu_training.ours(visual), tensors)
    theirs = with_gradients(peer.call, tensors)
    for found, expected in zip(theirs, ours, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if shape.again:
        plain = with_gradients(gpu_training.ours(None), tensors)
        assert (theirs[0] - plain[0]).norm() > 0.01 * plain[0].norm()


def test_flex_attention_compiled_for_a_cpu():
    """Its kernels for a CPU have no backward; the forward is that which is compiled for a GPU."""
    shape = Shape(256, 2, 32)
    tensors, visual = problem(shape)
    flex = FlexAttention(100, on_gpu=False)
    flex.backend = "inductor"
    peer = flex(shape, visual, torch.device("cpu"))
    with torch.no_grad():
        try:
            found = peer.call(*tensors[:3])
        except torch._inductor.exc.InductorError as error:
            pytest.skip(f"no compiler here: {str(error)[:80]}")
        expected = ops.routed_attention(*tensors[:3], visual)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_mask_is_as_sparse_as_the_work():
    """Blocks that no query sees are skipped: otherwise the comparison would flatter us."""
    from torch.nn.attention import flex_attention as module

    made = []
    create = module.create_block_mask

    def keep(*arguments):
        made.append(create(*arguments))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "create_block_mask", keep)
        shape = Shape(4096, 2, 512)
        FlexAttention(100, on_gpu=False)(shape, problem(shape)[1], torch.device("cpu"))
    (mask,) = made
    blocks = mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()
    assert int(blocks) * 128**2 == pytest.approx(shape.pairs, rel=0.05)


def test_time_for_compiling_runs_out():
    flex = FlexAttention(0.0, on_gpu=False)
    with pytest.raises(LeftOut, match="time for compiling"):
        flex(Shape(64), None, torch.device("cpu"))
    flex.seconds = 5.0
    with flex.paying("flash-attn"):
        pass
    assert flex.seconds == 5.0
    with pytest.raises(KeyError), flex.paying("FlexAttention, copies appended"):
        time.sleep(0.01)
        raise KeyError
    assert flex.seconds < 4.995
    flex.seconds = -1.0
    with pytest.raises(LeftOut, match="time for compiling"):
        flex(Shape(64), None, torch.device("cpu"))


def fake_flash_attention(monkeypatch, name, answer):
    module = ModuleType(name)
    module.flash_attn_func = answer
    monkeypatch.setitem(sys.modules, name, module)


def causal(query, key, value, causal):
    assert causal
    turned = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*turned, is_causal=True, enable_gqa=True).transpose(1, 2)


def rows_of(shapes):
    setting = Setting("cpu", True, 0.0, compile_seconds=100)
    setting.shapes = shapes
    return list(gpu_training.attention(setting, Console()))


@pytest.mark.usefixtures("flex_backward")
def test_rows_of_every_peer(monkeypatch):
    """Version 3 gives the log-sum-exp too; a peer that computes something else is not timed."""
    fake_flash_attention(monkeypatch, "flash_attn", causal)
    three = lambda *states, causal: (globals()["causal"](*states, causal=causal), None)  # noqa: E731
    fake_flash_attention(monkeypatch, "flash_attn_interface", three)
    rows = rows_of((Shape(160), Shape(160, 2, 32), Shape(128, flex=False)))
    found = [(row.name, row.against) for row in rows]
    same = Shape(160, 2, 32).same_flop
    assert [against for name, against in found if name == "backward L=160, 2 x 32 tokens"] == [
        f"SDPA math, L={same}",
        f"flash-attn, L={same}",
        f"flash-attn 3, L={same}",
        "FlexAttention, copies appended, L=160",
        "own kernels",
    ]
    assert [against for name, against in found if name == "forward L=128"] == [
        "SDPA math, L=128",
        "flash-attn, L=128",
        "flash-attn 3, L=128",
        "own kernels",
    ]
    assert all(row.note == "not measured: needs a GPU" for row in rows if row.ratio is None)
    rows = [row for row in rows if row.against != "own kernels"]
    assert all(row.ratio > 0 for row in rows)
    assert all((row.goal != "") == row.against.startswith("SDPA") for row in rows)


def test_a_peer_that_fails_is_named_in_its_row(monkeypatch):
    def broken(*_, causal):
        raise ValueError(f"no kernel for this device, causal={causal}\nmore words")

    fake_flash_attention(monkeypatch, "flash_attn", broken)
    fake_flash_attention(monkeypatch, "flash_attn_interface", lambda query, *_, causal: query)
    rows = rows_of((Shape(128),))
    notes = {row.against: row.note for row in rows if row.name == "forward L=128"}
    assert notes["flash-attn"] == (
        "not measured: ValueError: no kernel for this device, causal=True"
    )
    assert "not measured: " in notes["flash-attn 3"]
    assert "FlexAttention does not support backward on CPU" in notes["FlexAttention"]
    assert [row.ratio is None for row in rows if row.name == "forward L=128"] == [False] + [
        True
    ] * 4


def test_another_version_of_torchs_own(monkeypatch):
    """Its rows say so, torch's own is there again afterwards, and one that fails has its row."""
    attention = importlib.import_module("torch.nn.attention")
    active = []

    def activate(version):
        if version == "FA4":
            raise ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn")
        active.append(version)

    monkeypatch.setattr(attention, "activate_flash_attention_impl", activate, raising=False)
    monkeypatch.setattr(attention, "restore_flash_attention_impl", active.pop, raising=False)
    measured = gpu_training.attention

    def seen(setting, console):
        assert active == ["FA3"] and not any(shape.flex for shape in setting.shapes)
        yield from measured(setting, console)

    monkeypatch.setattr(gpu_training, "attention", seen)
    setting = Setting("cpu", True, 0.0)
    setting.shapes = (Shape(64), Shape(96, 1, 16))
    rows = list(gpu_training.versions(setting, Console()))
    assert [row.name for row in rows] == [
        "forward L=64, through FA3",
        "backward L=64, through FA3",
        "forward L=96, 1 x 16 tokens, through FA3",
        "backward L=96, 1 x 16 tokens, through FA3",
        "attention",
    ]
    assert all(row.ratio > 0 for row in rows[:4]) and not active
    assert setting.shapes == (Shape(64), Shape(96, 1, 16))
    assert (rows[4].against, rows[4].note) == (
        "through FA4",
        "not measured: flash_attn is not installed",
    )
    monkeypatch.delattr(attention, "activate_flash_attention_impl")
    with pytest.raises(LeftOut, match="its own FlashAttention only"), gpu_training.through("FA3"):
        pass


def test_what_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(LeftOut, match="flash_attn is not installed"):
        gpu_training_peers.flash_attention("flash_attn")


def test_copies_are_turned():
    shape = Shape(192, 2, 32)
    (_, key, value, _), visual = problem(shape)
    keys, values = gpu_training_peers.appended(key, value, visual)
    assert keys.shape[2] == values.shape[2] == 192 + 2 * 32
    assert torch.equal(keys[:, :, :192], key) and torch.equal(values[:, :, :192], value)
    assert torch.equal(values[:, :, 192:224], value[:, :, 8:40])
    still = VisualContext.from_spans(visual.spans, visual.inv_freq * 0)
    for start in shape.starts:
        still = still.reinject(torch.tensor([True]), start - 8, start)
    assert torch.equal(
        gpu_training_peers.appended(key, value, still)[0][:, :, 224:], key[:, :, 8:40]
    )
    assert not torch.equal(keys[:, :, 192:224], keys[:, :, 224:])
    assert isinstance(Peer(lambda *_: keys), Peer)
