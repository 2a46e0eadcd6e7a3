"""Forward-mode differentiation, torch.func and meta tensors: right, or refused by name."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from torch.autograd import forward_ad
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

from lookagain_ext import RoutedAttention, VisualContext, ops, reference

PROBLEM = Case(
    queries=5, keys=12, size=16, spans=1, again=1, select=True, dtype=torch.float64, poison=False
).make()
QUERY, KEY, VALUE, VISUAL = PROBLEM[:4]
LIMITS = PROBLEM.kwargs()
TANGENT = torch.randn(QUERY.shape, generator=torch.Generator().manual_seed(0)).double()


def of_query(query, op=ops.routed_attention, **kwargs):
    return op(query, KEY, VALUE, VISUAL, **LIMITS, **kwargs)


def specified(query):
    return of_query(query, reference.routed_attention)


def tangent(op):
    """Of a dual tensor, outside torch.func."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(op(forward_ad.make_dual(QUERY, TANGENT))).tangent


def difference():
    step = 1e-6 * TANGENT
    return (specified(QUERY + step) - specified(QUERY - step)) / 2e-6


@pytest.mark.parametrize("call", [tangent, lambda op: jvp(op, (QUERY,), (TANGENT,))[1]])
def test_tangents(call) -> None:
    found = call(of_query)
    assert found.abs().max() > 1e-2
    torch.testing.assert_close(found, difference(), rtol=1e-6, atol=1e-8)


def test_a_dual_key_alone() -> None:
    direction = torch.ones_like(KEY)
    with forward_ad.dual_level():
        key = forward_ad.make_dual(KEY, direction)
        out = ops.routed_attention(QUERY, key, VALUE, VISUAL, **LIMITS)
        found = forward_ad.unpack_dual(out).tangent
        plain = of_query(QUERY)
        assert forward_ad.unpack_dual(plain).tangent is None
    ends = [
        reference.routed_attention(QUERY, KEY + step * direction, VALUE, VISUAL, **LIMITS)
        for step in (1e-6, -1e-6)
    ]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(plain, specified(QUERY))


def test_vmap() -> None:
    queries = torch.stack([QUERY, QUERY.roll(1, 0), -QUERY])
    expected = torch.stack([specified(query) for query in queries])
    torch.testing.assert_close(vmap(of_query)(queries), expected)
    lengths = torch.stack([LIMITS["key_length"], LIMITS["key_length"] - 1])
    begin = LIMITS["key_start"]
    found = vmap(
        lambda n: ops.routed_attention(QUERY, KEY, VALUE, VISUAL, key_start=begin, key_length=n)
    )(lengths)
    for one, length in zip(found, lengths, strict=True):
        kwargs = {"key_start": begin, "key_length": length}
        exact = ops.routed_attention(QUERY, KEY, VALUE, VISUAL, **kwargs)
        torch.testing.assert_close(one, exact)


def test_vmap_of_the_other_ops() -> None:
    queries = torch.stack([QUERY, -QUERY])
    rows = torch.tensor([[[7, 12]]] * 2, dtype=torch.int32)
    found = vmap(lambda query: ops.visual_mass(query, KEY, VISUAL, rows, **LIMITS))(queries)
    count = VISUAL.num_visual()
    for one, query in zip(found, queries, strict=True):
        torch.testing.assert_close(one, ops.visual_mass(query, KEY, VISUAL, rows, **LIMITS))
    chosen = vmap(lambda mass: ops.select_visual_tokens(mass, 0.5, count))(found[:, :, 0])
    for one, mass in zip(chosen, found[:, :, 0], strict=True):
        assert torch.equal(one, ops.select_visual_tokens(mass, 0.5, count))


