"""Captured steps against plain autograd over the same loop.

`by_tape` records a loop in windows, moves the residual bytes to other buffers, destroys
the originals, and pulls back; so whatever it gets right, it gets from bytes and from
what the caller has anyway.
"""

import contextlib
import gc
import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

from longtape.errors import UsageError
from longtape.torch.blocks import RoomExceeded
from longtape.torch.capture import CapturedStep
from longtape.torch.graphs import CaptureFailed
from longtape.torch.partition import dense_strides
from longtape.torch.tape import Tape, total

Step = Callable[[Any, Any], tuple[Any, Any]]
STEPS = 20


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    with contextlib.suppress(ImportError):  # PyTorch draws with it where it is installed, and it starts a thread
        monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def can_have_gradient(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and (tensor.is_floating_point() or tensor.is_complex())


class Loop:
    """A loop and the weights of a loss linear in its results; `ys` says whether the loss sees the ys."""

    def __init__(self, step: Step, init: Any, xs: Sequence[Any], *, ys: bool = True, closed: Sequence[Any] = ()):
        self.step, self.init, self.xs, self.ys, self.closed = step, init, xs, ys, list(closed)
        self.leaves, self.spec = pytree.tree_flatten(init)

    def weight(self, tensor: torch.Tensor, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)

    def plain(self) -> tuple[list[Any], list[list[Any]], list[Any]]:
        """Final carry, ys, and the gradients of init, the x leaves that require grad, and closed-over tensors."""
        init = [t.detach().requires_grad_() if can_have_gradient(t) else t for t in self.leaves]
        carry, all_ys = pytree.tree_unflatten(init, self.spec), []
        for x in self.xs:
            carry, y = self.step(carry, x)
            all_ys.append(pytree.tree_leaves(y))
        final = pytree.tree_leaves(carry)
        loss = torch.zeros((), dtype=torch.float64)
        for k, leaf in enumerate(final):
            if can_have_gradient(leaf) and leaf.requires_grad:
                loss = loss + (self.weight(leaf, k) * leaf).sum().real.double()
        if self.ys:
            for k, leaves in enumerate(zip(*all_ys, strict=True)):
                if can_have_gradient(leaves[0]) and leaves[0].requires_grad:
                    stacked = torch.stack(leaves)
                    loss = loss + (self.weight(stacked, 100 + k) * stacked).sum().real.double()
        wanted = [t for t in init if can_have_gradient(t)] + self.trainable_x() + self.closed
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        return final, all_ys, list(grads)

    def trainable_x(self) -> list[torch.Tensor]:
        return [t for x in self.xs for t in pytree.tree_leaves(x) if isinstance(t, torch.Tensor) and t.requires_grad]

    def by_tape(
        self, window: int = 7, captured: CapturedStep | None = None
    ) -> tuple[list[Any], list[list[Any]], list[Any]]:
        """The same, from recorded residuals."""
        x_leaves = [pytree.tree_leaves(x) for x in self.xs]
        captured = captured or CapturedStep(self.spec, pytree.tree_structure(self.xs[0]))
        self.captured = captured
        tape = self.tape = Tape(captured, self.step)
        detached = [[detach(t) for t in leaves] for leaves in x_leaves]
        carry: list[Any] = [detach(t, False) for t in self.leaves]
        with tape.running():
            state = torch.get_rng_state()
            tape.advance(carry, detached[0])
            torch.set_rng_state(state)
            blocks, numbers, ys = [], [], []
            for t in range(len(self.xs)):
                if t % window == 0:
                    blocks.append(tape.block(np.zeros(captured.block_nbytes(window), np.uint8)))
                carry, y, number = tape.record(carry, detached[t], blocks[-1], t % window)
                numbers.append(number)
                ys.append(y)
            moved = []
            for block in blocks:
                moved.append(tape.block(block._data.copy()))
                block._data[:] = 0xA5
        cotangents: list[Any] = [
            self.weight(leaf, k) if can_have_gradient(leaf) else None for k, leaf in enumerate(carry)
        ]
        y_weights = [self.weight(torch.stack(leaves), 100 + k) if self.ys and can_have_gradient(leaves[0]) else None
                     for k, leaves in enumerate(zip(*ys, strict=True))]  # fmt: skip
        tape.check_unmodified()
        of_x: list[list[Any]] = []
        for t in reversed(range(len(self.xs))):
            x = detached[t] if tape.needs_x(numbers[t]) else [None] * len(detached[t])
            y_cotangents = [None if w is None else w[t] for w in y_weights]
            cotangents, x_cotangents = tape.pull_back(
                numbers[t], moved[t // window], t % window,
                x=x, carry_cotangents=cotangents, y_cotangents=y_cotangents,
            )  # fmt: skip
            # What is returned must not lie in the buffer.
            cotangents = list(cotangents)
            of_x.append([total(c) for c, leaf in zip(x_cotangents, x_leaves[t], strict=True) if wants(leaf)])
        sums = {id(tensor): gradient for tensor, gradient in tape.gradients()}
        grads = [total(c) for c, leaf in zip(cotangents, self.leaves, strict=True) if can_have_gradient(leaf)]
        grads += [g for step in reversed(of_x) for g in step]
        grads += [sums.get(id(t)) for t in self.closed]
        return carry, ys, grads


def wants(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad


def detach(leaf: Any, keep: bool = True) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().requires_grad_(keep and leaf.requires_grad)


def same(a: Any, b: Any, exact: bool, tolerance: float = 1e-6) -> None:
    if a is None or b is None:
        # Autograd says None or zeros depending on the path; both mean no gradient.
        assert all(t is None or not t.any() for t in (a, b)), (a, b)
    elif exact:
        assert torch.equal(a, b), f"differ by {(a - b).abs().max()}"
    else:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def agree(loop: Loop, *, exact: bool = True, tolerance: float = 1e-6, **how: Any) -> Loop:
    state = torch.get_rng_state()
    final, ys, grads = loop.plain()
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    final_too, ys_too, grads_too = loop.by_tape(**how)
    assert torch.equal(after, torch.get_rng_state()), "the tape drew other random numbers"
    for a, b in zip(chain(final, *ys), chain(final_too, *ys_too), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            same(a.detach(), b.detach(), exact, tolerance)
    assert len(grads) == len(grads_too)
    for a, b in zip(grads, grads_too, strict=True):
        same(a, b, exact, tolerance)
    assert any(g is not None and bool(g.any()) for g in grads) or not grads
    return loop


# --- the same bits as autograd --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ys", [True, False])
@pytest.mark.parametrize("width", [8, 96])
def test_lstm_cell(dtype, ys, width):
    cell = nn.LSTMCell(5, width).to(dtype)

    def step(carry, x):
        h, c = cell(x, carry)
        return (h, c), h

    init = (torch.randn(64, width, dtype=dtype), torch.randn(64, width, dtype=dtype))
    xs = torch.randn(STEPS, 64, 5, dtype=dtype)
    loop = agree(Loop(step, init, list(xs), ys=ys, closed=cell.parameters()))
    assert len(loop.captured.graphs) == 1
    assert loop.captured.stride_nbytes == 7 * init[0].nbytes  # four gates, tanh(c), and the old h and c
    assert loop.captured.head_nbytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ys", [True, False])
def test_gru_cell(dtype, ys):
    cell = nn.GRUCell(5, 64).to(dtype)

    def step(h, x):
        h = cell(x, h)
        return h, {"h": h, "norm": h.norm()}

    xs = [torch.randn(16, 5, dtype=dtype, requires_grad=True) for _ in range(STEPS)]
    agree(Loop(step, torch.randn(16, 64, dtype=dtype), xs, ys=ys, closed=cell.parameters()))


def test_gru_cell_of_a_width_that_leaves_a_tail():
    """The cell computes in place in slices of a matrix, its graph in matrices of their own.

    The last elements of a row that fills no vector register go through another
    exponential, so here the last bit may differ.
    """
    cell = nn.GRUCell(5, 50)

    def step(h, x):
        h = cell(x, h)
        return h, h

    xs = list(torch.randn(STEPS, 16, 5))
    agree(Loop(step, torch.randn(16, 50), xs, closed=cell.parameters()), exact=False, tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residual_mlp(dtype):
    mlp = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24)).to(dtype)

    def step(h, x):
        h = h + 0.1 * mlp(h + x)
        return h, None

    agree(Loop(step, torch.randn(8, 24, dtype=dtype), list(torch.randn(STEPS, 8, 24, dtype=dtype)),
               closed=mlp.parameters()))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ys", [True, False])
def test_runge_kutta_neural_ode(dtype, ys):
    field = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 6)).to(dtype)

    def step(z, dt):
        k1 = field(z)
        k2 = field(z + dt / 2 * k1)
        k3 = field(z + dt / 2 * k2)
        k4 = field(z + dt * k3)
        z = z + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return z, z[:, 0]

    times = [torch.tensor(0.1, dtype=dtype, requires_grad=True) for _ in range(STEPS)]
    agree(Loop(step, torch.randn(4, 6, dtype=dtype), times, ys=ys, closed=field.parameters()))


@pytest.mark.parametrize("ys", [True, False])
def test_dropout_draws_the_same_numbers(ys):
    layer = nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.5), nn.Tanh())

    def step(h, x):
        h = layer(h) + x * (torch.rand(12) - torch.rand(12))
        return h, h

    loop = agree(Loop(step, torch.randn(5, 12), list(torch.randn(STEPS, 5, 12)), ys=ys, closed=layer.parameters()))
    assert loop.captured.uses_rng


