"""The contract of `scan` with the caller and with autograd."""

from __future__ import annotations

import gc
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scan_steps import F64, Case, assert_same, depends_on_data, leaf, loss_of, lstm, plain
from torch import Tensor, nn
from torch.nn import functional as F

from longtape.errors import BudgetError, StateError, StepError, UsageError
from longtape.plan.choose import choose
from longtape.tiers.disk import DiskTier
from longtape.torch import scan

SMALL: dict[str, Any] = {"memory": 240, "capture": False}


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


# --- gradients reach everything -----------------------------------------------------------


def check(case: Case, **options: Any) -> None:
    assert_same(case.outcome(scan, **{**SMALL, **options}), case.outcome(plain))


def test_init_xs_parameters_and_tensors_that_are_no_leaves() -> None:
    base, plain_tensor = leaf(3), leaf(3)
    derived = base * 2
    step = lambda h, x: (torch.tanh(h * derived + x * plain_tensor), h)  # noqa: E731
    init, xs = leaf(3), leaf(6, 3)
    ours = torch.autograd.grad(
        loss_of(scan(step, init, xs, **SMALL)), [init, xs, base, plain_tensor], retain_graph=True
    )
    theirs = torch.autograd.grad(loss_of(plain(step, init, xs)), [init, xs, base, plain_tensor])
    assert_same(list(ours), list(theirs))


@pytest.mark.parametrize("capture", [False, True])
def test_a_tensor_and_another_computed_from_it_are_not_counted_twice(capture: bool) -> None:
    weight = leaf(3, 3)
    product = weight @ weight.T
    row = product[0]
    step = lambda h, x: (torch.tanh(h @ weight + x @ product + row), h)  # noqa: E731
    init, xs = leaf(2, 3), leaf(5, 2, 3)
    ours = torch.autograd.grad(
        loss_of(scan(step, init, xs, memory=20_000, capture=capture)), [init, xs, weight], retain_graph=True
    )
    theirs = torch.autograd.grad(loss_of(plain(step, init, xs)), [init, xs, weight])
    assert_same(list(ours), list(theirs))


def test_a_parameter_first_used_late_is_found_where_nothing_else_requires_a_gradient() -> None:
    late = leaf(2)

    def step(carry: tuple[Tensor, Tensor], _: None) -> tuple[tuple[Tensor, Tensor], Tensor]:
        h, k = carry
        h = h * late if int(k) == 5 else h + 1
        return (h, k + 1), h

    check(Case(step, (torch.ones(2, dtype=F64), torch.tensor(0)), None, 8, [late]))


def test_the_closed_over_tensor_is_the_init_or_an_x_itself() -> None:
    init, xs = leaf(3), leaf(4, 3)
    check(Case(lambda h, x: (torch.sin(h * init + xs[0] * x), None), init, xs))


@pytest.mark.parametrize("which", ["carry", "ys", "both"])
def test_a_loss_may_see_the_carry_the_ys_or_both(which: str) -> None:
    case = lstm()

    def run(using: Any, **options: Any) -> list[Tensor | None]:
        carry, ys = using(case.step, case.init, case.xs, **options)
        seen = {"carry": carry[0], "ys": ys, "both": (carry, ys)}[which]
        return list(torch.autograd.grad(loss_of(seen), case.wanted(), allow_unused=True))

    assert_same(run(scan, **SMALL), run(plain))


def test_backward_accumulates_like_any_other() -> None:
    case = lstm()
    for _ in range(2):
        loss_of(scan(case.step, case.init, case.xs, **SMALL)).backward()
    ours = [tensor.grad for tensor in case.wanted()]
    for tensor in case.wanted():
        tensor.grad = None
    loss_of(plain(case.step, case.init, case.xs)).backward()
    assert_same(ours, [None if tensor.grad is None else 2 * tensor.grad for tensor in case.wanted()])


def test_gradcheck() -> None:
    weight = leaf(2, 2)

    def run(init: Tensor, xs: Tensor, weight: Tensor) -> Any:
        return scan(lambda h, x: (torch.tanh(h @ weight + x), h.sum()), init, xs, **SMALL)

    assert torch.autograd.gradcheck(run, (leaf(2), leaf(5, 2), weight))


