"""Something is edited between two processes of a resumable run: another run is refused, and by name.

A program of each front end is made from a text and some values.  It is stopped somewhere, a value or
two are changed, and it is called again: that must give the gradient of the program as it is now, or
end in a `ResumeError` that names what was changed.  A program in which nothing was changed must go on
where it was.
"""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import tempfile
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import longtape
from longtape.plan.costs import Costs

STEPS = 40
CONTROLS = 6
"""Of so many cases one is without an edit."""

Values = dict[str, Any]
Draw = Callable[[random.Random], Any]


class Stop(Exception):
    """A run is given up."""


class Stopper:
    """An observer that stops a run after so many actions; None: never."""

    def __init__(self, after: int | None) -> None:
        self.left = after

    def on_action(self, action: Any, began: float, ended: float) -> None:
        if self.left is not None:
            time.sleep(3e-4)
            self.left -= 1
            if self.left <= 0:
                raise Stop

    def on_transfer(self, *_: Any) -> None:
        pass


@dataclass(frozen=True)
class Front:
    """A program that can be edited."""

    values: dict[str, Draw]
    """By name: draws a value; drawn again, another one."""
    named: dict[str, str]
    """What a refusal must say where this was edited; the name itself where it is left out."""
    run: Callable[..., tuple[bytes, Any]]
    """Of values, a directory or None, and an observer: the bits of the gradient, and a report if there is one."""
    actions: int = 100
    """Stop within so many."""
    cache: dict[str, bytes] = field(default_factory=dict)

    def draw(self, chance: random.Random) -> Values:
        return {name: draw(chance) for name, draw in self.values.items()}

    def edited(self, values: Values, chance: random.Random) -> tuple[Values, list[str]]:
        """The values with one or two of them changed, and which."""
        names = chance.sample(list(self.values), chance.choice([1, 1, 2]))
        changed = dict(values)
        for name in names:
            while repr(changed[name]) == repr(values[name]):
                changed[name] = self.values[name](chance)
        return changed, names


# Values -------------------------------------------------------------------------------------------


def number(chance: random.Random) -> float:
    return round(chance.uniform(0.5, 1.5), 3)


def numbers(chance: random.Random) -> list[float]:
    return [number(chance) for _ in range(4)]


def names(chance: random.Random) -> list[str]:
    return sorted(chance.sample(["sin", "cos", "tanh", "exp"], 2))


def body(chance: random.Random) -> str:
    return chance.choice(["x * k", "x + k", "x - k", "k * x * 0.5", "x * k * 0.9"])


def flag(chance: random.Random) -> bool:
    return chance.random() < 0.5


def seed(chance: random.Random) -> int:
    return chance.randrange(1000)


def _made(text: str, values: Values) -> dict[str, Any]:
    """The names of a program, its values filled in."""
    for name, value in values.items():
        text = text.replace(f"<{name}>", str(value) if name == "helper" else repr(value))
    module = sys.modules["edited"] = types.ModuleType("edited")  # which dataclasses look for
    try:
        exec(compile(text, "edited.py", "exec"), module.__dict__)
    finally:
        del sys.modules["edited"]
    return module.__dict__


def _report(told: list[Any]) -> Any:
    """What a hook was told: a report, or with older versions the run that has it."""
    return getattr(told[0], "report", told[0]) if told else None


COMMON = """
import numpy as np
from dataclasses import dataclass

gain = <gain>
table = frozenset(<table>)
limits = {"low": <low>, "high": 2.0}

def helper(x, k=<default>):
    return <helper>

def twice(x):
    return helper(x) + helper(x, k=0.25)

@dataclass
class Options:
    rate: float = <rate>

def extra():
    found = 0.0
    for name, value in (("sin", 0.1), ("cos", 0.2), ("tanh", 0.3), ("exp", 0.4)):
        if name in table:
            found += value
    return found * limits["low"]
"""
VALUES: dict[str, Draw] = {
    "gain": number, "table": names, "low": number, "default": number, "helper": body, "rate": number,
    "scale": number, "closed": numbers, "level": number, "shadow": lambda c: c.choice([None, number(c)]),
    "initial": numbers,
}  # fmt: skip
NAMED = {"helper": "helper", "default": "defaults of helper", "low": "limits", "initial": "initial"}