def test_refusal_after_the_first_run_sets_the_generator_back():
    def step(h, x):
        return (h * torch.rand(4),), None

    before = torch.get_rng_state()
    tape = Tape(CapturedStep(pytree.tree_structure(0), pytree.tree_structure(0)), step)
    with pytest.raises(CaptureFailed, match="another structure"):
        tape.advance([torch.ones(4)], [torch.ones(4)])
    assert torch.equal(before, torch.get_rng_state())


def test_dropout_off_when_evaluating_is_another_graph():
    layer = nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.5))

    def step(h, x):
        return layer(h) + x, None

    loop = Loop(step, torch.randn(5, 12), list(torch.randn(3, 5, 12)), closed=layer.parameters())
    agree(loop)
    layer.eval()
    agree(loop, captured=loop.captured)
    assert len(loop.captured.graphs) == 2


def test_simple_rnn_stores_its_state_once():
    cell = nn.RNNCell(4, 32)

    def step(h, x):
        h = cell(x, h)
        return h, h

    loop = agree(Loop(step, torch.randn(16, 32), list(torch.randn(STEPS, 16, 4)), closed=cell.parameters()))
    state = 16 * 32 * 4
    assert (loop.captured.stride_nbytes, loop.captured.head_nbytes) == (state, state)


def test_only_what_the_step_before_returned_is_linked_to_it():
    cell = nn.RNNCell(4, 32)
    tape = Tape(CapturedStep(pytree.tree_structure(0), pytree.tree_structure(0)), lambda h, x: (cell(x, h), None))
    x = [torch.randn(16, 4)]
    carry, _ = tape.advance([torch.randn(16, 32)], x)
    block = tape.block(np.zeros(tape.captured.block_nbytes(3), np.uint8))
    carry, _, _ = tape.record(carry, x, block, 0)
    with pytest.raises(RoomExceeded):  # unlinked, it takes more than a stride
        tape.record([carry[0].detach() * 2], x, block, 1)