def test_func_differentiates() -> None:
    def loss(op):
        return lambda query: op(query)[0, 0].square().sum()

    for transform in (torch.func.grad, jacrev, jacfwd):
        torch.testing.assert_close(
            transform(loss(of_query))(QUERY), transform(loss(specified))(QUERY)
        )
    small = (QUERY[:1, :2, :1], KEY[:1, :1], VALUE[:1, :1])
    twice = hessian(lambda query: ops.routed_attention(query, *small[1:]).square().sum())
    exact = hessian(lambda query: reference.routed_attention(query, *small[1:]).square().sum())
    torch.testing.assert_close(twice(small[0]), exact(small[0]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_tangents_under_compile_are_not_lost(backend) -> None:
    torch.compiler.reset()
    compiled = torch.compile(of_query, backend=backend)
    torch.testing.assert_close(compiled(QUERY), of_query(QUERY))
    with pytest.raises(Exception, match="no forward-mode derivative under torch.compile"):
        tangent(compiled)
    torch.compiler.reset()
    inside = torch.compile(lambda: jvp(of_query, (QUERY,), (TANGENT,))[1], backend=backend)
    try:  # torch may run it uncompiled
        found = inside()
    except NotImplementedError as error:
        assert "no forward-mode derivative under torch.compile" in str(error)
    else:
        torch.testing.assert_close(found, difference(), rtol=1e-6, atol=1e-8)
    torch.compiler.reset()


def test_a_batch_of_gradients() -> None:
    query = QUERY.clone().requires_grad_()
    out = of_query(query)[0, 0].flatten()[:3]
    eye = torch.eye(3, dtype=torch.float64)
    (found,) = vmap(lambda one: torch.autograd.grad(out, query, one, retain_graph=True))(eye)
    for one, direction in zip(found, eye, strict=True):
        (exact,) = torch.autograd.grad(out, query, direction, retain_graph=True)
        torch.testing.assert_close(one, exact)
    wanted = "no batch of gradients from is_grads_batched or vectorize=True: use torch.func.jacrev"
    with pytest.raises(NotImplementedError, match=wanted):
        torch.autograd.grad(out, query, eye, is_grads_batched=True)


def test_the_tangent_of_a_gradient_from_outside() -> None:
    """The forward knew of no tangent: only what comes back to its backward has one."""
    query = QUERY.clone().requires_grad_()
    out = of_query(query)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(out), TANGENT)
        (grad,) = torch.autograd.grad(out, query, upstream, retain_graph=True)
        found = forward_ad.unpack_dual(grad).tangent
    (exact,) = torch.autograd.grad(out, query, TANGENT)
    torch.testing.assert_close(found, exact)


def test_what_adds_in_the_backward_is_refused() -> None:
    query, mass = QUERY.clone().requires_grad_(), torch.zeros(2, 2, PROBLEM.max_visual)
    out = of_query(query, visual_mass=mass, mass_in_backward=True)
    batch = torch.stack([out.detach(), -out.detach()])
    with pytest.raises(NotImplementedError, match="with mass_in_backward works under neither"):
        vmap(lambda one: torch.autograd.grad(out, query, one))(batch)
    with pytest.raises(NotImplementedError, match="with mass_in_backward works under neither"):
        jvp(
            lambda query: of_query(query, visual_mass=mass, mass_in_backward=True),
            (QUERY,),
            (TANGENT,),
        )


def test_what_writes_to_a_cache_is_refused() -> None:
    length = torch.tensor([8, 8], dtype=torch.int32)
    shift = torch.tensor([3, 3], dtype=torch.int32)

    def append(key):
        ops.append_visual_(key, VALUE.clone(), length, VISUAL.spans, shift, VISUAL.inv_freq)
        return key

    with pytest.raises(NotImplementedError, match="append_visual_ works under neither"):
        vmap(append)(KEY.expand(3, -1, -1, -1, -1).clone())
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="append_visual_ works under neither"),
    ):
        append(forward_ad.make_dual(KEY.clone(), torch.ones_like(KEY)))


def test_a_module_has_tangents() -> None:
    torch.manual_seed(0)
    module = RoutedAttention(64, 4, 2, dtype=torch.float64).requires_grad_(False)
    hidden, direction = torch.randn(2, 1, 5, 64, dtype=torch.float64)
    with forward_ad.dual_level():
        out, _ = module(forward_ad.make_dual(hidden, direction))
        found = forward_ad.unpack_dual(out).tangent
    ends = [module(hidden + step * direction)[0] for step in (1e-6, -1e-6)]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("counting", [{}, {"mass_in_backward": True}])
def test_meta_tensors_have_the_shapes_of_real_ones(counting) -> None:
    heads = [x.detach().to("meta").requires_grad_() for x in (QUERY, KEY, VALUE)]
    visual, mass = VISUAL.to("meta"), torch.zeros(2, 2, PROBLEM.max_visual, device="meta")
    limits = {name: limit.to("meta") for name, limit in LIMITS.items()}
    out, lse = ops.routed_attention(
        *heads, visual, visual_mass=mass, return_lse=True, **limits, **counting
    )
    exact, exact_lse = of_query(QUERY, return_lse=True)
    assert (out.shape, out.dtype, out.device) == (exact.shape, exact.dtype, mass.device)
    assert (lse.shape, lse.dtype, lse.device) == (exact_lse.shape, exact_lse.dtype, mass.device)
    grads = torch.autograd.grad(out.sum(), heads)
    assert [grad.shape for grad in grads] == [head.shape for head in heads]


def test_meta_tensors_in_the_other_ops() -> None:
    query, key, visual = QUERY.to("meta"), KEY.to("meta"), VISUAL.to("meta")
    rows = torch.zeros(2, 3, 2, dtype=torch.int32, device="meta")
    found = ops.visual_mass(query, key, visual, rows)
    assert (found.shape, found.dtype) == ((2, 3, 2, PROBLEM.max_visual), torch.float32)
    plain = VisualContext.from_spans(visual.spans, visual.inv_freq)
    with pytest.raises(ValueError, match=r"visual.selected is needed on the meta device"):
        ops.visual_mass(query, key, plain, rows)
    length, shift = (torch.zeros(2, dtype=torch.int32, device="meta") for _ in range(2))
    ops.append_visual_(key, key.clone(), length, visual.spans, shift, visual.inv_freq)
    with torch.device("meta"):
        module = RoutedAttention(64, 4, 2)
        hidden = torch.randn(2, 5, 64)
    context = VisualContext.from_spans(visual.spans, module.inv_freq)
    context = context.reinject(torch.ones(2, dtype=torch.bool, device="meta"), 6, 4)
    assert module(hidden, visual_context=context)[0].shape == (2, 5, 64)
