"""PyTorch's transformations around a loop: each gives the plain loop's derivative, or is refused in words."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn
from torch.autograd import forward_ad, functional
from torch.utils.checkpoint import checkpoint

import longtape
from longtape import StateError, UsageError
from longtape.torch import scan, while_loop

F64 = torch.float64
STEPS = 5
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No progress bars of PyTorch's own, which would start a thread."""
    with contextlib.suppress(ImportError):
        monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)


def step_of(weight: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def step(carry: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        carry = torch.tanh(weight @ carry + x)
        return carry, carry.sin()

    return step


def plain_loss(weight: Tensor, carry: Tensor, xs: Tensor) -> Tensor:
    ys = []
    for x in xs:
        carry, y = step_of(weight)(carry, x)
        ys.append(y)
    return carry.sum() + torch.stack(ys).pow(2).sum()


def eager_loss(weight: Tensor, carry: Tensor, xs: Tensor) -> Tensor:
    carry, ys = scan(step_of(weight), carry, xs, memory="1MiB", capture=False)
    return carry.sum() + ys.pow(2).sum()


def captured_loss(weight: Tensor, carry: Tensor, xs: Tensor) -> Tensor:
    carry, ys = scan(step_of(weight), carry, xs, memory="1MiB", capture=True)
    return carry.sum() + ys.pow(2).sum()


def plain_while(weight: Tensor, carry: Tensor, xs: Tensor) -> Tensor:
    for _ in range(STEPS):
        carry = step_of(weight)(carry, xs[0])[0]
    return carry.sum()


def loop_loss(weight: Tensor, carry: Tensor, xs: Tensor) -> Tensor:
    def step(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return step_of(weight)(state[0], xs[0])[0], state[1] + 1

    return while_loop(lambda state: state[1] < STEPS, step, (carry, torch.tensor(0)), memory="1MiB", capture=False)[
        0
    ].sum()


LOSSES = [(plain_loss, eager_loss), (plain_loss, captured_loss), (plain_while, loop_loss)]
loops = pytest.mark.parametrize(("plain", "ours"), LOSSES, ids=["eager", "captured", "while_loop"])


def arguments() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 3, dtype=F64) / 2, torch.randn(3, dtype=F64), torch.randn(STEPS, 3, dtype=F64)


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    weight, carry, xs = arguments()
    return weight.requires_grad_(), carry.requires_grad_(), xs.requires_grad_()


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# --- torch.func and forward mode ------------------------------------------------------------------


def of_weight(loss: Loss) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    weight, carry, xs = arguments()
    return lambda weight: loss(weight, carry, xs), weight


def of_carry(loss: Loss) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    weight, carry, xs = arguments()
    return lambda carry: loss(weight, carry, xs), carry


def of_xs(loss: Loss) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    weight, carry, xs = arguments()
    return lambda xs: loss(weight, carry, xs), xs


def dual(function: Callable[[Tensor], Tensor], at: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(at, torch.ones_like(at)))).tangent


def functional_call_under_grad(function: Callable[[Tensor], Tensor], at: Tensor) -> Any:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(at)

        def forward(self) -> Tensor:
            return function(self.weight)

    module = Module()
    return func.grad(lambda weight: func.functional_call(module, {"weight": weight}, ()))(at)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, a: func.grad(f)(a),
    "grad_and_value": lambda f, a: func.grad_and_value(f)(a),
    "vjp": lambda f, a: func.vjp(f, a)[1](torch.ones((), dtype=F64)),
    "jacrev": lambda f, a: func.jacrev(f)(a),
    "jacfwd": lambda f, a: func.jacfwd(f)(a),
    "hessian": lambda f, a: func.hessian(f)(a),
    "jvp": lambda f, a: func.jvp(f, (a,), (torch.ones_like(a),)),
    "linearize": lambda f, a: func.linearize(f, a)[1](torch.ones_like(a)),
    "vmap": lambda f, a: func.vmap(f)(torch.stack([a, 2 * a])),
    "vmap of grad": lambda f, a: func.vmap(func.grad(f))(torch.stack([a, 2 * a])),
    "functional_call under grad": functional_call_under_grad,
    "dual numbers": dual,
    "forward-mode jacobian": lambda f, a: functional.jacobian(f, a, vectorize=True, strategy="forward-mode"),
}


@loops
@pytest.mark.parametrize("variable", [of_weight, of_carry, of_xs])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_no_transform_loses_a_gradient(plain: Loss, ours: Loss, variable: Any, transform: str) -> None:
    TRANSFORMS[transform](*variable(plain))  # the plain loop can be transformed in any way
    with pytest.raises(UsageError, match=r"longtape\.torch\.(scan|while_loop) .*(torch\.func|forward-mode)") as refusal:
        TRANSFORMS[transform](*variable(ours))
    assert "plain loop" in str(refusal.value) or "batch dimension" in str(refusal.value)