# Sweep --------------------------------------------------------------------------------------------

SWEEP = (
    COMMON
    + """
class Model:
    level = <level>

    def __init__(self, scale, closed):
        self.state = [np.array(<initial>)]
        self.adjoint = [np.zeros(4), np.zeros(1)]
        self.options = Options()
        self.mask = np.array(<mask>)
        self.work = np.full(4, np.random.random())
        self.count = 0
        def boost(x):
            return x * scale + closed
        self.boost = boost
        shadow = <shadow>
        if shadow is not None:
            self.nudge = lambda x: x * shadow

    def nudge(self, x):
        return x

    def slope(self, x):
        return np.cos(x * gain) * self.options.rate * 0.3

    def advance(self, start, stop):
        for step in range(start, stop):
            x = self.state[0]
            self.work[:] = self.nudge(self.boost(x)) * 0.1 + extra() + self.level
            x[:] = 0.3 * np.sin(twice(x) * 0.2 + self.work * self.mask + gain * 0.1)
            self.count += 1

    def reverse(self, start, stop):
        self.adjoint[0] *= self.slope(self.state[0])
        self.adjoint[1] += self.adjoint[0].sum() * self.level
"""
)


def _sweep(values: Values, directory: str | None, stopper: Stopper) -> tuple[bytes, Any]:
    made = _made(SWEEP, values)
    model = made["Model"](values["scale"], np.array(values["closed"]))
    speed = 32 / 2e-3
    costs = Costs(1e-3, 2e-3, write_bytes_per_second=speed, read_bytes_per_second=speed)
    options: dict[str, Any] = {"resume": directory, "resume_seconds": 1e-6} if directory else {}
    with longtape.Sweep(model, STEPS, memory=5 * 32, costs=costs, observers=[stopper], **options) as sweep:
        sweep.forward()
        model.adjoint[0][:] = model.state[0]
        sweep.reverse()
    return b"".join(array.tobytes() for array in model.adjoint), sweep.report


SWEEP_FRONT = Front(
    {**VALUES, "mask": numbers},
    {**NAMED, "shadow": "nudge", "initial": "initial state", "closed": "closed"},
    _sweep,
    120,
)


# PyTorch ------------------------------------------------------------------------------------------

TORCH = (
    COMMON
    + """
import torch
from torch import nn

class Cell(nn.Module):
    level = <level>

    def __init__(self):
        super().__init__()
        torch.manual_seed(<weights>)
        self.inner = nn.Linear(4, 4)
        self.register_buffer("mask", torch.tensor(<mask>))
        self.frozen = nn.Parameter(torch.tensor(<frozen>), requires_grad=<frozen_wanted>)
        self.options = Options()
        shadow = <shadow>
        if shadow is not None:
            self.nudge = lambda x: x * shadow
        self.train(<training>)

    def nudge(self, x):
        return x

    def forward(self, x):
        found = self.nudge(self.inner(x)) * self.mask * self.options.rate + self.frozen * self.level
        return found * 1.1 if self.training else found

def make(scale, closed):
    cell = Cell()
    weight = torch.tensor(<free>)
    def step(carry, x):
        h = torch.tanh(0.3 * twice(cell(carry)) * scale + x * weight + gain * 0.1)
        h = h * 0.5 + extra() + torch.from_numpy(closed) * 0.1
        return h, h.sum() * gain
    return step, cell
"""
)


class _Lazy:
    """Inputs that are made when they are read."""

    def __init__(self, of: int, odd: int) -> None:
        self.of, self.odd = of, odd

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: int) -> Any:
        import torch

        found = torch.sin(torch.arange(4.0) + self.of + step)
        return found + 1.0 if step == self.odd else found