@pytest.mark.parametrize("width", [3, 200])
def test_several_leaves_linked(width):
    """Each must be found at its own place in the residuals of the step before."""

    def step(carry, x):
        a, b, c = carry
        return ((b * c + x).sigmoid(), (a * c - x).tanh(), (a * b).exp() * 0.3), None

    init = tuple(torch.randn(width, width) for _ in range(3))
    loop = agree(Loop(step, init, list(torch.randn(STEPS, width)), ys=False), exact=False, tolerance=1e-4)
    assert loop.captured.graphs[0].linkable >= 2


def test_a_tensor_and_its_transpose_are_stored_once():
    def step(h, x):
        z = torch.tanh(h + x)
        return z * z.t(), None

    loop = agree(Loop(step, torch.randn(40, 40), list(torch.randn(STEPS, 40))))
    assert loop.captured.stride_nbytes == 40 * 40 * 4


@pytest.mark.parametrize("window", [1, 2, 20])
@pytest.mark.parametrize("width", [8, 600])
def test_windows_of_any_length(window, width):
    """Both ways of storing, of linked and unlinked steps."""
    cell = nn.RNNCell(4, width)

    def step(carry, x):
        h = cell(x, carry[0])
        return (h, carry[1] * 0.9 + h.sin()), None

    init = (torch.randn(32, width), torch.randn(32, width))
    agree(Loop(step, init, list(torch.randn(STEPS, 32, 4)), closed=cell.parameters()), window=window)


# --- right, or refused ----------------------------------------------------------------


