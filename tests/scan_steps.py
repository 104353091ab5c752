"""Step functions of many kinds, and the plain loop that scans are held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

F64 = torch.float64


def plain(step: Callable[[Any, Any], Any], init: Any, xs: Any = None, length: int | None = None) -> tuple[Any, Any]:
    """The loop that `scan` stands for."""
    carry, ys = init, []
    for k in range(length if length is not None else len(pytree.tree_leaves(xs)[0])):
        x = None if xs is None else pytree.tree_map(lambda leaf, k=k: leaf[k], xs)
        carry, y = step(carry, x)
        ys.append(y)
    return carry, pytree.tree_map(lambda *leaves: None if leaves[0] is None else torch.stack(leaves), *ys)


def loss_of(*trees: Any) -> Tensor:
    """A number that depends on every leaf, each element with another weight."""
    total = torch.zeros((), dtype=F64)
    for leaf in pytree.tree_leaves(trees):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()) and leaf.requires_grad:
            parts = torch.view_as_real(leaf) if leaf.is_complex() else leaf
            weights = torch.linspace(0.5, 1.5, parts.numel(), dtype=F64).view(parts.shape)
            total = total + (parts.to(F64) * weights).sum()
    return total


@dataclass
class Case:
    """A step, what it starts from, and the tensors whose gradients are compared."""

    step: Callable[[Any, Any], Any]
    init: Any
    xs: Any = None
    length: int | None = None
    parameters: list[Tensor] = field(default_factory=list)
    captures: bool = True
    """Whether the step can be turned into graphs."""

    def wanted(self) -> list[Tensor]:
        leaves = [leaf for leaf in pytree.tree_leaves((self.init, self.xs)) if isinstance(leaf, Tensor)]
        return [tensor for tensor in [*leaves, *self.parameters] if tensor.requires_grad]

    def outcome(self, run: Callable[..., Any], seed: int = 3, **options: Any) -> list[Tensor | None]:
        """Results and gradients."""
        torch.manual_seed(seed)
        carry, ys = run(self.step, self.init, self.xs, self.length, **options)
        after = torch.rand(())
        results = [leaf.detach() for leaf in pytree.tree_leaves((carry, ys)) if isinstance(leaf, Tensor)]
        gradients = torch.autograd.grad(loss_of(carry, ys), self.wanted(), allow_unused=True)
        return [*results, *gradients, after]


def assert_same(got: list[Tensor | None], expected: list[Tensor | None], *, exact: bool = False) -> None:
    """Equal up to the order of summation; a gradient that is zero may be None."""
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        if ours is None or theirs is None:
            assert all(part is None or not part.any() for part in (ours, theirs))
            continue
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        if exact or not (ours.is_floating_point() or ours.is_complex()):
            assert torch.equal(ours, theirs)
        else:
            wide = ours.dtype in (torch.float64, torch.complex128)
            tolerance = {torch.bfloat16: 3e-2}.get(ours.dtype, 1e-12 if wide else 1e-6)
            size = float(theirs.abs().max()) if theirs.numel() else 0.0
            assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * max(size, 1.0))


def leaf(*shape: int, dtype: torch.dtype = F64, scale: float = 0.5) -> Tensor:
    return (scale * torch.randn(*shape, dtype=dtype)).requires_grad_()


def lstm() -> Case:
    cell = nn.LSTMCell(3, 5).double()
    step = lambda carry, x: ((new := cell(x, carry)), new[0] * 2)  # noqa: E731
    return Case(step, (leaf(2, 5), leaf(2, 5)), leaf(9, 2, 3), None, list(cell.parameters()))


def gru() -> Case:
    cell = nn.GRUCell(3, 4)

    def step(h: Tensor, x: dict[str, Tensor]) -> tuple[Tensor, None]:
        return cell(x["a"] + x["b"], h), None

    xs = {"a": torch.randn(8, 2, 3), "b": leaf(8, 2, 3, dtype=torch.float32)}
    return Case(step, leaf(2, 4, dtype=torch.float32), xs, None, list(cell.parameters()))


def residual() -> Case:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4)).double()
    return Case(lambda h, _: (h + 0.1 * net(h), h.mean()), leaf(3, 4), None, 11, list(net.parameters()))


def neural_ode() -> Case:
    weight = leaf(3, 3)

    def field_of(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ weight) * torch.cos(t)

    def step(carry: tuple[Tensor, Tensor], _: None) -> tuple[tuple[Tensor, Tensor], Tensor]:
        t, y = carry
        k1 = field_of(t, y)
        k2 = field_of(t + 0.05, y + 0.05 * k1)
        k3 = field_of(t + 0.05, y + 0.05 * k2)
        k4 = field_of(t + 0.1, y + 0.1 * k3)
        return (t + 0.1, y + 0.1 / 6 * (k1 + 2 * k2 + 2 * k3 + k4)), y[0]

    return Case(step, (torch.zeros((), dtype=F64), leaf(2, 3)), None, 10, [weight])


def dropout() -> Case:
    layer = nn.Linear(6, 6).double()
    step = lambda h, x: (F.dropout(torch.tanh(layer(h) + x), 0.4), None)  # noqa: E731
    return Case(step, leaf(2, 6), leaf(10, 2, 6), None, list(layer.parameters()))


def attention() -> Case:
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True).double()
    return Case(lambda h, x: (block(h + x), h[:, 0]), leaf(2, 3, 8), leaf(6, 2, 3, 8), None, list(block.parameters()))


def convolution() -> Case:
    net = nn.Conv2d(2, 2, 3, padding=1).double()
    return Case(lambda h, _: (torch.relu(net(h)) + h, h.sum((-1, -2))), leaf(1, 2, 5, 5), None, 7, [*net.parameters()])


def gather_scatter() -> Case:
    table = leaf(5, 3)

    def step(carry: tuple[Tensor, ...], x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        state, index, flags = carry
        row = table[index]
        state = torch.tanh(state.index_add(0, x, row))
        return (state, (index + x) % 5, ~flags), state.gather(0, x[:, None].expand(-1, 3))

    init = (leaf(4, 3), torch.tensor([0, 3]), torch.tensor([True, False]))
    return Case(step, init, torch.randint(0, 4, (9, 2)), None, [table])


def complex_numbers() -> Case:
    phase = leaf(4)

    def step(psi: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        psi = torch.fft.ifft(torch.fft.fft(psi) * torch.exp(1j * phase)) + x
        return psi, psi.abs()

    return Case(step, leaf(4, dtype=torch.complex128), leaf(6, 4), None, [phase])


def branches_on_shapes() -> Case:
    a, b = leaf(3), leaf(3)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin(h * (a if h.shape[0] > 1 else b) + x), h

    return Case(step, leaf(2, 3), leaf(7, 2, 3), None, [a, b])


def hamiltonian() -> Case:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def step(z: Tensor, _: None) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            inner = z if z.requires_grad else z.detach().requires_grad_()
            energy = net(inner).sum()
            slope = torch.autograd.grad(energy, inner, create_graph=True)[0]
        q, p = slope.chunk(2, -1)
        return z + 0.1 * torch.cat([p, -q], -1), z.sum()

    return Case(step, leaf(3, 4), None, 6, [p for p in net.parameters() if p.dim() > 1 or p.numel() > 1])


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return 2 * torch.sin(x) * w

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 2 * bar * torch.cos(x) * w, 2 * bar * torch.sin(x)


def own_function() -> Case:
    weight = leaf(3)
    return Case(lambda h, x: (Twice.apply(h + x, weight), h), leaf(3), leaf(8, 3), None, [weight])


def depends_on_data() -> Case:
    a, b = leaf(3), leaf(3)
    step = lambda h, x: (torch.tanh(h * (a if x.sum() > 0 else b) + x), None)  # noqa: E731
    return Case(step, leaf(3), leaf(12, 3), None, [a, b], captures=False)


def selected_weights() -> Case:
    experts = [leaf(3) for _ in range(3)]

    def step(carry: tuple[Tensor, Tensor], _: None) -> tuple[tuple[Tensor, Tensor], Tensor]:
        h, k = carry
        h = torch.sin(h * experts[int(k) % 3])
        return (h, k + 1), h

    return Case(step, (leaf(3), torch.tensor(0)), None, 7, experts)


def narrow_types() -> Case:
    weight = leaf(4, 4, dtype=torch.bfloat16)

    def step(carry: tuple[Tensor, Tensor], _: None) -> tuple[tuple[Tensor, Tensor], None]:
        h, total = carry
        h = torch.tanh(h @ weight)
        return (h, total + h.float().sum()), None

    return Case(step, (leaf(2, 4, dtype=torch.bfloat16), torch.zeros(())), None, 6, [weight])


def layer_norm() -> Case:
    norm, weight = nn.LayerNorm(6).double(), leaf(6, 6)
    step = lambda h, x: (norm(h @ weight + x), {"mean": h.mean(-1), "flag": h[0] > 0})  # noqa: E731
    return Case(step, leaf(3, 6), leaf(8, 3, 6), None, [weight, *norm.parameters()])


def embedding() -> Case:
    table, out = nn.Embedding(7, 4).double(), leaf(4, 7)

    def step(carry: tuple[Tensor, Tensor], _: None) -> tuple[tuple[Tensor, Tensor], Tensor]:
        h, token = carry
        h = torch.tanh(h + table(token))
        scores = h @ out
        return (h, scores.argmax(-1)), F.log_softmax(scores, -1)

    return Case(step, (leaf(2, 4), torch.tensor([1, 5])), None, 9, [out, *table.parameters()])


def sorting() -> Case:
    weight = leaf(5)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        values, order = torch.sort(h * weight + x, dim=-1)
        return torch.cumsum(values, -1) / 3, order

    return Case(step, leaf(2, 5), leaf(7, 2, 5), None, [weight])


def linear_solve() -> Case:
    matrix = leaf(4, 4)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        eye = torch.eye(4, dtype=F64)
        return torch.linalg.solve(2 * eye + 0.1 * matrix @ matrix.T, h + x), h.norm()

    return Case(step, leaf(4, 2), leaf(6, 4, 2), None, [matrix], captures=False)


def masked() -> Case:
    weight = leaf(4)

    def step(h: Tensor, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        new = torch.where(x["keep"], torch.sigmoid(h * weight + x["in"]), h)
        return new, torch.einsum("bi,i->b", new, weight)

    xs = {"keep": torch.rand(9, 3, 4) > 0.4, "in": leaf(9, 3, 4)}
    return Case(step, leaf(3, 4), xs, None, [weight])


def views_of_its_carry() -> Case:
    """Hands back views of what it was given: nothing may be computed in their memory."""
    weight = leaf(3)

    def step(carry: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        a, b = carry
        return (b.flip(0), torch.sin(a * weight) + x), a[0]

    return Case(step, (leaf(2, 3), leaf(2, 3)), leaf(8, 2, 3), None, [weight])


def in_place() -> Case:
    """Updates its carry, and tensors of its own, in place."""
    weight = leaf(4)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, None]:
        room = torch.zeros_like(h)
        room += h * weight
        room[0].mul_(0.5)
        return torch.tanh(room).add(x).mul_(0.9), None

    return Case(step, leaf(2, 4), leaf(8, 2, 4), None, [weight])


ZOO = [
    lstm, gru, residual, neural_ode, dropout, attention, convolution, gather_scatter, complex_numbers,
    branches_on_shapes, hamiltonian, own_function, depends_on_data, selected_weights, narrow_types,
    layer_norm, embedding, sorting, linear_solve, masked, views_of_its_carry, in_place,
]  # fmt: skip


def exact_cases(dtype: torch.dtype, width: int) -> dict[str, Callable[[], Case]]:
    """Steps whose gradients must have the bits of a plain loop's."""

    def recurrent(kind: type[nn.Module]) -> Callable[[], Case]:
        def make() -> Case:
            cell = kind(8, width).to(dtype)
            state = lambda: leaf(4, width, dtype=dtype)  # noqa: E731
            init: Any = (state(), state()) if kind is nn.LSTMCell else state()

            def step(carry: Any, x: Tensor) -> tuple[Any, Tensor]:
                new = cell(x, carry)
                return new, (new[0] if kind is nn.LSTMCell else new).mean(-1)

            return Case(step, init, leaf(280, 4, 8, dtype=dtype), None, list(cell.parameters()))

        return make

    def residual_chain() -> Case:
        net = nn.Sequential(nn.Linear(width, 24), nn.Tanh(), nn.Linear(24, width)).to(dtype)
        return Case(lambda h, _: (h + 0.1 * net(h), None), leaf(4, width, dtype=dtype), None, 280, [*net.parameters()])

    def runge_kutta() -> Case:
        weight = leaf(width, width, dtype=dtype, scale=0.3)

        def step(y: Tensor, _: None) -> tuple[Tensor, Tensor]:
            k1 = torch.tanh(y @ weight)
            k2 = torch.tanh((y + 0.05 * k1) @ weight)
            k3 = torch.tanh((y + 0.05 * k2) @ weight)
            k4 = torch.tanh((y + 0.1 * k3) @ weight)
            return y + 0.1 / 6 * (k1 + 2 * k2 + 2 * k3 + k4), y.mean()

        return Case(step, leaf(4, width, dtype=dtype), None, 280, [weight])

    def dropped() -> Case:
        layer = nn.Linear(width, width).to(dtype)
        step = lambda h, x: (F.dropout(torch.tanh(layer(h) + x), 0.3), None)  # noqa: E731
        return Case(step, leaf(4, width, dtype=dtype), leaf(280, 4, width, dtype=dtype), None, [*layer.parameters()])

    return {
        "lstm": recurrent(nn.LSTMCell),
        "gru": recurrent(nn.GRUCell),
        "residual chain": residual_chain,
        "Runge-Kutta": runge_kutta,
        "dropout": dropped,
    }