@loops
def test_functional_call_without_a_transform(plain: Loss, ours: Loss) -> None:
    _, carry, xs = arguments()

    class Module(nn.Module):
        def __init__(self, loss: Loss) -> None:
            super().__init__()
            self.weight, self.loss = nn.Parameter(torch.zeros(3, 3, dtype=F64)), loss

        def forward(self, carry: Tensor, xs: Tensor) -> Tensor:
            return self.loss(self.weight, carry, xs)

    weight = torch.randn(3, 3, dtype=F64, requires_grad=True)
    expected, found = (
        torch.autograd.grad(func.functional_call(Module(loss), {"weight": weight}, (carry, xs)), weight)
        for loss in (plain, ours)
    )
    assert_close(found, expected)


def force(weight: Tensor, carry: Tensor, x: Tensor) -> Tensor:
    return func.grad(lambda c: (torch.tanh(weight @ c) * x).sum())(carry)


def tangent(weight: Tensor, carry: Tensor, x: Tensor) -> Tensor:
    return func.jvp(lambda c: torch.tanh(weight @ c), (carry,), (x,))[1]


def rows(weight: Tensor, carry: Tensor, x: Tensor) -> Tensor:
    return func.vmap(lambda row: torch.tanh(row * carry).sum())(weight) * x


def curvature(weight: Tensor, carry: Tensor, x: Tensor) -> Tensor:
    return func.hessian(lambda c: torch.tanh(weight @ c).sum())(carry) @ x


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("inside", [force, tangent, rows, curvature])
def test_transforms_inside_the_step(inside: Any, capture: bool) -> None:
    weight, carry, xs = leaves()

    def step(carry: Tensor, x: Tensor) -> tuple[Tensor, None]:
        return carry - 0.1 * inside(weight, carry, x), None

    state = carry
    for x in xs:
        state, _ = step(state, x)
    expected = torch.autograd.grad(state.sum(), [weight, carry, xs])
    found = torch.autograd.grad(scan(step, carry, xs, memory="1MiB", capture=capture)[0].sum(), [weight, carry, xs])
    assert_close(found, expected)


# --- torch.autograd -------------------------------------------------------------------------------


@loops
def test_jacobian_vjp_and_gradcheck(plain: Loss, ours: Loss) -> None:
    f, at = of_weight(ours)
    g, _ = of_weight(plain)
    assert_close(functional.jacobian(f, at), functional.jacobian(g, at))
    assert_close(functional.vjp(f, at), functional.vjp(g, at))
    assert torch.autograd.gradcheck(ours, leaves(), fast_mode=True)


@loops
@pytest.mark.parametrize("second", [functional.hvp, functional.vhp, functional.jvp])
def test_second_derivatives_are_refused(plain: Loss, ours: Loss, second: Any) -> None:
    f, at = of_weight(ours)
    with pytest.raises(StateError, match="first derivatives only"):
        second(f, at, torch.ones_like(at))


@loops
@pytest.mark.parametrize("how", ["is_grads_batched", "vectorize", "vmap"])
def test_batched_cotangents_are_refused(plain: Loss, ours: Loss, how: str) -> None:
    weight, carry, xs = leaves()
    cotangents = torch.ones(2, dtype=F64)
    with pytest.raises(UsageError, match=r"is_grads_batched=True.*torch\.autograd\.grad once for each"):
        if how == "vectorize":
            functional.jacobian(lambda w: ours(w, carry, xs), weight.detach(), vectorize=True)
        loss = ours(weight, carry, xs)
        if how == "vmap":
            func.vmap(lambda bar: torch.autograd.grad(loss, weight, bar, retain_graph=True)[0])(cotangents)
        torch.autograd.grad(loss, weight, cotangents, is_grads_batched=True)


@loops
def test_inference_mode(plain: Loss, ours: Loss) -> None:
    weight, carry, xs = leaves()
    with torch.inference_mode():
        assert_close(ours(weight, carry, xs), plain(weight, carry, xs))
    expected = torch.autograd.grad(plain(weight, carry, xs), [weight, carry, xs])
    loss = ours(weight, carry, xs)
    with torch.inference_mode():
        found = torch.autograd.grad(loss, [weight, carry, xs])
    assert_close([gradient.clone() for gradient in found], list(expected))


@pytest.mark.parametrize("ours", [eager_loss, captured_loss])
def test_init_and_xs_made_in_inference_mode(ours: Loss) -> None:
    weight, carry, xs = arguments()
    weight.requires_grad_()
    with torch.inference_mode():
        made = carry.clone(), xs.clone()
    expected = torch.autograd.grad(plain_loss(weight, carry, xs), weight)
    assert_close(torch.autograd.grad(ours(weight, *made), weight), expected)


@loops
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("surrounded", [True, False])
def test_checkpoint_around(plain: Loss, ours: Loss, reentrant: bool, surrounded: bool) -> None:
    def region(loss: Loss) -> Loss:
        def run(weight: Tensor, carry: Tensor, xs: Tensor) -> Tensor:
            return loss(weight.sin(), carry.cos(), xs.exp()).sin() if surrounded else loss(weight, carry, xs)

        return run

    weight, carry, xs = leaves()
    expected = torch.autograd.grad(region(plain)(weight, carry, xs), [weight, carry, xs])
    checkpoint(region(ours), weight, carry, xs, use_reentrant=reentrant).backward()
    assert_close((weight.grad, carry.grad, xs.grad), expected)