def test_attention_block():
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    norm = nn.LayerNorm(16)

    def step(h, x):
        a, _ = attention(norm(h), h + x, h, need_weights=False)
        return h + a, a.mean()

    agree(Loop(step, torch.randn(2, 6, 16), list(torch.randn(STEPS, 2, 6, 16)),
               closed=[*attention.parameters(), *norm.parameters()]), exact=False, tolerance=1e-5)  # fmt: skip


def test_convolution():
    conv = nn.Conv2d(3, 3, 3, padding=1)

    def step(h, x):
        return torch.relu(conv(h)) + x, None

    agree(Loop(step, torch.randn(2, 3, 8, 8), list(torch.randn(STEPS, 2, 3, 8, 8)), closed=conv.parameters()),
          exact=False)  # fmt: skip


def test_gather_and_scatter_with_integer_leaves():
    table = torch.randn(10, 4, requires_grad=True)

    def step(carry, x):
        h, where, alive = carry
        h = h.scatter_add(0, where[:, None].expand(-1, 4), table[x])
        return (h * 0.5, (where + 1) % 3, alive & (where >= 0)), h.gather(0, where[:, None])

    init = (torch.randn(3, 4), torch.tensor([0, 2, 1]), torch.ones(3, dtype=torch.bool))
    agree(Loop(step, init, list(torch.randint(0, 10, (STEPS, 3))), closed=[table]), exact=False)


def test_complex_carry():
    rotation = torch.randn(4, 4, dtype=torch.complex64, requires_grad=True)

    def step(z, x):
        z = torch.tanh(rotation @ z.conj() + x)
        return z, z.abs()

    agree(Loop(step, torch.randn(4, dtype=torch.complex64), list(torch.randn(STEPS, 4)), closed=[rotation]),
          exact=False)  # fmt: skip


def test_branches_on_shape_give_a_graph_each():
    def step(h, x):
        return (h.sin() * x.sum() if x.shape[0] == 2 else h.cos() * x.prod()), None

    xs = [torch.randn(2 + t % 2) for t in range(STEPS)]
    loop = agree(Loop(step, torch.randn(4), xs))
    assert len(loop.captured.graphs) == 2


def test_a_flag_closed_over_is_guarded():
    mode = {"sin": True}

    def step(h, x):
        return (h.sin() if mode["sin"] else h.cos()) * x, None

    loop = Loop(step, torch.randn(4), list(torch.randn(3, 4)))
    agree(loop)
    mode["sin"] = False
    agree(loop, captured=loop.captured)


def test_weights_chosen_by_a_python_counter_are_refused():
    weights = [torch.randn(4, 4, requires_grad=True) for _ in range(STEPS)]
    count = [0]

    def step(h, x):
        count[0] += 1
        return torch.tanh(weights[count[0] - 1] @ h), None

    with pytest.raises(CaptureFailed, match="Python objects"):
        Loop(step, torch.randn(4), [torch.zeros(1)] * STEPS).by_tape()
    assert count == [0]


def test_weights_chosen_from_outside_are_right_or_refused():
    weights = [torch.randn(4, 4, requires_grad=True) for _ in range(STEPS)]
    chosen = {"w": weights[0]}

    def step(h, x):
        return torch.tanh(chosen["w"] @ h) + x, None

    class Xs(list):
        def __getitem__(self, t):
            chosen["w"] = weights[t]
            return super().__getitem__(t)

    tape = Tape(CapturedStep(pytree.tree_structure(0), pytree.tree_structure(0)), step)
    xs, init = Xs(torch.randn(STEPS, 4)), torch.randn(4)
    h = init
    for t in range(STEPS):
        h, _ = step(h, xs[t])
    expected = torch.autograd.grad(h.sum(), weights)
    carry, numbers = [init], []
    tape.advance(carry, [xs[0]])
    block = tape.block(np.zeros(tape.captured.block_nbytes(STEPS), np.uint8))
    for t in range(STEPS):
        carry, _, number = tape.record(carry, [xs[t]], block, t)
        numbers.append(number)
    cotangents: Any = [torch.ones(4)]
    for t in reversed(range(STEPS)):
        cotangents, _ = tape.pull_back(
            numbers[t], block, t, x=[xs[t]], carry_cotangents=cotangents, y_cotangents=[None]
        )
    assert len(set(numbers)) == STEPS
    got = {id(tensor): gradient for tensor, gradient in tape.gradients()}
    for weight, gradient in zip(weights, expected, strict=True):
        assert torch.equal(got[id(weight)], gradient)


