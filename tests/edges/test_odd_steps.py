"""Steps with odd operands and odd operators: the plain loop's gradients, or words; and nothing is left broken."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from longtape.errors import StepError
from longtape.torch import scan

SMALL: Any = {"memory": 1 << 15}
F64 = torch.float64
STEPS = 5

Made = tuple[Callable[[Any, Any], Any], list[torch.Tensor]]


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, requires_grad=True)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse and nested tensors are announced as prototypes
        yield


@pytest.fixture
def unharmed() -> Iterator[None]:
    """PyTorch's compiler and what is built on it work afterwards."""
    yield
    h = leaf(3)
    assert torch.allclose(torch.cond(h.sum() > 0, torch.sin, torch.sin, (h,)), h.sin())
    compiled = torch.compile(lambda a: torch.sin(a), backend="eager", fullgraph=True)
    assert torch.equal(compiled(h), h.sin())


# --- tensors that are no arrays ---------------------------------------------------------------


def coo() -> Made:
    matrix = torch.randn(4, 4, dtype=F64).to_sparse().requires_grad_()
    return (lambda h, _: (torch.tanh(torch.sparse.mm(matrix, h)), None)), [matrix]


def coo_without_gradient() -> Made:
    matrix = torch.randn(4, 4, dtype=F64).to_sparse()
    return (lambda h, _: (torch.tanh(matrix @ h), None)), []


def csr() -> Made:
    matrix = torch.randn(4, 4, dtype=F64).to_sparse_csr().requires_grad_()
    return (lambda h, _: (torch.tanh(matrix @ h), None)), [matrix]


def sparse_made_inside() -> Made:
    values, places = leaf(4), torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    return (lambda h, _: (torch.sparse.mm(torch.sparse_coo_tensor(places, values, (4, 4)), h).sin(), None)), [values]


def nested() -> Made:
    rows = torch.nested.nested_tensor([torch.randn(2, 3, dtype=F64), torch.randn(4, 3, dtype=F64)])
    return (lambda h, _: (torch.tanh(h + rows.to_padded_tensor(0.0).sum()), None)), []


def nested_made_inside() -> Made:
    weight = leaf(3)

    def step(h: Any, _: Any) -> Any:
        rows = torch.nested.as_nested_tensor([h[:2, :3] * weight, h[:, :3]], layout=torch.jagged)
        return torch.tanh(h + nn.functional.relu(rows).values().sum()), None

    return step, [weight]


class Tagged(torch.Tensor):
    """A subclass that only has a name."""


def subclass() -> Made:
    weight = torch.randn(4, dtype=F64).as_subclass(Tagged).requires_grad_()
    return (lambda h, _: (torch.sin(h * weight).as_subclass(torch.Tensor), None)), [weight]


# --- operators that take functions ------------------------------------------------------------


def cond() -> Made:
    a, b = leaf(4), leaf(4)

    def step(h: Any, _: Any) -> Any:
        return torch.cond(h.sum() > 0, lambda h: torch.sin(h) * a - 1, lambda h: torch.cos(h) * b, (h,)), None

    return step, [a, b]


def inner_while() -> Made:
    def step(h: Any, _: Any) -> Any:
        loop = torch._higher_order_ops.while_loop
        return loop(lambda i, h: i < 3, lambda i, h: (i + 1, torch.sin(h)), (torch.tensor(0), h.detach()))[1] * h, None

    return step, []


def inner_scan() -> Made:
    weight = leaf(4)

    def step(h: Any, _: Any) -> Any:
        xs = h.unsqueeze(0).expand(3, *h.shape).clone()
        return torch._higher_order_ops.scan(lambda c, x: (torch.sin(c * weight + x), c.clone()), h, xs)[0], None

    return step, [weight]


def associative() -> Made:
    def step(h: Any, _: Any) -> Any:
        return torch._higher_order_ops.associative_scan(torch.add, torch.sin(h), 0, combine_mode="generic") * 0.3, None

    return step, []


def inner_map() -> Made:
    weight = leaf(4)
    return (lambda h, _: (torch._higher_order_ops.map(lambda row: torch.sin(row * weight), h), None)), [weight]


def vmapped() -> Made:
    weight = leaf(4)
    return (lambda h, _: (torch.func.vmap(torch.func.grad(lambda r: (r * weight).sin().sum()))(h), None)), [weight]


