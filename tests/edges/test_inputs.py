"""What xs, length and the first carry may be, and what a step may return."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from longtape.errors import StepError, UsageError
from longtape.torch import scan, while_loop

SMALL: Any = {"memory": 4096}


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def add(h: Any, x: Any) -> Any:
    return h + sum(torch.utils._pytree.tree_leaves(x)), h


# --- lists ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [leaf, lambda n: {"a": leaf(n)}, lambda n: (leaf(n), leaf(n))])
@pytest.mark.parametrize("length", [None, 20])
def test_a_list_of_items_is_not_taken_for_a_pytree(make: Any, length: int | None) -> None:
    with pytest.raises(UsageError, match=r"torch\.stack.*tuple"):
        scan(add, leaf(3), [make(3) for _ in range(20)], length, **SMALL)


def test_a_list_of_scalars_is_refused() -> None:
    with pytest.raises(UsageError, match="steps"):
        scan(add, leaf(3), [torch.tensor(0.5)] * 4, **SMALL)


class Pair(NamedTuple):
    a: Any
    b: Any


@pytest.mark.parametrize("make", [tuple, lambda two: dict(zip("ab", two, strict=True)), lambda two: Pair(*two)])
def test_other_containers_are_pytrees(make: Any) -> None:
    a, b = leaf(4, 3), leaf(4, 3)
    carry, _ = scan(add, torch.zeros(3, dtype=torch.float64), make([a, b]), **SMALL)
    assert torch.allclose(carry, (a + b).sum(0))


def test_a_list_is_a_pytree_where_length_says_so() -> None:
    a, b = leaf(4, 3), leaf(4, 3)
    carry, _ = scan(add, torch.zeros(3, dtype=torch.float64), [a, b], 4, **SMALL)
    assert torch.allclose(carry, (a + b).sum(0))


def test_a_list_of_arrays_is_a_pytree_in_jax() -> None:
    pytest.importorskip("jax")
    import jax.numpy as jnp

    from longtape.jax import scan as jax_scan

    carry, _ = jax_scan(
        lambda h, x: (h + x[0] * x[1], h), jnp.zeros(3), [jnp.ones((4, 3)), 2 * jnp.ones((4, 3))], **SMALL
    )
    assert np.allclose(carry, 8.0)


# --- no steps ---------------------------------------------------------------------------------


def test_no_steps_give_the_carry_back_and_empty_ys() -> None:
    weight, runs = leaf(3), []

    def step(h: Any, x: Any) -> Any:
        runs.append(h)
        return torch.sin(h * weight + x["a"]), {"y": h[:2].float() + torch.rand(2), "none": None}

    init = leaf(3)
    random = torch.get_rng_state()
    carry, ys = scan(step, init, {"a": torch.zeros(0, 3, dtype=torch.float64)}, **SMALL)
    assert torch.equal(carry, init)
    assert ys["none"] is None
    assert ys["y"].shape == (0, 2)
    assert ys["y"].dtype == torch.float32
    assert torch.equal(random, torch.get_rng_state())
    assert all(isinstance(h, torch._subclasses.FakeTensor) for h in runs)
    (gradient,) = torch.autograd.grad(carry.sum(), [init])
    assert torch.equal(gradient, torch.ones_like(init))
    with torch.no_grad():
        carry.zero_()
    assert init.any()


@pytest.mark.parametrize("capture", [None, True, False])
def test_a_length_of_zero(capture: bool | None) -> None:
    carry, ys = scan(lambda h, _: (h, h.sum()), leaf(3), length=0, capture=capture, **SMALL)
    assert carry.shape == (3,)
    assert ys.shape == (0,)


def test_no_steps_whose_y_nobody_can_know() -> None:
    carry, ys = scan(lambda h, _: (h, h if h.sum() > 0 else None), leaf(3), length=0, **SMALL)
    assert carry.shape == (3,)
    assert ys is None
    assert scan(add, leaf(3), np.zeros((0, 3)), **SMALL)[1] is None


def test_no_steps_of_a_step_that_updates_its_carry_and_a_buffer_in_place() -> None:
    buffer, init = torch.zeros(3), torch.ones(3)

    def step(h: Any, _: Any) -> Any:
        buffer.add_(1)
        return h.add_(1), h

    carry, ys = scan(step, init, length=0, **SMALL)
    assert torch.equal(carry, torch.ones(3))
    assert not buffer.any()
    assert ys.shape == (0, 3)


def test_fewer_than_no_steps() -> None:
    with pytest.raises(UsageError, match="length=-1"):
        scan(add, leaf(3), length=-1, **SMALL)


# --- layouts ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("make", [lambda t: t.to_sparse(), lambda t: t.to_sparse_csr()])
def test_a_carry_xs_or_y_that_is_no_array_is_refused_in_words(make: Any) -> None:
    dense = torch.eye(3)
    with pytest.raises(UsageError, match="init leaf 0.*dense"):
        scan(lambda h, _: (h, None), make(dense), length=3, **SMALL)
    with pytest.raises(UsageError, match="xs.*dense"):
        scan(lambda h, _: (h, None), leaf(3), make(dense), **SMALL)
    with pytest.raises(StepError, match=r"in y .*dense"):
        scan(lambda h, _: (h, make(dense)), leaf(3), length=3, **SMALL)
    with pytest.raises(StepError, match=r"carry leaf 0 .*dense"):
        scan(lambda h, _: (make(h.detach()), None), leaf(3, 3), length=3, **SMALL)


class Tagged(torch.Tensor):
    """A subclass, which bytes do not tell from a plain tensor."""


@pytest.mark.parametrize("capture", [False, True])
def test_a_carry_of_a_subclass_is_refused(capture: bool) -> None:
    with pytest.raises(UsageError, match=r"init leaf 0 is a Tagged.*as_subclass"):
        scan(lambda h, _: (h * 2, None), torch.ones(3).as_subclass(Tagged), length=3, capture=capture, **SMALL)
    with pytest.raises(StepError, match=r"step 0 .*carry leaf 0 a Tagged.*as_subclass"):
        scan(lambda h, _: (h.as_subclass(Tagged), None), leaf(3), length=3, capture=capture, **SMALL)


def test_xs_may_be_a_dataset() -> None:
    rows = torch.randn(6, 3, dtype=torch.float64)
    dataset = torch.utils.data.TensorDataset(rows, 2 * rows)
    carry, _ = scan(lambda h, x: (torch.sin(h) + x[0] * x[1], None), leaf(3), dataset, **SMALL)
    assert carry.requires_grad
    with pytest.raises(UsageError, match=r"indexing; it holds a DataLoader"):
        scan(add, leaf(3), torch.utils.data.DataLoader(dataset), **SMALL)


def expanded() -> torch.Tensor:
    return torch.randn(3, dtype=torch.float64).expand(4, 3).detach().requires_grad_()


def transposed() -> torch.Tensor:
    return torch.randn(3, 4, dtype=torch.float64).t().detach().requires_grad_()


def every_other() -> torch.Tensor:
    return torch.randn(8, 3, dtype=torch.float64)[::2].detach().requires_grad_()


@pytest.mark.parametrize("make", [expanded, transposed, every_other])
@pytest.mark.parametrize("capture", [False, True])
def test_a_carry_may_lie_in_memory_in_any_way(make: Any, capture: bool) -> None:
    weight = leaf(4, 3)

    def step(h: Any, _: Any) -> Any:
        return (torch.sin(h) * weight)[:1].expand(4, 3) + h, None

    init = make()
    carry, _ = scan(step, init, length=6, capture=capture, **SMALL)
    h = init
    for _ in range(6):
        h, _ = step(h, None)
    assert torch.equal(carry, h)
    ours, theirs = (torch.autograd.grad(end.sum(), [init, weight]) for end in (carry, h))
    assert all(map(torch.allclose, ours, theirs))


@pytest.mark.parametrize("capture", [False, True])
def test_parameters_and_integers_as_the_first_carry(capture: bool) -> None:
    init = torch.nn.Parameter(torch.randn(3, dtype=torch.float64)), torch.arange(3)

    def step(carry: Any, _: Any) -> Any:
        h, k = carry
        return (torch.sin(h) * k, k + 1), h

    (h, k), _ = scan(step, init, length=5, capture=capture, **SMALL)
    plain = init
    for _ in range(5):
        plain, _ = step(plain, None)
    assert torch.equal(k, torch.arange(5, 8))
    ours, theirs = (torch.autograd.grad(end.sum(), [init[0]])[0] for end in (h, plain[0]))
    assert torch.allclose(ours, theirs)


# --- what a step returns ----------------------------------------------------------------------


async def awaits(h: Any, _: Any) -> Any:
    return h, None


def yields(h: Any, _: Any) -> Any:
    yield h, None


RETURNS = {
    "list": (lambda h, _: [h, None], "list of 2; return a tuple"),
    "tensor": (lambda h, _: torch.stack([h, h]), r"return \(carry, None\)"),
    "three": (lambda h, _: (h, None, None), "tuple of 3"),
    "async": (awaits, "coroutine"),
    "yield": (yields, "generator; use return"),
    "float": (lambda h, _: (h, 1.0), "as_tensor"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("returns", RETURNS)
@pytest.mark.parametrize("capture", [False, True])
def test_what_a_step_returns_is_named(returns: str, capture: bool) -> None:
    step, message = RETURNS[returns]
    with pytest.raises(StepError, match=message):
        scan(step, leaf(3), length=5, capture=capture, **SMALL)


@pytest.mark.parametrize("capture", [False, True])
def test_a_carry_leaf_that_is_none_before_or_after(capture: bool) -> None:
    with pytest.raises(StepError, match=r"step 0 returned a Tensor as carry\['b'\], which was None.*zeros"):
        scan(
            lambda c, _: ({"a": c["a"] * 2, "b": c["a"]}, None),
            {"a": leaf(3), "b": None},
            length=5,
            capture=capture,
            **SMALL,
        )
    with pytest.raises(StepError, match=r"step 0 returned None as carry\['b'\]\[0\], which was a tensor"):
        scan(
            lambda c, _: ({"a": c["a"] * 2, "b": (None,)}, None),
            {"a": leaf(3), "b": (leaf(3),)},
            length=5,
            capture=capture,
            **SMALL,
        )
    with pytest.raises(StepError, match=r"returned a Tensor as carry\[1\], which was None"):
        while_loop(lambda c: c[0].sum() < 100, lambda c: (c[0] + 1, c[0]), (leaf(3), None), max_steps=5, **SMALL)