def test_closed_over_tensor_with_a_graph_of_its_own():
    base = torch.randn(4, 4, requires_grad=True)
    derived = base.exp() * 0.1

    def step(h, x):
        return derived @ h + derived.sum() * x, None

    agree(Loop(step, torch.randn(4), list(torch.randn(STEPS, 4)), closed=[derived]), exact=False)


def test_same_tensor_as_carry_and_y_and_carry_twice():
    def step(carry, x):
        h = (carry[0] * carry[1] + x).sin()
        return (h, h), (h, [h])

    agree(Loop(step, (torch.randn(4), torch.randn(4)), list(torch.randn(STEPS, 4))), exact=False)


def test_carry_returned_unchanged_swapped_or_replaced():
    def step(carry, x):
        a, b, fixed = carry
        return (b, a * fixed + x, fixed), (fixed, a, x)

    xs = [torch.randn(4, requires_grad=True) for _ in range(STEPS)]
    agree(Loop(step, (torch.randn(4), torch.randn(4), torch.randn(4)), xs), exact=False)

    def replace(carry, x):
        return x, carry * x

    agree(Loop(replace, torch.randn(4), xs), exact=False)


def test_results_that_are_views():
    weight = torch.randn(4, 8, requires_grad=True)

    def step(h, x):
        both = h @ weight
        left, right = both.chunk(2, -1)
        return left.tanh().t().contiguous().t(), (right, right[0], weight, weight.t(), both.expand(2, 3, 8), h)

    agree(Loop(step, torch.randn(3, 4), list(torch.randn(5, 4)), closed=[weight]), exact=False)


def test_no_leaf_has_a_gradient():
    def step(n, x):
        return n + 1, n * x

    loop = Loop(step, torch.tensor(3), list(torch.arange(STEPS)))
    assert loop.plain.__self__ is loop
    final, ys, grads = loop.by_tape()
    assert int(final[0]) == 3 + STEPS
    assert grads == []
    assert [int(y[0]) for y in ys] == [(3 + t) * t for t in range(STEPS)]


def test_only_a_closed_over_tensor_has_a_gradient():
    weight = torch.randn(4, requires_grad=True)

    def step(n, x):
        return n + 1, weight * x

    agree(Loop(step, torch.tensor(3), list(torch.randn(STEPS, 4)), closed=[weight]))


def test_detached_and_no_grad_parts_have_no_gradient():
    weight = torch.randn(4, requires_grad=True)

    def step(carry, x):
        h, ema = carry
        with torch.no_grad():
            scale = (h * weight).abs().sum()
        h = h * weight / scale + x
        return (h, 0.9 * ema + 0.1 * h.detach()), ema

    agree(Loop(step, (torch.randn(4), torch.zeros(4)), list(torch.randn(STEPS, 4)), closed=[weight]), exact=False)


def test_custom_function():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z**3

        @staticmethod
        def backward(ctx, g):
            (z,) = ctx.saved_tensors
            return 3 * z**2 * g

    def step(h, x):
        return torch.sin(Cube.apply(h)) + x, None

    agree(Loop(step, torch.randn(4), list(torch.randn(STEPS, 4))), exact=False)


