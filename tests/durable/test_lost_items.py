"""Whatever of a half-finished reverse sweep is lost on the disk: the gradient is right, or there is none."""

import random
import shutil

import pytest
import torch

from benchmarks.campaigns.resumed import destroy, last_point, resume_damaged
from benchmarks.campaigns.subjects import Subject
from longtape.actions import Kind

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("front", "kind"), [("sweep", "in place"), ("sweep", "out of place"), ("scan", "random"), ("scan", "captured")]
)
def test_each_item_is_lost_while_the_adjoint_is_durable(tmp_path, front, kind):
    subject, half_way, chance = Subject(front, kind), tmp_path / "half-way", random.Random(1)
    subject.half_way(half_way, int(0.75 * subject.actions))
    point = last_point(half_way)
    assert point.adjoint is not None
    assert point.turned
    final = {key for key in point.items if key.kind is Kind.RESTART and key.step == point.reached}
    adjoint = set(point.adjoint.names())
    assert final
    cases = [{key} for key in point.items]
    cases += [final | adjoint, set(point.items) - adjoint, set(point.items) - final, set(point.items)]
    cases += [{key for key in point.items if key.kind is kind} for kind in Kind]
    for lost in cases:
        where = tmp_path / "run"
        shutil.copytree(half_way, where)
        destroy(where, [point.items[key] for key in lost], chance)
        how = resume_damaged(subject, where)
        assert how.startswith("same bits")
        if lost & (final | adjoint):
            assert "fault reported" in how or "anew" in how
        where.rmdir()