def compiled_inside() -> Made:
    weight = leaf(4)
    inner = torch.compile(lambda h: torch.sin(h * weight), backend="aot_eager", fullgraph=True)
    return (lambda h, _: (inner(h), None)), [weight]


def checkpointed() -> Made:
    weight = leaf(4)
    return (lambda h, _: (checkpoint(lambda h: torch.sin(h * weight), h, use_reentrant=False), None)), [weight]


# --- the rest ---------------------------------------------------------------------------------


def seeded_inside() -> Made:
    weight = leaf(4)

    def step(h: Any, x: Any) -> Any:
        generator = torch.Generator().manual_seed(int(x[0, 0] * 1000))
        noise = torch.randn(4, 4, generator=generator, dtype=F64) + torch.rand(4, generator=generator, dtype=F64)
        return torch.sin(h * weight) + noise, None

    return step, [weight]


def reseeded() -> Made:
    weight, generator = leaf(4), torch.Generator()

    def step(h: Any, _: Any) -> Any:
        return torch.sin(h * weight) + torch.randn(4, generator=generator.manual_seed(7), dtype=F64), None

    return step, [weight]


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Any) -> Any:
        ctx.save_for_backward(a)
        return a.sin()

    @staticmethod
    def backward(ctx: Any, bar: Any) -> Any:
        return bar * ctx.saved_tensors[0].cos()


def custom_function() -> Made:
    weight = leaf(4)
    return (lambda h, _: (Sine.apply(h * weight), None)), [weight]


def linear_algebra() -> Made:
    matrix = leaf(4, 4)

    def step(h: Any, _: Any) -> Any:
        spectrum = torch.fft.fft2(h) * torch.linalg.svdvals(matrix)
        return torch.linalg.solve(matrix @ matrix.mT + torch.eye(4, dtype=F64), torch.fft.ifft2(spectrum).real), None

    return step, [matrix]


def parametrized() -> Made:
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, dtype=F64))
    return (lambda h, _: (torch.tanh(layer(h)), None)), list(layer.parameters())


def weight_norm_of_old() -> Made:
    layer = torch.nn.utils.weight_norm(nn.Linear(4, 4, dtype=F64))
    return (lambda h, _: (torch.tanh(layer(h)), None)), list(layer.parameters())


ODD = [
    coo, coo_without_gradient, csr, sparse_made_inside, nested, nested_made_inside, subclass, cond, inner_while,
    inner_scan, associative, inner_map, vmapped, compiled_inside, checkpointed, seeded_inside, reseeded,
    custom_function, linear_algebra, parametrized, weight_norm_of_old,
]  # fmt: skip


def gradients_of(loss: torch.Tensor, wanted: list[torch.Tensor]) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, wanted)
    return [bar if bar.layout is torch.strided else bar.to_dense() for bar in found]


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("make", ODD, ids=lambda make: make.__name__)
def test_an_odd_step_has_the_plain_loop_s_gradients(make: Callable[[], Made], capture: bool) -> None:
    step, closed = make()
    init, xs = leaf(4, 4), leaf(STEPS, 4, 4)
    carry = init
    for x in xs:
        carry, _ = step(carry, x)
    expected = gradients_of(carry.sum(), [init, *closed])
    ours, _ = scan(step, init, xs, capture=capture, **SMALL)
    assert torch.allclose(ours, carry)
    for a, b in zip(gradients_of(ours.sum(), [init, *closed]), expected, strict=True):
        assert torch.allclose(a, b)


@pytest.mark.usefixtures("unharmed")
def test_flex_attention_in_a_step() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    weight = leaf(4)

    def step(h: Any, _: Any) -> Any:
        query = h.detach().reshape(1, 1, 4, 4)
        return torch.tanh(h * weight + flex(query, query, query).reshape(4, 4)), None

    test_an_odd_step_has_the_plain_loop_s_gradients(lambda: (step, [weight]), False)


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("capture", [False, True])
def test_a_function_compiled_in_a_step_can_be_compiled_afterwards(capture: bool) -> None:
    graphs = []

    def backend(module: Any, _: Any) -> Any:
        graphs.append(module)
        return module.forward

    inner = torch.compile(torch.nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double(), backend=backend)
    carry, _ = scan(lambda h, _: (inner(h), None), leaf(3), length=4, capture=capture, **SMALL)
    carry.sum().backward()
    assert not graphs
    inner(leaf(2, 3))
    assert graphs