def test_cotangents_that_are_residuals_outlive_the_buffer():
    class Itself(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            z = z.sin()
            ctx.save_for_backward(z)
            return z

        @staticmethod
        def backward(ctx, g):
            return ctx.saved_tensors[0].view(2, 2).view(4)

    def step(carry, x):
        a, b = carry
        return (Itself.apply(b), a * x), None

    agree(Loop(step, (torch.randn(4), torch.randn(4)), list(torch.randn(STEPS, 4))), exact=False)


def test_an_unused_y_makes_no_nan():
    """The square root at 0 has slope ∞: with a zero cotangent instead of none, NaN."""
    far = torch.full((4,), torch.inf)

    def step(h, x):
        return h * x, ((h * 0).sqrt(), h * far)

    _, _, grads = agree(Loop(step, torch.randn(4), list(torch.randn(5, 4)), ys=False)).by_tape()
    assert torch.isfinite(grads[0]).all()


def test_backward_that_is_not_linear_is_given_zeros():
    class Offset(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            return a * 2, b * 3

        @staticmethod
        def backward(ctx, g, k):
            return g * 2, k.cos()

    def step(h, x):
        a, b = Offset.apply(h, h * 0.5)
        return a * x, b

    agree(Loop(step, torch.randn(4), list(torch.randn(3, 4)), ys=False), exact=False)


@pytest.mark.parametrize("through", [True, False])
def test_gradient_taken_inside_the_step(through):
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def step(z, x):
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(net(z).sum(), z, create_graph=through)
        q, p = slope.chunk(2, -1)
        return z + 0.1 * torch.cat([p, -q], -1) * x, z.sum()

    xs = list(torch.randn(STEPS, 1, dtype=torch.float64))
    closed = [net[0].weight, net[0].bias, net[2].weight] if through else []
    agree(Loop(step, torch.randn(3, 4, dtype=torch.float64), xs, closed=closed), exact=False, tolerance=1e-12)


def test_backward_called_inside_the_step_is_refused():
    weight = torch.randn(4, requires_grad=True)

    def step(h, x):
        (h * weight).sum().backward()
        return h * weight.grad, None

    with pytest.raises(CaptureFailed):
        Loop(step, torch.randn(4), [torch.zeros(1)] * 3).by_tape()
    assert weight.grad is None


def test_hooks_on_intermediate_gradients():
    def step(h, x):
        z = h * x
        z.register_hook(lambda g: g.clamp(-0.5, 0.5))
        return z.sin(), None

    agree(Loop(step, torch.randn(4), list(torch.randn(STEPS, 4))), exact=False)


def test_in_place_work_on_own_tensors():
    def step(h, x):
        z = h * x
        z.add_(1).mul_(0.5)
        z[0] = h[1]
        out = torch.zeros(4)
        out[1:] += z[:3]
        return out + z, z

    agree(Loop(step, torch.randn(4), list(torch.randn(STEPS, 4))), exact=False)


def test_autocast():
    linear = nn.Linear(16, 16)

    def step(h, x):
        return torch.tanh(linear(h)).float() + x, None

    def cast_step(h, x):
        with torch.autocast("cpu", torch.bfloat16):
            return step(h, x)

    xs = list(torch.randn(4, 8, 16))
    agree(Loop(cast_step, torch.randn(8, 16), xs, closed=linear.parameters()), exact=False, tolerance=1e-2)
    loop = Loop(step, torch.randn(8, 16), xs, closed=linear.parameters())
    agree(loop)
    with torch.autocast("cpu", torch.bfloat16):
        agree(loop, captured=loop.captured, exact=False, tolerance=1e-2)
    assert len(loop.captured.graphs) == 2
    agree(loop, captured=loop.captured)


def test_modules_partials_and_fresh_functions():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, carry, x):
            h = torch.tanh(self.linear(carry["h"])) + x
            return {"h": h, "nothing": None}, None

    model = Model()
    init = {"h": torch.randn(2, 4), "nothing": None}
    xs = list(torch.randn(STEPS, 2, 4))
    agree(Loop(model, init, xs, closed=model.parameters()))
    agree(Loop(model.forward, init, xs, closed=model.parameters()))

    def make(scale):
        def step(h, x):
            return h * scale + x, None

        return step

    captured = CapturedStep(pytree.tree_structure(0), pytree.tree_structure(0))
    for value in (0.5, 0.25, 2.0):
        scale = torch.tensor(value, requires_grad=True)
        agree(Loop(make(scale), torch.randn(4), list(torch.randn(3, 4)), closed=[scale]), captured=captured)
    assert len(captured.graphs) == 1


def test_numpy_array_closed_over_is_held_once():
    array = np.ones(4, np.float32)

    def step(h, x):
        return h.sin() * torch.from_numpy(array) + x, None

    loop = agree(Loop(step, torch.randn(4), list(torch.randn(STEPS, 4))))
    assert len(loop.tape._entries) <= 3


# --- refused, with a reason -----------------------------------------------------------

STATE = torch.zeros(4)


def branches(h, x):
    return (h * 2 if h.sum() > 0 else h * 3), None


def changes_carry(h, x):
    h.add_(1)
    return h * 2, None


def changes_x(h, x):
    x.add_(1)
    return h * x, None


def changes_global(h, x):
    STATE.add_(1)
    return h + STATE, None


def reads_item(h, x):
    return h * float(h.sum()), None


def prints(h, x):
    print(h)
    return h, None


def returns_number(h, x):
    return h * 2, 3.0


def shape_from_values(h, x):
    return h * h[h > 0].sum(), None


def other_structure(h, x):
    return (h, h), None


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (branches, r"branches on the values of a tensor .*test_capture.py:\d+"),
        (changes_carry, "in place"),
        (changes_x, "in place"),
        (changes_global, "in place"),
        (reads_item, "depends on the values"),
        (prints, "print"),
        (returns_number, "no tensor"),
        (shape_from_values, "depends on the values|Unsupported"),
        (other_structure, "another structure"),
    ],
)
def test_refused(step, reason, caplog, recwarn):
    captured = CapturedStep(pytree.tree_structure(0), pytree.tree_structure(0))
    tape = Tape(captured, step)
    init, x = torch.ones(4), torch.ones(4)
    with pytest.raises(CaptureFailed, match=reason) as caught:
        tape.advance([init], [x])
    assert "\n" not in str(caught.value)
    assert torch.equal(init, torch.ones(4))
    assert torch.equal(x, torch.ones(4))
    assert not STATE.any()
    assert captured.failure == str(caught.value)
    assert not recwarn.list
    assert not caplog.records
    with pytest.raises(CaptureFailed, match=reason):
        tape.advance([init], [x])