def test_saved_tensor_hooks_around_do_not_see_single_steps() -> None:
    def seen(step_count: int) -> int:
        weight, carry, _ = leaves()
        xs = torch.randn(step_count, 3, dtype=F64)
        packed: list[Any] = []

        def pack(tensor: Tensor) -> Tensor:
            packed.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            scan(lambda c, x: (torch.tanh(weight @ c) * x, c.sin()), carry, xs, memory="1MiB", capture=True)
        return len(packed)

    assert {seen(3), seen(4), seen(4)} == {0}


@loops
def test_in_a_thread(plain: Loss, ours: Loss) -> None:
    weight, carry, xs = leaves()
    expected = torch.autograd.grad(plain(weight, carry, xs), [weight, carry, xs])
    found: list[Any] = []

    def run() -> None:
        found.append(torch.autograd.grad(ours(weight, carry, xs), [weight, carry, xs]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert_close(found[0], expected)


# --- hooks on what a step closes over -------------------------------------------------------------


class Product(torch.autograd.Function):
    """Reaches its arguments past `__torch_function__`."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return torch.outer(bar, b), a.t() @ bar


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("of", ["leaf", "computed"])
@pytest.mark.parametrize("product", [torch.matmul, Product.apply])
def test_a_hook_sees_the_gradient_of_all_steps(capture: bool, of: str, product: Any) -> None:
    def run(loop: Callable[..., Any]) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        torch.manual_seed(1)
        leaf = torch.randn(3, 3, dtype=F64, requires_grad=True)
        weight = leaf if of == "leaf" else leaf * 1.0
        seen: list[Tensor] = []

        def clipped(bar: Tensor) -> Tensor:
            seen.append(bar)
            return bar.clamp(-0.2, 0.2)

        weight.register_hook(clipped)
        weight.retain_grad()
        xs = torch.randn(STEPS, 3, dtype=F64)
        loop(lambda c, x: (torch.tanh(product(weight, c) + x), None), torch.zeros(3, dtype=F64), xs).sum().backward()
        return seen, weight.grad, leaf.grad

    def plain(step: Any, carry: Tensor, xs: Tensor) -> Tensor:
        for x in xs:
            carry, _ = step(carry, x)
        return carry

    found = run(lambda *given: scan(*given, memory="1MiB", capture=capture)[0])
    assert_close(found, run(plain))
    assert len(found[0]) == 1


# --- torch.compile and tracers --------------------------------------------------------------------


@loops
def test_a_compiled_function_breaks_its_graph_at_the_loop(plain: Loss, ours: Loss) -> None:
    weight, carry, xs = leaves()

    def around(loss: Loss) -> Loss:
        return lambda weight, carry, xs: loss(weight * 1.5, carry.sin(), xs) * 2

    expected = torch.autograd.grad(around(plain)(weight, carry, xs), [weight, carry, xs])
    compiled = torch.compile(around(ours), backend="eager")
    for _ in range(2):
        assert_close(torch.autograd.grad(compiled(weight, carry, xs), [weight, carry, xs]), expected)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"longtape runs its sweeps from Python"):
        torch.compile(lambda *given: ours(*given), backend="eager", fullgraph=True)(weight, carry, xs)


def test_a_step_is_captured_inside_a_compiled_module() -> None:
    notes: list[Any] = []

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, xs: Tensor) -> Tensor:
            def step(carry: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
                return torch.tanh(self.layer(carry) + x), carry

            def told(report: Any) -> None:
                notes.append(report.notes)

            carry, ys = scan(step, xs.new_zeros(3), xs.sin(), memory="1MiB", capture=True, on_report=told)
            return carry.sum() + ys.sum()

    module, xs = Module(), torch.randn(STEPS, 3)
    torch.compile(module, backend="eager")(xs).backward()
    found = [parameter.grad for parameter in module.parameters()]
    module.zero_grad()
    module(xs).backward()
    assert_close(found, [parameter.grad for parameter in module.parameters()])
    assert notes == [(), ()]


def test_importing_it_does_not_import_dynamo() -> None:
    program = "import sys, longtape.torch; assert 'torch._dynamo' not in sys.modules"
    path = str(Path(longtape.__file__).parent.parent)
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": path, "PATH": ""})


@loops
def test_a_tracer_is_refused_unless_nothing_is_differentiated(plain: Loss, ours: Loss) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    weight, carry, xs = arguments()
    weight.requires_grad_()
    with pytest.raises(UsageError, match="is being traced"):
        make_fx(ours)(weight, carry, xs)
    if ours is not loop_loss:  # whose condition reads a value
        with torch.no_grad():
            traced = make_fx(ours)(weight, carry, xs)
            assert_close(traced(weight, 2 * carry, xs), plain(weight, 2 * carry, xs))