@pytest.mark.usefixtures("unharmed")
def test_a_compiled_function_meets_no_limit_in_a_step_that_closes_over_dependent_tensors() -> None:
    weight, graphs = leaf(3), []
    double = weight * 2

    def backend(module: Any, _: Any) -> Any:
        graphs.append(module)
        return module.forward

    inner = torch.compile(lambda h: torch.sin(h * double) * weight, backend=backend)
    carry, _ = scan(
        lambda h, _: (checkpoint(inner, h, use_reentrant=False), None), leaf(3), None, 20, capture=False, **SMALL
    )
    carry.sum().backward()
    assert not graphs
    inner(leaf(3))
    assert len(graphs) == 1


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("capture", [False, True])
def test_after_a_step_that_failed_in_an_operator_nothing_is_broken(capture: bool) -> None:
    def fails(h: Any) -> Any:
        raise ValueError("no")

    with pytest.raises(Exception, match="no"):
        scan(
            lambda h, _: (torch.cond(h.sum() > 9, fails, fails, (h,)), None), leaf(3), None, 4, capture=capture, **SMALL
        )


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("capture", [False, True])
def test_a_reentrant_checkpoint_is_refused_in_words(capture: bool) -> None:
    weight = leaf(3)

    def step(h: Any, _: Any) -> Any:
        return checkpoint(lambda h: torch.sin(h * weight), h, use_reentrant=True), None

    with pytest.raises(StepError, match="step 0 .*use_reentrant=False"):
        scan(step, leaf(3), length=4, capture=capture, **SMALL)


@pytest.mark.parametrize("capture", [False, True])
def test_a_checkpoint_around_a_scan(capture: bool) -> None:
    weight, init, xs = leaf(3), leaf(3), leaf(STEPS, 3)

    def run(init: Any, xs: Any) -> Any:
        return scan(lambda h, x: (torch.sin(h * weight + x), h), init, xs, capture=capture, **SMALL)

    results = []
    for around in (run, lambda *given: checkpoint(run, *given, use_reentrant=False)):
        carry, ys = around(init, xs)
        results.append(torch.autograd.grad(carry.sum() + (ys**2).sum(), [init, xs, weight]))
    assert all(map(torch.equal, *results))


def test_hooks_on_saved_tensors_do_not_see_the_tapes_of_the_steps() -> None:
    seen = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor)
        return tensor

    weight, init = leaf(3), leaf(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        carry, _ = scan(lambda h, _: (torch.sin(h * weight), None), init, length=50, **SMALL)
    assert len(seen) < 10
    carry.sum().backward()


@pytest.mark.parametrize("late", [0, 3])
def test_a_generator_that_was_seeded_before_the_scan_is_refused(late: int) -> None:
    """Also where only one step draws from it, once."""
    own = torch.Generator().manual_seed(1)

    def step(h: Any, k: Any) -> Any:
        return (h * torch.rand(2, generator=own, dtype=F64) if k == late else torch.sin(h)), None

    with pytest.raises(StepError, match="default generator"):
        carry, _ = scan(step, leaf(2), torch.arange(6), capture=False, **SMALL)
        carry.sum().backward()


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("what", ["dtype", "device", "deterministic"])
def test_defaults_are_those_of_the_call_whenever_a_step_runs(what: str, capture: bool) -> None:
    weight, init = leaf(3), leaf(3)

    class Numbers:
        def __len__(self) -> int:
            return 40

        def __getitem__(self, k: int) -> float:
            return 0.1 * k  # a tensor of the default dtype is made of it

    def step(h: Any, x: Any) -> Any:
        made = torch.full((3,), 0.1) / 3
        assert x.dtype == made.dtype
        return torch.sin(h * weight) * made.double() + x, made

    def change(back: bool) -> None:
        if what == "dtype":
            torch.set_default_dtype(torch.float32 if back else torch.float64)
        elif what == "device":
            torch.set_default_device(None if back else "meta")
        else:
            torch.use_deterministic_algorithms(not back, warn_only=True)

    if what == "dtype":
        change(False)
    try:
        results = []
        for interferes in (False, True):
            carry, _ = scan(step, init, Numbers(), memory=600, capture=capture)
            if interferes:
                change(what == "dtype")
            results.append(torch.autograd.grad(carry.sum(), [init, weight]))
            if interferes:
                change(what != "dtype")
                assert torch.get_default_dtype() is (torch.float64 if what == "dtype" else torch.float32)
        assert all(map(torch.equal, *results))
    finally:
        change(True)
