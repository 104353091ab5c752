"""Several ranks that time, plan and recover by themselves are refused, unless the caller says they are independent."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from models import Chaotic, store_everything

from longtape import Sweep, UsageError
from longtape.pyrevolve import Checkpoint, MemoryRevolver, Operator


def mpi4py(ranks: int, *, running: bool = True) -> tuple[str, Any]:
    return "mpi4py.MPI", SimpleNamespace(
        Is_initialized=lambda: running,
        Is_finalized=lambda: False,
        COMM_WORLD=SimpleNamespace(Get_size=lambda: ranks),
    )


def torch_distributed(ranks: int, *, running: bool = True) -> tuple[str, Any]:
    return "torch.distributed", SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: running, get_world_size=lambda: ranks
    )


def devito_mpi(mode: Any) -> tuple[str, Any]:
    return "devito", SimpleNamespace(configuration={"mpi": mode})


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this session runs under is not seen."""
    for name in ("mpi4py.MPI", "torch.distributed", "devito", "jax", "jax._src.xla_bridge"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def sweeps(**options: Any) -> bytes:
    model = Chaotic()
    with Sweep(model, 20, memory="1KiB", **options) as sweep:
        sweep.forward()
        model.start_adjoint()
        sweep.reverse()
    return model.result()


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (mpi4py(4), "MPI runs 4 ranks"),
        (torch_distributed(2), r"torch\.distributed runs 2 ranks"),
        (devito_mpi("diag2"), "Devito's MPI"),
    ],
)
def test_several_ranks_are_refused_before_a_step_is_run(
    alone: None, monkeypatch: pytest.MonkeyPatch, module: tuple[str, Any], named: str
) -> None:
    monkeypatch.setitem(sys.modules, *module)
    model = Chaotic()
    with pytest.raises(UsageError, match=named) as caught:
        Sweep(model, 20, memory="1KiB")
    assert "independent=True" in str(caught.value)
    assert model.advanced == 0
    assert sweeps(independent=True) == store_everything(20)


@pytest.mark.parametrize(
    "module",
    [
        mpi4py(1),
        mpi4py(4, running=False),
        torch_distributed(1),
        torch_distributed(2, running=False),
        devito_mpi(False),
    ],
)
def test_a_single_rank_is_not(alone: None, monkeypatch: pytest.MonkeyPatch, module: tuple[str, Any]) -> None:
    monkeypatch.setitem(sys.modules, *module)
    assert sweeps() == store_everything(20)


def test_devito_with_mpi_on_a_single_rank_is_not(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, *mpi4py(1))
    monkeypatch.setitem(sys.modules, *devito_mpi("basic"))
    assert sweeps() == store_everything(20)


