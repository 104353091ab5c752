"""What a step leaves behind: it has the plain loop's gradient, or is refused by its path."""

import contextlib
import gc

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import longtape.torch as lt
from longtape.errors import StepError

STEPS = 6
LOG = []

captures = pytest.mark.parametrize("capture", [False, True])


def plain(step, init, xs=None, length=STEPS, **_):
    carry, ys = init, []
    for k in range(length):
        carry, y = step(carry, None if xs is None else xs[k])
        ys.append(y)
    return carry, None if ys[0] is None else torch.stack(ys)


def scanned(step, init, xs=None, length=STEPS, capture=False):
    return lt.scan(step, init, xs, None if xs is not None else length, memory="64KiB", capture=capture)


def start(wants=True):
    return torch.linspace(0.1, 0.9, 4, dtype=torch.float64).requires_grad_(wants)


def same(make, capture=False):
    theirs, ours = make(plain), make(lambda *args, **kwargs: scanned(*args, capture=capture, **kwargs))
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


class Experts(nn.Module):
    """Leaves a loss on itself, as mixtures of experts do."""

    def __init__(self, keep):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(4, 4, dtype=torch.float64)
        self.aux, self.losses, self.by_name, self.keep = None, [], {}, keep

    def forward(self, h, x):
        weights = self.gate(h).softmax(-1)
        self.keep(self, weights, h)
        return torch.tanh(h * weights), None


KEEPS = {
    "attribute": (lambda m, w, h: setattr(m, "aux", (w * w).sum()), "step.aux"),
    "list": (lambda m, w, h: m.losses.append((w * w).sum()), r"step.losses\[0\]"),
    "dict": (lambda m, w, h: m.by_name.update(aux=(w * w).sum()), r"step.by_name\['aux'\]"),
    "tuple": (lambda m, w, h: setattr(m, "aux", (w, w.sum())), r"step.aux\[\d\]"),
    "view": (lambda m, w, h: setattr(m, "aux", w[1:]), "step.aux"),
    "alias of the carry": (lambda m, w, h: setattr(m, "aux", h), "step.aux"),
    "global": (lambda m, w, h: LOG.append(w.sum()), r"global 'LOG'\[0\]"),
    "parameters alone": (lambda m, w, h: m.losses.append(m.gate.weight.square().sum()), "step.losses"),
}


@captures
@pytest.mark.parametrize("wants", [True, False])
@pytest.mark.parametrize("keep", KEEPS)
def test_a_loss_that_is_left_behind_is_refused_by_its_path(keep, wants, capture):
    LOG.clear()
    act, path = KEEPS[keep]
    with pytest.raises(StepError, match=f"(behind in|changes) {path}"):
        scanned(Experts(act), start(wants), capture=capture)


@captures
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("at", [2, STEPS - 1])
def test_what_only_a_later_step_leaves_is_refused(at, known, capture):
    steps = torch.arange(STEPS)
    kept = {"aux": None} if known else {}

    def step(h, k):
        if k == at:
            kept["aux"] = h.sum()
        return torch.sin(h), None

    h0 = start()
    with pytest.raises(StepError, match=r"behind in closure variable 'kept'\['aux'\]|closure variable 'kept', from 0"):
        h, _ = scanned(step, h0, steps, capture=capture)
        (h.sum() + kept["aux"]).backward()


def test_what_a_hook_keeps_is_refused():
    layer, activations = nn.Linear(4, 4, dtype=torch.float64), []
    layer.register_forward_hook(lambda module, args, output: activations.append(output))
    with pytest.raises(StepError, match="behind in somewhere"):
        scanned(lambda h, _: (torch.tanh(layer(h)), None), start())


def test_x_that_is_kept_is_refused():
    seen = {}

    def step(h, x):
        seen["x"] = x
        return torch.sin(h * x), None

    with pytest.raises(StepError, match=r"closure variable 'seen'\['x'\]"):
        scanned(step, start(), torch.ones(STEPS, 4, dtype=torch.float64, requires_grad=True))


@captures
def test_what_has_no_gradient_in_the_plain_loop_may_be_kept(capture):
    kept = {}

    def step(h, _):
        new = torch.sin(h)
        kept["last"] = new.detach().clone()
        return new, None

    def make(run):
        h0 = start()
        h, _ = run(step, h0)
        last = kept["last"]
        found = torch.autograd.grad(h.sum(), [h0])
        assert kept["last"] is last  # and not what backward has computed
        return *found, last

    same(make, capture)


def test_what_only_a_cycle_holds_is_not_left_behind():
    def step(h, _):
        ring = [torch.sin(h)]
        ring.append(ring)
        return ring[0] * 2.0, None

    def make(run):
        h0 = start()
        return torch.autograd.grad(run(step, h0)[0].sum(), [h0])

    gc.disable()
    try:
        same(make)
    finally:
        gc.enable()