def test_going_back_again_runs_the_sweeps_again() -> None:
    case = lstm()
    reports: list[Any] = []
    loss = loss_of(scan(case.step, case.init, case.xs, on_report=reports.append, **SMALL))
    first = torch.autograd.grad(loss, case.wanted(), retain_graph=True)
    again = torch.autograd.grad(loss, case.wanted())
    assert len(reports) == 2
    assert_same(list(again), list(first), exact=True)


def test_scans_feed_each_other_and_share_weights() -> None:
    case = lstm()

    def run(using: Any, **options: Any) -> list[Tensor | None]:
        carry, ys = using(case.step, case.init, case.xs, **options)
        carry, more = using(case.step, carry, ys[:, :, :3] * 2, **options)
        return list(torch.autograd.grad(loss_of(carry, ys, more), case.wanted()))

    assert_same(run(scan, **SMALL), run(plain))


@pytest.mark.parametrize("capture", [False, True])
def test_a_scan_within_a_step(capture: bool) -> None:
    weight, shift = leaf(3), leaf(3)

    def make(using: Any, **options: Any) -> Case:
        def inner(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.sin(h * weight + x), h * shift

        def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            h, ys = using(inner, h, x, **options)
            return h, ys.sum(0)

        torch.manual_seed(1)
        return Case(step, leaf(3), leaf(4, 3, 3), None, [weight, shift])

    ours = make(scan, **SMALL).outcome(scan, memory=10_000, capture=capture)
    assert_same(ours, make(plain).outcome(plain))


def test_no_second_derivatives() -> None:
    init, weight = leaf(2), leaf(2)
    carry, _ = scan(lambda h, _: (torch.sin(h * weight), None), init, length=4, **SMALL)
    first = torch.autograd.grad(carry.sum(), [init, weight], create_graph=True)
    with pytest.raises(StateError, match=r"longtape\.torch\.scan has first derivatives only"):
        torch.autograd.grad(first[0].sum(), [weight], allow_unused=True)


def test_what_create_graph_returns_is_right() -> None:
    case = lstm()
    loss = loss_of(scan(case.step, case.init, case.xs, **SMALL))
    ours = torch.autograd.grad(loss, case.wanted(), create_graph=True)
    theirs = torch.autograd.grad(loss_of(plain(case.step, case.init, case.xs)), case.wanted())
    assert_same([bar.detach() for bar in ours], list(theirs))


# --- carries, xs and ys -----------------------------------------------------------------------


def test_empty_trees_and_none_leaves() -> None:
    weight = leaf(2)
    carry, ys = scan(lambda c, _: (c, {"a": weight * 2, "b": None}), {"x": (), "y": None}, length=3, **SMALL)
    assert carry == {"x": (), "y": None}
    assert ys["b"] is None
    (gradient,) = torch.autograd.grad(ys["a"].sum(), [weight])
    assert torch.equal(gradient, torch.full((2,), 6.0, dtype=F64))


def test_a_carry_with_a_none_and_no_y() -> None:
    check(Case(lambda c, x: ((torch.sin(c[0] + x), None), ()), (leaf(2), None), leaf(4, 2)))


class Limited:
    """Items made when asked for; counts those that live."""

    def __init__(self, count: int) -> None:
        self.count, self.living, self.most = count, 0, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        import weakref

        if not 0 <= index < self.count:
            raise IndexError(index)
        item = torch.full((3,), float(index), dtype=F64)
        self.living += 1
        self.most = max(self.most, self.living)
        weakref.finalize(item, self._gone)
        return item

    def _gone(self) -> None:
        self.living -= 1


@pytest.mark.parametrize("capture", [False, True])
def test_xs_are_read_lazily_and_never_held_whole(capture: bool) -> None:
    weight, init = leaf(3), leaf(3)
    step = lambda h, x: (torch.sin(h * weight + x), h)  # noqa: E731
    xs = Limited(400)
    ours = torch.autograd.grad(loss_of(scan(step, init, xs, memory="24 KiB", capture=capture)), [init, weight])
    assert xs.most < 100
    whole = torch.stack([xs[k] for k in range(400)])
    assert_same(list(ours), list(torch.autograd.grad(loss_of(plain(step, init, whole)), [init, weight])))


def test_xs_may_be_a_memory_map(tmp_path: Path) -> None:
    data = np.memmap(tmp_path / "xs", np.float64, "w+", shape=(6, 2))
    data[:] = np.arange(12).reshape(6, 2) / 12
    init = leaf(2)
    step = lambda h, x: (torch.sin(h * x), h)  # noqa: E731
    ours = torch.autograd.grad(loss_of(scan(step, init, data, **SMALL)), [init])
    theirs = torch.autograd.grad(loss_of(plain(step, init, torch.tensor(np.array(data)))), [init])
    assert_same(list(ours), list(theirs))


def test_xs_that_give_other_values_each_time_are_refused() -> None:
    class Augmented(Limited):
        def __getitem__(self, index: int) -> Tensor:
            return torch.tensor(np.random.rand(3))

    with pytest.raises(UsageError, match="other values when it is read again"):
        scan(lambda h, x: (h * x, None), leaf(3), Augmented(5), **SMALL)


# --- replay -------------------------------------------------------------------------------------


@pytest.mark.parametrize("capture", [False, True])
def test_dropout_is_replayed_exactly(capture: bool) -> None:
    init = leaf(50, dtype=torch.float32)
    step = lambda h, _: (F.dropout(h, 0.3) * 1.5, h)  # noqa: E731
    case = Case(step, init, None, 20)
    options = {"memory": 40_000, "capture": capture}
    assert_same(case.outcome(scan, **options), case.outcome(plain), exact=True)


def test_random_numbers_that_begin_late_are_replayed() -> None:
    def step(carry: tuple[Tensor, Tensor], _: None) -> tuple[tuple[Tensor, Tensor], None]:
        h, k = carry
        return (torch.sin(h * torch.rand(3, dtype=F64)) if int(k) > 4 else h * 2, k + 1), None

    check(Case(step, (leaf(3), torch.tensor(0)), None, 12), memory=12_000)


def test_a_tier_of_the_callers_is_left_empty_and_open_however_often_the_sweeps_begin(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose_storage(problem: Any, costs: Any) -> Any:
        one_by_one = replace(problem, max_window=1, memory_nbytes=3 * problem.state_nbytes)
        return choose(one_by_one, replace(costs, forward=1.0, reverse=1.0))

    monkeypatch.setattr("longtape.compose.choose", choose_storage)

    def step(carry: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Tensor, Tensor], None]:
        h, k = carry
        return (torch.sin(h * torch.rand(3, dtype=F64)) if int(k) > 40 else torch.sin(h + x), k + 1), None

    case = Case(step, (leaf(3), torch.tensor(0)), leaf(90, 3))
    expected = case.outcome(plain)
    with closing(DiskTier(scratch)) as tier:
        for _ in range(2):  # each begins anew when random numbers begin
            reports: list[Any] = []
            options = {"memory": 30_000, "tier": tier, "capture": False, "on_report": reports.append}
            assert_same(case.outcome(scan, **options), expected)
            assert reports[0].writes > 0
            assert tier.bytes_in_use == 0


@pytest.mark.parametrize("capture", [False, True])
def test_autocast_is_replayed_where_backward_is_outside_of_it(capture: bool) -> None:
    layer = nn.Linear(8, 8)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(layer(h) + x).float()
        return h, h.sum()

    init, xs = leaf(2, 8, dtype=torch.float32), leaf(6, 2, 8, dtype=torch.float32)

    def run(using: Any, **options: Any) -> list[Tensor | None]:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            carry, ys = using(step, init, xs, **options)
        return [carry.detach(), ys.detach(), *torch.autograd.grad(loss_of(carry, ys), [init, xs, *layer.parameters()])]

    assert_same(run(scan, memory=9000, capture=capture), run(plain))


# --- where no gradient is wanted ------------------------------------------------------------------


@pytest.mark.parametrize("how", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_without_gradients_nothing_is_stored(how: Any, scratch: Path) -> None:
    seen: list[Any] = []

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((threads(), list(scratch.iterdir())))
        return F.dropout(h + x, 0.5), h

    before = threads()
    with how():
        init, xs = torch.zeros(3), torch.rand(6, 3)
        torch.manual_seed(5)
        carry, ys = scan(step, init, xs, memory=0, disk=scratch, on_plan=lambda plan: pytest.fail("planned"))
        torch.manual_seed(5)
        expected = plain(step, init, xs)
    assert torch.equal(carry, expected[0])
    assert torch.equal(ys, expected[1])
    assert len(seen) == 12
    assert all(entry == (before, []) for entry in seen)


def test_without_gradients_a_step_may_change_what_it_closes_over() -> None:
    norm = nn.BatchNorm1d(3)
    for parameter in norm.parameters():
        parameter.requires_grad_(False)
    scan(lambda h, x: (norm(h + x), None), torch.zeros(4, 3), torch.rand(6, 4, 3), **SMALL)
    assert norm.num_batches_tracked == 6


# --- changes in place -------------------------------------------------------------------------


@pytest.mark.parametrize("capture", [False, True])
def test_a_step_may_update_its_carry_in_place(capture: bool) -> None:
    def step(carry: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        carry["b"] = carry["b"].sin_()
        carry["a"].mul_(0.9).add_(x * carry["b"])
        return carry, carry["a"].sum()

    def safe(carry: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return step({name: part.clone() for name, part in carry.items()}, x)

    init, xs = {"a": leaf(3), "b": leaf(3)}, leaf(9, 3)
    ours = Case(step, init, xs).outcome(scan, memory=5000, capture=capture)
    assert_same(ours, Case(safe, init, xs).outcome(plain))


def test_a_step_that_changes_its_x_is_refused() -> None:
    xs = torch.rand(4, 2, dtype=F64)
    before = xs.clone()
    with pytest.raises(StepError, match="step 0 modifies its input x in place"):
        scan(lambda h, x: (h + x.mul_(2), None), leaf(2), xs, **SMALL)
    assert torch.equal(xs, before)


@pytest.mark.parametrize("capture", [False, True])
def test_a_step_that_changes_what_it_closes_over_is_refused(capture: bool) -> None:
    buffer = torch.zeros(2, dtype=F64)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, None]:
        buffer.add_(1)
        return torch.sin(h * x + buffer), None

    with pytest.raises(StepError, match=r"step 0 modifies a tensor of shape \[2\] that it closes over"):
        scan(step, leaf(2), leaf(4, 2), memory=10_000, capture=capture)
    assert not buffer.any()


def test_a_change_of_a_closed_over_tensor_in_a_later_step_is_refused() -> None:
    buffer = torch.zeros(5, dtype=F64)

    def step(carry: tuple[Tensor, Tensor], _: None) -> tuple[tuple[Tensor, Tensor], None]:
        h, k = carry
        if int(k) == 3:
            buffer[0] = 1
        return (torch.sin(h + buffer), k + 1), None

    with pytest.raises(StepError, match="step 3 modifies a tensor of shape") as caught:
        scan(step, (leaf(5), torch.tensor(0)), length=6, **SMALL)
    assert "longtape: in step 3 of the scan" in caught.value.__notes__


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_refused_in_training_and_allowed_in_evaluation(momentum: float | None) -> None:
    norm = nn.BatchNorm1d(3, momentum=momentum).double()
    step = lambda h, x: (norm(h + x), None)  # noqa: E731
    with pytest.raises(StepError, match=r"\.eval\(\)"):
        scan(step, leaf(4, 3), leaf(5, 4, 3), **SMALL)
    mean, var = torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)
    with pytest.raises(StepError, match="native_batch_norm"):
        scan(lambda h, x: (F.batch_norm(h + x, mean, var, training=True), None), leaf(4, 3), leaf(5, 4, 3), **SMALL)
    norm.eval()
    check(Case(step, leaf(4, 3), leaf(5, 4, 3), None, list(norm.parameters())))


def test_a_step_may_change_what_it_has_made() -> None:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        made = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
        made[1] = 5
        room = torch.zeros(2, 3, dtype=F64)
        room[0] = h
        room[1].view(3).add_(x)
        return torch.sin(room.sum(0) * made), room

    check(Case(step, leaf(3), leaf(6, 3)))


class Rows:
    """Copies of the rows of a tensor, each made once."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = [row.clone() for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


def test_a_carry_that_is_an_x_or_shares_memory_is_not_changed_in_place() -> None:
    def gives_x(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y = h.mul_(2).clone()
        return x, y

    xs = torch.rand(4, 2, dtype=F64)
    before = xs.clone()
    with pytest.raises(StepError, match=r"step 1 modifies its input x in place"):
        scan(gives_x, leaf(2), xs, **SMALL)
    assert torch.equal(xs, before)

    with pytest.raises(StepError, match=r"step 1 .* return a clone"):
        scan(gives_x, leaf(2), Rows(xs), **SMALL)
    assert torch.equal(xs, before)

    def aliased(carry: tuple[Tensor, Tensor], _: None) -> tuple[tuple[Tensor, Tensor], None]:
        carry[0].add_(1)
        return (carry[0], carry[0]), None

    with pytest.raises(StepError, match="share memory"):
        scan(aliased, (leaf(2), leaf(2)), length=4, **SMALL)


def test_state_kept_outside_the_carry_is_refused() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.RNNCell(2, 2).double()
            self.hidden: Tensor | None = None

        def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, None]:
            self.hidden = self.cell(x, self.hidden)
            return h + self.hidden, None

    with pytest.raises(StepError, match="hidden.*put it in the carry"):
        scan(Stateful(), leaf(1, 2), leaf(4, 1, 2), **SMALL)


def test_a_table_that_a_step_makes_once_may_be_kept() -> None:
    kept: dict[str, Tensor] = {}

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, None]:
        table = kept.setdefault("table", torch.arange(2, dtype=F64))
        return torch.tanh(h * table + x), None

    check(Case(step, leaf(2), leaf(4, 2)))


def test_steps_that_use_transforms_of_torch_func() -> None:
    layer = nn.Linear(3, 3).double()

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.func.grad(lambda part: torch.tanh(layer(part)).sum())(h)
        return h - 0.1 * slope + x, h

    check(Case(step, leaf(3), leaf(5, 3), None, [layer.weight]), memory=9000)


def test_sparse_gradients() -> None:
    table = nn.Embedding(5, 3, sparse=True).double()
    init, xs = leaf(2, 3), torch.randint(0, 5, (6, 2))

    def run(using: Any, **options: Any) -> list[Tensor | None]:
        carry, _ = using(lambda h, x: (torch.tanh(h + table(x)), None), init, xs, **options)
        return [bar.to_dense() for bar in torch.autograd.grad(carry.sum(), [init, table.weight])]

    assert_same(run(scan, **SMALL), run(plain))


def test_a_generator_of_its_own_is_refused() -> None:
    own = torch.Generator().manual_seed(1)
    with pytest.raises(StepError, match="default generator"):
        scan(lambda h, _: (h * torch.rand(2, generator=own), None), leaf(2), length=4, **SMALL)


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("which", ["init", "weight", "constant"])
def test_changing_what_a_scan_needs_before_backward_is_an_error(which: str, capture: bool) -> None:
    tensors = {"init": leaf(2), "weight": leaf(2), "constant": torch.ones(2, dtype=F64)}
    step = lambda h, _: (torch.sin(h * tensors["weight"] + tensors["constant"]), None)  # noqa: E731
    carry, _ = scan(step, tensors["init"], length=5, memory=10_000, capture=capture)
    with torch.no_grad():
        tensors[which].mul_(2)
    with pytest.raises(UsageError, match=f"{which}.*changed in place"):
        carry.sum().backward()
    del carry
    gc.collect()


def test_changing_a_constant_between_two_backward_passes_is_an_error() -> None:
    constant, init = torch.ones(2, dtype=F64), leaf(2)
    carry, _ = scan(lambda h, _: (torch.sin(h + constant), None), init, length=5, **SMALL)
    carry.sum().backward(retain_graph=True)
    constant.mul_(2)
    with pytest.raises(UsageError, match="constant.*changed in place"):
        carry.sum().backward()


def test_random_numbers_drawn_between_the_sweeps_change_nothing() -> None:
    case = lstm()
    carry, ys = scan(case.step, case.init, case.xs, **SMALL)
    torch.rand(3)
    before = torch.get_rng_state()
    ours = torch.autograd.grad(loss_of(carry, ys), case.wanted())
    assert torch.equal(torch.get_rng_state(), before)
    theirs = torch.autograd.grad(loss_of(plain(case.step, case.init, case.xs)), case.wanted())
    assert_same(list(ours), list(theirs))


def test_the_results_may_be_changed_in_place() -> None:
    case = lstm()
    carry, ys = scan(case.step, case.init, case.xs, **SMALL)
    carry[0].mul_(2)
    ys.mul_(3)
    theirs, their_ys = plain(case.step, case.init, case.xs)
    expected = torch.autograd.grad(loss_of((theirs[0] * 2, theirs[1]), their_ys * 3), case.wanted())
    assert_same(list(torch.autograd.grad(loss_of(carry, ys), case.wanted())), list(expected))


# --- bad input ------------------------------------------------------------------------------------


def test_too_little_memory_says_the_least() -> None:
    with pytest.raises(BudgetError, match="at least 24 B"):
        scan(lambda h, _: (h * 2, None), leaf(3), length=5, memory=23)
    for capture in (False, True):
        check(Case(lambda h, _: (torch.sin(h), None), leaf(3), None, 9), memory=24, capture=capture)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        scan(lambda h, _: (h * 2, None), leaf(3), length=5, memory=100, disk=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("xs", "length", "message"),
    [
        (None, None, "length="),
        (None, -1, "fewer than no steps"),
        (torch.ones(3, 2), 4, "xs has 3 steps"),
        ((torch.ones(3), torch.ones(4)), None, "first dimension"),
        (torch.ones(()), None, "first dimension"),
        (7, None, "pytree of tensors"),
        (None, 2.5, "integer"),
    ],
)
def test_inputs_that_cannot_be_understood(xs: Any, length: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        scan(lambda h, _: (h, None), leaf(2), xs, length, memory=100)


def test_an_init_of_something_else() -> None:
    with pytest.raises(UsageError, match="init leaf 1 is a float"):
        scan(lambda h, _: (h, None), (leaf(2), 1.0), length=2, memory=100)


WRONG = {
    "no pair": (lambda h: h, "must return"),
    "structure": (lambda h: ((h, h), None), "structure"),
    "shape": (lambda h: (h[:1], None), "carry leaf 0"),
    "dtype": (lambda h: (h.float(), None), "carry leaf 0"),
    "no tensor": (lambda h: (1.0, None), "float"),
    "y": (lambda h: (h, h), "y"),
}


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_step_that_breaks_the_contract_midway(wrong: str, capture: bool) -> None:
    broken, message = WRONG[wrong]

    def step(h: Tensor, x: Tensor) -> Any:
        return broken(h) if x.item() == 3 else (torch.sin(h), None)

    with pytest.raises(StepError, match=f"step 3 .*{message}"):
        scan(step, leaf(2), torch.arange(6), memory=2000, capture=capture)


@pytest.mark.parametrize("wrong", [name for name in WRONG if name != "y"])
def test_a_step_that_breaks_the_contract_at_once_when_captured(wrong: str) -> None:
    broken, message = WRONG[wrong]
    with pytest.raises(StepError, match=f"step 0 .*({message}|carry leaf 0)"):
        scan(lambda h, x: broken(h), leaf(2), torch.arange(6), memory=2000, capture=True)


class Failing:
    """Raises at a step, in the forward sweep or when it is run again."""

    def __init__(self, error: BaseException, *, again: bool) -> None:
        self.error, self.again = error, again
        self.armed = threading.Event()  # which a scan does not look into, and so does not set back
        if not again:
            self.armed.set()

    def __call__(self, h: Tensor, x: Tensor) -> tuple[Tensor, None]:
        if self.armed.is_set() and x.item() == 4:
            raise self.error
        return torch.sin(h), None


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt()])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("capture", [False, True])
def test_what_a_step_raises_comes_through(error: BaseException, again: bool, capture: bool, scratch: Path) -> None:
    before, error = threads(), type(error)(*error.args)
    step = Failing(error, again=again)
    with pytest.raises(type(error)) as caught:
        carry, _ = scan(step, leaf(20), torch.arange(9), memory=400, disk=scratch, capture=capture)
        step.armed.set()
        carry.sum().backward()
    assert caught.value is error
    assert threads() == before
    if isinstance(error, Exception):
        assert "longtape: in step 4 of the scan" in error.__notes__
        assert any("reverse sweep" in note for note in error.__notes__) is again


@pytest.mark.parametrize("capture", [False, True])
def test_what_the_first_step_raises_comes_through(capture: bool) -> None:
    def step(h: Tensor, _: None) -> Any:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine") as caught:
        scan(step, leaf(2), length=3, memory=1000, capture=capture)
    assert "longtape: in step 0 of the scan" in caught.value.__notes__


def test_a_graph_that_is_dropped_lets_go_of_threads_and_files(scratch: Path) -> None:
    before = threads()
    carry, _ = scan(lambda h, _: (torch.sin(h), None), leaf(20), length=50, memory=1000, disk=scratch, capture=False)
    assert threads() != before
    del carry
    gc.collect()
    assert threads() == before


def test_a_plan_that_is_refused_by_its_hook_leaves_nothing(scratch: Path) -> None:
    def refuse(plan: Any) -> None:
        raise LookupError

    with pytest.raises(LookupError):
        scan(lambda h, _: (h * 2, None), leaf(3), length=5, memory=100, disk=scratch, on_plan=refuse)


def test_a_fallback_is_told_in_the_report() -> None:
    case, reports = depends_on_data(), []
    carry, _ = scan(case.step, case.init, case.xs, memory=900, capture=True, on_report=reports.append)
    carry.sum().backward()
    (note,) = reports[0].notes
    assert "branches on the values of a tensor" in note
    assert reports[0].measured.peak_memory_bytes <= 900


def test_a_directory_that_cannot_be_written_to() -> None:
    with pytest.raises(UsageError, match="name a directory you can write to"):
        scan(lambda h, _: (h * 2, None), leaf(3), length=5, memory=100, disk="/proc/self")


def test_captured_steps_are_reversed_one_at_a_time_where_the_plan_has_no_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As it is where storage is slow and memory small: a step is then taped in room of its own."""

    def choose_without_blocks(problem: Any, costs: Any) -> Any:
        return choose(replace(problem, residual_nbytes=None), replace(costs, record=None, pull_back=None))

    cell, init, xs = nn.LSTMCell(8, 8), torch.zeros(2, 8, requires_grad=True), torch.randn(300, 2, 8)
    xs.requires_grad_()

    def step(carry: Any, x: Tensor) -> Any:
        h, c = cell(x, carry)
        return (h, c), h.sum()

    def gradients(**options: Any) -> Any:
        reports: list[Any] = []
        (h, _), ys = scan(step, (init, init), xs, on_report=reports.append, **options)
        return torch.autograd.grad(h.sum() + ys.square().sum(), [init, xs, *cell.parameters()]), reports[0]

    theirs, _ = gradients(memory=1 << 28, capture=False)
    monkeypatch.setattr("longtape.compose.choose", choose_without_blocks)
    ours, report = gradients(memory=6_000, capture=True, verify=True)
    assert (report.schedule, report.window, report.notes) == ("revolve", 1, ())
    assert report.steps_taped_again == 300
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