def test_processes_of_jax_are_counted_once_its_backend_is_up(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    up = False
    counted = []
    jax = SimpleNamespace(process_count=lambda: counted.append(1) or 8)
    monkeypatch.setitem(sys.modules, "jax", jax)
    monkeypatch.setitem(sys.modules, "jax._src.xla_bridge", SimpleNamespace(backends_are_initialized=lambda: up))
    sweeps()
    assert not counted  # which would have started the backend
    up = True
    with pytest.raises(UsageError, match="JAX runs 8 processes"):
        sweeps()


def test_the_backend_of_jax_is_asked_by_its_name() -> None:
    pytest.importorskip("jax")
    from jax._src import xla_bridge

    assert callable(xla_bridge.backends_are_initialized)


WITH_A_LIBRARY = """
import ctypes, os, sys
sys.path.insert(0, "tests")
from models import Chaotic
import longtape
ctypes.CDLL(sys.argv[1])
try:
    longtape.Sweep(Chaotic(), 20, memory="1KiB").close()
except longtape.UsageError as error:
    print(error)
"""


@pytest.mark.parametrize(("initialised", "ranks"), [(1, 3), (1, 1), (0, 3)])
def test_mpi_that_only_a_library_has_initialised_is_seen(tmp_path: Path, initialised: int, ranks: int) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    source, target = tmp_path / "mpi.c", tmp_path / "libmpi.so.40"
    source.write_text(f"int MPI_Initialized(int *flag) {{ *flag = {initialised}; return 0; }}")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(target), str(source)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", WITH_A_LIBRARY, str(target)],
        env={**os.environ, "OMPI_COMM_WORLD_SIZE": str(ranks)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("MPI runs 3 ranks") == (initialised == 1 and ranks == 3), done.stdout


# Every front end ----------------------------------------------------------------------------------


def torch_scan(**options: Any) -> None:
    torch = pytest.importorskip("torch")
    import longtape.torch as lt

    weight = torch.ones(3, requires_grad=True)
    carry, _ = lt.scan(lambda c, x: (c * weight, None), torch.ones(3), torch.ones(8, 1), memory="1MiB", **options)
    carry.sum().backward()


def torch_while(**options: Any) -> None:
    torch = pytest.importorskip("torch")
    import longtape.torch as lt

    weight = torch.ones(3, requires_grad=True)
    carry = lt.while_loop(
        lambda c: bool(c[0] < 5), lambda c: c + weight, torch.ones(3), memory="1MiB", capture=False, **options
    )
    carry.sum().backward()


def jax_scan(**options: Any) -> None:
    jax = pytest.importorskip("jax")
    import longtape.jax as lj

    def loss(start: Any) -> Any:
        return lj.scan(lambda c, x: (c * 1.5, None), start, None, length=8, memory="1MiB", **options)[0].sum()

    jax.grad(loss)(jax.numpy.ones(3))


def jax_while(**options: Any) -> None:
    jax = pytest.importorskip("jax")
    import longtape.jax as lj

    def loss(start: Any) -> Any:
        return lj.while_loop(lambda c: c[0] < 5, lambda c: c * 1.5, start, memory="1MiB", **options).sum()

    jax.grad(loss)(jax.numpy.ones(3))


def revolver(**options: Any) -> None:
    import numpy as np

    live = np.ones(4)

    class Live(Checkpoint):
        def get_data(self, timestep: int) -> list[Any]:
            return [live]

    class Steps(Operator):
        def apply(self, **times: Any) -> None:
            live.__imul__(1.5)

    class Nothing(Operator):
        def apply(self, **times: Any) -> None:
            pass

    made = MemoryRevolver(Live(), Steps(), Nothing(), 4, 8, **options)
    made.apply_forward()
    made.apply_reverse()


@pytest.mark.parametrize("front_end", [torch_scan, torch_while, jax_scan, jax_while, revolver])
def test_every_front_end_refuses_and_takes_the_option(
    monkeypatch: pytest.MonkeyPatch, front_end: Callable[..., None]
) -> None:
    front_end()
    monkeypatch.setitem(sys.modules, *mpi4py(2))
    with pytest.raises(UsageError, match="independent=True"):
        front_end()
    front_end(independent=True)


def test_a_plain_loop_stores_nothing_and_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    import longtape.torch as lt

    monkeypatch.setitem(sys.modules, *mpi4py(2))
    carry, _ = lt.scan(lambda c, x: (2 * c, None), torch.ones(3), torch.ones(8, 1), memory="1MiB")
    assert carry.tolist() == [256.0] * 3


def test_devito_names_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    devito = pytest.importorskip("devito")
    import longtape.devito

    monkeypatch.setitem(devito.configuration, "mpi", "basic")
    with pytest.raises(UsageError, match="Devito's MPI is on"):
        longtape.devito.Sweep(None, None, [object()], memory="1MiB")
    with pytest.raises(UsageError, match="TimeFunctions"):
        longtape.devito.Sweep(None, None, [], memory="1MiB", independent=True)


RANK = """
import sys, torch
import torch.distributed as dist
import longtape, longtape.torch as lt
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
weight = torch.full((3,), 1.5, requires_grad=True)
def step(carry, x):
    return carry * weight, None
def scan(**options):
    return lt.scan(step, torch.ones(3), torch.ones(8, 1), memory="1MiB", **options)[0].sum()
try:
    scan()
except longtape.UsageError as error:
    assert "torch.distributed runs 2 ranks" in str(error), error
else:
    sys.exit("it was not refused")
scan(independent=True).backward()
assert torch.allclose(weight.grad, torch.tensor(8 * 1.5**7)), weight.grad
dist.destroy_process_group()
print("done")
"""


def test_two_real_ranks(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path / "meeting"), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        said, _ = rank.communicate(timeout=120)
        assert said.strip().endswith("done"), said