# Made once from parameters -----------------------------------------------------------------------------


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.linspace(0.5, 1.5, 4, dtype=torch.float64))
        self.w, self.ready = None, False

    def forward(self, h, _):
        if self.w is None:
            self.w, self.ready = self.p * 2.0, True
        return torch.sin(h * self.w), None


@captures
@pytest.mark.parametrize("wants", [True, False])
def test_a_weight_that_is_made_at_the_first_call_has_its_gradient(wants, capture):
    def make(run):
        cell, h0 = Lazy(), start(wants)
        h, _ = run(cell, h0)
        return torch.autograd.grad(h.sum(), [cell.p, *([h0] if wants else [])])

    same(make, capture)


@captures
def test_a_loss_of_parameters_alone_has_its_gradient(capture):
    def make(run):
        cell, h0 = Experts(lambda m, w, h: setattr(m, "aux", m.gate.weight.square().sum())), start()
        h, _ = run(cell, h0)
        return torch.autograd.grad(h.sum() + cell.aux, [h0, cell.gate.weight])

    same(make, capture)


@captures
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weights_that_are_set_anew_at_each_call_have_their_gradient(capture):
    def make(run):
        torch.manual_seed(0)
        layer, h0 = nn.utils.weight_norm(nn.Linear(4, 4, dtype=torch.float64)), start()
        h, _ = run(lambda h, _: (torch.tanh(layer(h)), None), h0)
        return torch.autograd.grad(h.sum() + layer.weight.sum(), [h0, *layer.parameters()])

    same(make, capture)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2.0 * torch.tanh(weight)


@captures
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("wants", [True, False])
def test_parametrized_weights_that_are_cached_have_their_gradient(wants, cached, capture):
    def make(run):
        torch.manual_seed(0)
        layer, h0 = nn.Linear(4, 4, dtype=torch.float64), start(wants)
        parametrize.register_parametrization(layer, "weight", Doubled())
        with parametrize.cached() if cached else contextlib.nullcontext():
            h, _ = run(lambda h, _: (torch.tanh(layer(h)), None), h0)
            return torch.autograd.grad(h.sum(), list(layer.parameters()))

    same(make, capture)


def test_a_scale_that_is_taken_from_the_first_carry_is_the_plain_loops():
    def make(run):
        kept, h0 = {}, start()

        def step(h, _):
            if "scale" not in kept:
                kept["scale"] = float(h.detach().max())
            return torch.sin(h / kept["scale"]), None

        return torch.autograd.grad(run(step, h0)[0].sum(), [h0])

    same(make)


# A result that is also left on a module -----------------------------------------------------------------


class Neuron(nn.Module):
    """A spiking neuron: its potential is an attribute."""

    def __init__(self):
        super().__init__()
        self.leak = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))
        self.v = None

    def forward(self, x):
        self.v = torch.tanh(self.leak * self.v + x)
        return self.v * self.v


@captures
def test_a_potential_that_is_the_carry_can_be_read_from_the_neuron(capture):
    xs = torch.linspace(0.0, 1.0, STEPS * 4, dtype=torch.float64).view(STEPS, 4)

    def make(run):
        node, v0 = Neuron(), start()

        def step(v, x):
            node.v = v
            spike = node(x)
            return node.v, spike

        v, spikes = run(step, v0, xs)
        loss = v.sum() + spikes.sum() + (node.v**2).sum()
        return torch.autograd.grad(loss, [v0, node.leak])

    same(make, capture)


def test_a_y_that_is_also_left_has_its_gradient():
    kept = {}

    def step(h, _):
        h = torch.sin(h)
        kept["aux"] = h.square().sum()
        return h, kept["aux"]

    def make(run):
        h0 = start()
        run(step, h0)
        return torch.autograd.grad(kept["aux"], [h0])

    same(make)


def test_a_potential_that_is_not_the_carry_is_refused():
    node = Neuron()
    node.v = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(StepError, match="node'.v"):
        scanned(lambda h, x: (h + node(h), None), start())


def test_a_loop_leaves_nothing_behind_either():
    kept = {}

    def step(carry):
        h, count = carry
        kept["aux"] = h.sum()
        return torch.sin(h), count + 1

    init = start(), torch.zeros((), dtype=torch.int64)
    with pytest.raises(StepError, match=r"closure variable 'kept'\['aux'\]"):
        lt.while_loop(lambda carry: carry[1] < STEPS, step, init, memory="64KiB")


def test_tracers_that_a_jax_step_leaves_behind_are_refused_by_jax():
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp

    import longtape.jax as lj

    kept = []

    def step(h, _):
        kept.append(h.sum())
        return jnp.sin(h), None

    def loss(h):
        h, _ = lj.scan(step, h, None, length=STEPS, memory="64KiB")
        return h.sum() + kept[-1]

    with pytest.raises(jax.errors.UnexpectedTracerError):
        jax.grad(loss)(jnp.ones(4))