def test_batch_norm_statistics_are_refused():
    norm = nn.BatchNorm1d(4)
    with pytest.raises(CaptureFailed, match="in place"):
        Loop(lambda h, x: (norm(h), None), torch.randn(3, 4), [torch.zeros(1)]).by_tape()
    assert not norm.running_mean.any()


def test_too_many_graphs_are_refused_but_old_ones_are_forgotten(caplog):
    def step(h, x):
        return h * x.sum(), None

    loop = Loop(step, torch.randn(4), [torch.randn(2 + t) for t in range(6)])
    agree(loop)
    again = Loop(step, torch.randn(4), [torch.randn(20 + t) for t in range(6)])
    agree(again, captured=loop.captured)
    with pytest.raises(CaptureFailed, match="again and again"):
        Loop(step, torch.randn(4), [torch.randn(40 + t) for t in range(20)]).by_tape(captured=loop.captured)
    assert not caplog.records


def test_dynamo_switched_off_is_noticed_before_the_step_runs():
    calls = []

    def step(h, x):
        calls.append(1)
        return h, None

    with torch.compiler.set_stance("force_eager"), pytest.raises(CaptureFailed, match="switched off"):
        Loop(step, torch.randn(4), [torch.zeros(1)]).by_tape()
    assert not calls


def test_an_error_of_the_step_itself_is_its_own():
    table = torch.randn(3)

    def step(h, x):
        return h * table[x], None

    loop = Loop(step, torch.randn(1), [torch.tensor([0]), torch.tensor([7])])
    with pytest.raises(IndexError):
        loop.by_tape()
    assert loop.captured.failure is None


def test_a_graph_with_more_residuals_has_no_room():
    def step(h, x):
        return (h.sin() if x.shape[0] == 2 else (h * h.sin()).tanh() * h.cos()), None

    with pytest.raises(RoomExceeded) as caught:
        Loop(step, torch.randn(64), [torch.zeros(2), torch.zeros(2), torch.zeros(3)]).by_tape()
    assert caught.value.carry[0] is not None


def test_closed_over_tensor_changed_before_reverse():
    weight = torch.randn(4, requires_grad=True)
    loop = agree(Loop(lambda h, x: (h * weight, None), torch.randn(4), [torch.zeros(1)] * 2, closed=[weight]))
    loop.tape.check_unmodified()
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(UsageError, match="in place"):
        loop.tape.check_unmodified()


def test_nothing_outlives_the_tape():
    weight = torch.randn(4, requires_grad=True)
    loop = Loop(lambda h, x: (h * weight, None), torch.randn(4), [torch.zeros(1)] * 2)
    loop.by_tape()
    loop.step = None  # type: ignore[assignment]
    seen = weakref.ref(loop.tape)
    del loop.tape
    gc.collect()
    assert seen() is None


def test_dense_strides():
    base = torch.empty(4, 6, 8)
    assert dense_strides(base) == base.stride()
    assert dense_strides(base.permute(2, 0, 1)) == base.permute(2, 0, 1).stride()
    assert dense_strides(base[:, :3]) == (24, 8, 1)
    assert dense_strides(base[..., :3].permute(2, 1, 0)) == (1, 3, 18)
    assert dense_strides(torch.empty(4, 1).expand(4, 5)) == (5, 1)
    assert dense_strides(torch.empty(())) == ()