def _torch(capture: bool) -> Callable[..., tuple[bytes, Any]]:
    def run(values: Values, directory: str | None, stopper: Stopper) -> tuple[bytes, Any]:
        import torch

        from longtape.torch import scan

        torch.set_num_threads(1)
        made = _made(TORCH, values)
        step, cell = made["make"](values["scale"], np.array(values["closed"], np.float32))
        init = torch.tensor(values["initial"]).requires_grad_(values["init_wanted"])
        xs: Any = _Lazy(values["xs"], values["odd_x"])
        if not values["lazy"]:
            xs = torch.stack([xs[k] for k in range(STEPS)]).requires_grad_(values["xs_wanted"])
        told: list[Any] = []
        options: dict[str, Any] = {"resume": directory, "resume_seconds": 1e-6} if directory else {}
        carry, ys = scan(
            step, init, xs, memory=4000 if capture else 120, capture=capture, observers=[stopper],
            on_report=told.append, **options,
        )  # fmt: skip
        wanted = [*cell.parameters(), init, *([] if values["lazy"] else [xs])]
        wanted = [tensor for tensor in wanted if tensor.requires_grad]
        found = torch.autograd.grad(carry.sum() + (ys**2).mean(), wanted)
        bits = b"".join(tensor.detach().numpy().tobytes() for tensor in [carry, ys, *found])
        return bits, _report(told)

    return run


TORCH_VALUES = {
    **VALUES, "weights": seed, "mask": numbers, "frozen": numbers, "frozen_wanted": flag, "training": flag,
    "free": numbers, "xs": seed, "odd_x": lambda c: c.randrange(STEPS), "lazy": flag, "init_wanted": flag,
    "xs_wanted": flag,
}  # fmt: skip
TORCH_NAMED = {
    **NAMED, "shadow": "nudge", "weights": "inner", "frozen_wanted": "gradient", "free": "weight", "odd_x": "xs",
    "lazy": "xs", "init_wanted": "gradient", "xs_wanted": "gradient", "initial": "initial carry",
}  # fmt: skip
EAGER_FRONT = Front(TORCH_VALUES, TORCH_NAMED, _torch(capture=False), 120)
CAPTURED_FRONT = Front(TORCH_VALUES, TORCH_NAMED, _torch(capture=True), 50)


# JAX ----------------------------------------------------------------------------------------------

JAX = (
    COMMON
    + """
import jax
import jax.numpy as jnp

level = <level>
notes = np.array(<notes>, np.float32)

def host(x, k=<host_default>):
    return np.asarray(x * k + notes * level, np.float32)

@jax.custom_vjp
def ruled(x):
    return jnp.sin(x)

ruled.defvjp(lambda x: (jnp.sin(x), x), lambda x, bar: (<shadow_rule> * bar * jnp.cos(x),))

@jax.custom_vjp
def called(x):
    return jax.pure_callback(host, jax.ShapeDtypeStruct((4,), jnp.float32), x)

called.defvjp(lambda x: (called(x), None), lambda _, bar: (bar,))

def make(scale, closed):
    weight = jnp.asarray(closed, jnp.float32)
    options = Options()
    def step(carry, x):
        h = 0.3 * ruled(twice(carry) * scale + x * weight * options.rate + gain * 0.1)
        h = h + extra() + called(h) * 0.1
        return h, h.sum() * gain
    return step
"""
)


def _jax(values: Values, directory: str | None, stopper: Stopper) -> tuple[bytes, Any]:
    import jax
    import jax.numpy as jnp

    import longtape.jax as lt

    made = _made(JAX, {**values, "shadow_rule": values["shadow"] or 1.0})
    step = made["make"](values["scale"], values["closed"])
    init = jnp.array(values["initial"], jnp.float32)
    xs = jnp.sin(jnp.arange(4.0)[None] + values["xs"] + jnp.arange(float(STEPS))[:, None])
    told: list[Any] = []
    speed = 16 / 2e-3
    costs = Costs(1e-3, 2e-3, 1.1e-3, 1e-3, write_bytes_per_second=speed, read_bytes_per_second=speed)
    options: dict[str, Any] = {"resume": directory, "resume_seconds": 1e-6} if directory else {}

    def loss(init: Any, xs: Any) -> Any:
        carry, ys = lt.scan(
            step, init, xs, memory=400, costs=costs, observers=[stopper], on_report=told.append, **options
        )
        return carry.sum() + (ys**2).mean()

    bars = jax.grad(loss, argnums=(0, 1) if values["xs_wanted"] else 0)(init, xs)
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(bars)), _report(told)


