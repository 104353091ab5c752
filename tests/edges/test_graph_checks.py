"""Captured graphs stand for the step: each is compared with it once; and only lasting failures are remembered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from longtape.torch import scan, while_loop

F64 = torch.float64


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, requires_grad=True)


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are kept for a step's code, which tests share."""
    from longtape.torch import captured

    monkeypatch.setattr(captured, "_kept", OrderedDict())


@pytest.fixture
def misread(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes every graph traced from now on wrong, by taking one operator for another."""
    from longtape.torch import partition

    def begin(change: str) -> None:
        simplify = partition.simplify

        def simplify_wrongly(graph: Any) -> None:
            simplify(graph)
            for node in list(graph.nodes):
                if node.target is torch.ops.aten.sin.default and change == "wrong":
                    node.target = torch.ops.aten.cos.default
                elif node.target is torch.ops.aten.sin.default:
                    with graph.inserting_after(node):
                        nudged = graph.call_function(torch.ops.aten.mul.Tensor, (node, 1.0 + 2.0**-51))
                    nudged.meta.update(node.meta)
                    node.replace_all_uses_with(nudged, lambda user, nudged=nudged: user is not nudged)

        monkeypatch.setattr(partition, "simplify", simplify_wrongly)

    return begin


def outcome(run: Callable[..., Any], step: Any, init: Any, xs: Any, closed: list[Any], **options: Any) -> list[Any]:
    carry, ys = run(step, init, xs, **options)
    return [carry.detach(), *torch.autograd.grad(carry.sum() + ys.sum(), [init, xs, *closed])]


def plain(step: Any, carry: Any, xs: Any) -> Any:
    ys = []
    for x in xs:
        carry, y = step(carry, x)
        ys.append(y)
    return carry, torch.stack(ys)


def notes_of(reports: list[Any]) -> str:
    return " ".join(note for report in reports for note in report.notes)


def make_step(weight: Any, extra: Any) -> Any:
    def step(h: Any, x: Any) -> Any:
        h = torch.sin(h * weight + x)
        if extra is not None:
            h = h * extra
        return h, h.sum()

    return step


@pytest.mark.parametrize("capture", [True, None])
def test_a_graph_of_another_closure_is_compared_too(misread: Any, capture: bool | None) -> None:
    """The first function object has a right graph; a second, of the same code, needs one of its own."""
    weight, extra, init, xs = leaf(3), leaf(3), leaf(3), leaf(260, 3)
    reports: list[Any] = []
    options: Any = {"memory": 1 << 14, "capture": capture, "on_report": reports.append}
    outcome(scan, make_step(weight, None), init, xs, [weight], **options)
    assert not notes_of(reports)
    misread("wrong")
    step = make_step(weight, extra)
    ours = outcome(scan, step, init, xs, [weight, extra], **options)
    theirs = outcome(plain, step, init, xs, [weight, extra])
    assert all(map(torch.allclose, ours, theirs))
    assert "differs from that of the step run as it is" in notes_of(reports)


class Switches:
    """Takes another path from a step on that no argument tells: a flag that the inputs set."""

    def __init__(self, at: int, weight: Any, on_switch: Callable[[], None]) -> None:
        self.at, self.weight, self.on_switch, self.flag = at, weight, on_switch, False

    def __len__(self) -> int:
        return 40

    def __getitem__(self, k: int) -> Any:
        flag = k >= self.at
        if flag and self.on_switch is not None:
            switch, self.on_switch = self.on_switch, None  # type: ignore[assignment]
            switch()
        return torch.full((3 + flag,), 0.1 * k, dtype=F64)


def path_by_shape(weight: Any) -> Any:
    def step(h: Any, x: Any) -> Any:
        if x.shape[0] == 4:
            return torch.sin(h * weight) * x[:3], h.sum()
        return torch.tanh(h * weight) + x, h.sum()

    return step


@pytest.mark.parametrize("at", [1, 7, 39])
@pytest.mark.parametrize("memory", [6000, 1 << 16])
def test_a_graph_that_appears_in_the_middle_is_compared_there(misread: Any, at: int, memory: int) -> None:
    weight, init = leaf(3), leaf(3)
    reports: list[Any] = []
    step = path_by_shape(weight)
    xs = Switches(at, weight, lambda: misread("wrong"))
    carry, ys = scan(step, init, xs, memory=memory, capture=True, on_report=reports.append)
    ours = torch.autograd.grad(carry.sum() + ys.sum(), [init, weight])
    carry, ys = plain(step, init, [xs[k] for k in range(40)])
    theirs = torch.autograd.grad(carry.sum() + ys.sum(), [init, weight])
    assert all(map(torch.allclose, ours, theirs))
    assert f"on step {at}, a leaf of the carry differs" in notes_of(reports)


def test_a_while_loop_s_graphs_are_compared(misread: Any) -> None:
    misread("wrong")
    weight, init = leaf(3), leaf(3)
    reports: list[Any] = []
    carry = while_loop(
        lambda c: c[1] < 30, lambda c: (torch.sin(c[0] * weight), c[1] + 1), (init, torch.tensor(0)),
        memory=1 << 14, capture=True, on_report=reports.append,
    )[0]  # fmt: skip
    h = init
    for _ in range(30):
        h = torch.sin(h * weight)
    ours, theirs = (torch.autograd.grad(end.sum(), [init, weight]) for end in (carry, h))
    assert all(map(torch.allclose, ours, theirs))
    assert "differs" in notes_of(reports)


@pytest.mark.parametrize("capture", [True, None])
def test_a_later_graph_that_rounds_otherwise(misread: Any, capture: bool | None) -> None:
    """Accepted where the user has asked for capture; otherwise the step is run as it is, with its very bits."""
    weight, extra, init, xs = leaf(3), leaf(3), leaf(3), leaf(260, 3)
    reports: list[Any] = []
    options: Any = {"memory": 1 << 14, "capture": capture, "on_report": reports.append}
    outcome(scan, make_step(weight, None), init, xs, [weight], **options)
    misread("rounding")
    step = make_step(weight, extra)
    ours = outcome(scan, step, init, xs, [weight, extra], **options)
    theirs = outcome(plain, step, init, xs, [weight, extra])
    assert torch.equal(ours[0], theirs[0]) == (capture is None)
    assert ("run as it is" if capture is None else "captured, although") in notes_of(reports)
    assert "in the last bits" in notes_of(reports)


def test_comparing_draws_no_random_numbers() -> None:
    weight, init = leaf(3), leaf(3)

    def step(h: Any, x: Any) -> Any:
        noise = torch.rand(3, dtype=F64) if x.shape[0] == 4 else 0.5
        return torch.sin(h * weight) * noise, h.sum()

    xs = Switches(7, weight, lambda: None)
    after = []
    for run in (scan, plain):
        torch.manual_seed(1)
        given: Any = {"memory": 1 << 14, "capture": True} if run is scan else {}
        carry, ys = run(step, init, xs if run is scan else [xs[k] for k in range(40)], **given)
        after.append([*torch.autograd.grad(carry.sum() + ys.sum(), [init, weight]), torch.rand(3)])
    assert all(map(torch.allclose, *after))


def test_each_graph_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from longtape.torch.captured import CapturedSteps

    compared: list[int] = []
    compare = CapturedSteps._compare

    def counting(self: Any, index: int, *given: Any) -> Any:
        compared.append(index)
        return compare(self, index, *given)

    monkeypatch.setattr(CapturedSteps, "_compare", counting)
    weight, init, xs = leaf(3), leaf(3), Switches(7, None, lambda: None)
    for _ in range(2):
        carry, _ = scan(path_by_shape(weight), init, xs, memory=6000, capture=True)
        carry.sum().backward()
    assert compared == [0, 7]


# --- what is remembered -----------------------------------------------------------------------


def captured_notes(step: Any, **options: Any) -> str:
    reports: list[Any] = []
    carry, _ = scan(step, leaf(3), None, 5, memory=1 << 14, capture=True, on_report=reports.append, **options)
    carry.sum().backward()
    return notes_of(reports)


@pytest.mark.parametrize("how", ["config", "stance"])
def test_dynamo_that_is_switched_off_for_a_while(how: str) -> None:
    weight = leaf(3)

    def step(h: Any, _: Any) -> Any:
        return torch.sin(h * weight), None

    from torch._dynamo import config

    off = config.patch(disable=True) if how == "config" else torch.compiler.set_stance("force_eager")
    with off:
        assert "switched off" in captured_notes(step)
    assert not captured_notes(step)
    with config.patch(disable=True):
        assert "switched off" in captured_notes(step)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, OSError, torch.OutOfMemoryError])
def test_what_interrupts_a_capture_is_not_remembered(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    from longtape.torch import capture

    weight = leaf(3)

    def step(h: Any, _: Any) -> Any:
        return torch.sin(h * weight), None

    def fails(*_: Any) -> Any:
        raise error("for now")

    with monkeypatch.context() as patch:
        patch.setattr(capture, "trace", fails)
        if error is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                captured_notes(step)
        else:
            assert "for now" in captured_notes(step)
    assert not captured_notes(step)


def test_an_error_of_the_step_on_its_data_is_its_own_and_not_remembered() -> None:
    weight = [leaf(2)]

    def step(h: Any, _: Any) -> Any:
        return torch.sin(h * weight[0]), None

    def checks(h: Any, _: Any) -> Any:
        if weight[0].shape[0] != 3:
            raise ValueError("a weight of another size")
        return torch.sin(h * weight[0]), None

    with pytest.raises(RuntimeError, match="size of tensor"):
        captured_notes(step)
    with pytest.raises(ValueError, match="another size"):
        captured_notes(checks)
    weight[0] = leaf(3)
    assert not captured_notes(step)
    assert not captured_notes(checks)


def test_a_step_that_cannot_be_captured_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from longtape.torch.capture import CapturedStep

    def step(h: Any, _: Any) -> Any:
        return (torch.sin(h) if h.sum() > 0 else torch.cos(h)), None

    assert "branches" in captured_notes(step)
    monkeypatch.setattr(CapturedStep, "run", None)
    assert "branches" in captured_notes(step)