JAX_VALUES = {**VALUES, "notes": numbers, "host_default": number, "xs": seed, "xs_wanted": flag}
_PROGRAM = ("gain", "table", "low", "default", "helper", "rate", "scale")
JAX_NAMED = {
    **dict.fromkeys(_PROGRAM, "step"), "shadow": "adjoint of the step", "closed": "parameters",
    "host_default": "defaults of host", "xs_wanted": "gradient", "initial": "initial carry",
}  # fmt: skip
JAX_FRONT = Front(JAX_VALUES, JAX_NAMED, _jax, 120)

FRONTS = {"sweep": SWEEP_FRONT, "eager": EAGER_FRONT, "captured": CAPTURED_FRONT, "jax": JAX_FRONT}


# The campaign -------------------------------------------------------------------------------------


def edits(count: int, chance: random.Random) -> dict[str, Any]:
    """Random edits, `count` for each front end."""
    found = {name: tally(front, count, chance) for name, front in FRONTS.items()}
    wrong = {name: seen["wrong"] for name, seen in found.items() if seen["wrong"]}
    assert not wrong, wrong
    return {"edits": {name: seen["edits"] for name, seen in found.items()}, "wrong": 0, "by_front_end": found}


def tally(front: Front, count: int, chance: random.Random) -> dict[str, Any]:
    """What became of so many edits, and of some programs that were not edited."""
    outcomes: Counter[str] = Counter()
    controls: Counter[str] = Counter()
    wrong: list[str] = []
    while outcomes.total() < count:
        values, after = front.draw(chance), chance.randint(8, front.actions)
        is_control = (outcomes.total() + controls.total()) % CONTROLS == 0 and controls.total() * CONTROLS < count
        changed, edited = (values, []) if is_control else front.edited(values, chance)
        try:
            found = attempt(front, values, changed, edited, after)
        except Exception as error:
            error.add_note(f"{values} after {after} actions; edited: {edited}")
            raise
        if found is None:
            continue  # it came to its end before it was stopped
        if found.startswith("wrong"):
            wrong.append(f"{found}: {', '.join(f'{name} {values[name]} → {changed[name]}' for name in edited)}")
        (controls if is_control else outcomes)[found.partition(":")[0]] += 1
    return {"edits": outcomes.total(), "outcomes": dict(outcomes), "controls": dict(controls), "wrong": wrong}


def attempt(front: Front, values: Values, changed: Values, edited: list[str], after: int) -> str | None:
    """Stop a program and call it again, edited; how that ends."""
    with tempfile.TemporaryDirectory() as there, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            front.run(values, there, Stopper(after))
        except Stop:
            pass
        else:
            return None
        gc.collect()
        expected, _ = front.run(changed, None, Stopper(None))
        try:
            bits, report = front.run(changed, there, Stopper(None))
        except longtape.ResumeError as error:
            missing = [name for name in edited if front.named.get(name, name) not in str(error)]
            if not edited:
                return f"wrong, refused without an edit: {error}"
            return f"wrong, refused without naming {missing}: {error}" if missing == edited else "refused by name"
    if bits != expected:
        return "wrong, a gradient of neither"
    return "the right bits, gone on with" if report and report.resumed_from else "the right bits, begun anew"


def main() -> None:
    """Tally only, whatever the outcome; for holding another version against this one."""
    import json

    chance = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    found = {}
    for name, front in FRONTS.items():
        with contextlib.suppress(ImportError):
            found[name] = tally(front, int(sys.argv[1]), chance)
            found[name]["wrong"] = found[name]["wrong"][:5]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
