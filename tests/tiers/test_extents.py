from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from longtape.tiers.extents import Extents

SIZES = st.integers(1, 6)


def test_the_extent_freed_last_is_reused_first() -> None:
    extents = Extents()
    offsets = [extents.append(10) for _ in range(3)]
    assert offsets == [0, 10, 20]
    extents.give_back(0, 10)
    extents.give_back(20, 10)
    assert extents.reuse(5) is None
    assert extents.reuse(10) == 20
    assert extents.reuse(10) == 0
    assert extents.reuse(10) is None
    assert (extents.in_use, extents.peak, extents.end) == (30, 30, 30)


def test_neighbours_are_taken_together_and_the_rest_stays_free() -> None:
    extents = Extents()
    for _ in range(4):
        extents.append(10)
    extents.give_back(10, 10)
    assert extents.carve(15) is None
    extents.give_back(0, 10)
    assert extents.carve(15) == 0
    assert extents.reuse(5) == 15
    assert extents.end == 40


def test_free_extents_at_the_end_lower_it() -> None:
    extents = Extents()
    for _ in range(3):
        extents.append(10)
    extents.give_back(10, 10)
    extents.give_back(20, 10)
    assert extents.carve(99) is None
    assert extents.end == 10
    assert extents.append(20) == 10


class ExtentsAgainstBytes(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.extents = Extents()
        self.taken: dict[int, int] = {}
        self.peak = 0

    def note(self, offset: int, size: int) -> None:
        new = set(range(offset, offset + size))
        for other, length in self.taken.items():
            assert not new & set(range(other, other + length))
        self.taken[offset] = size
        self.peak = max(self.peak, sum(self.taken.values()))

    @rule(size=SIZES)
    def append(self, size: int) -> None:
        end = self.extents.end
        self.note(self.extents.append(size), size)
        assert self.extents.end == end + size

    @rule(size=SIZES)
    def reuse(self, size: int) -> None:
        end = self.extents.end
        if (offset := self.extents.reuse(size)) is not None:
            self.note(offset, size)
        assert self.extents.end == end

    @rule(size=SIZES)
    def carve(self, size: int) -> None:
        holes = set(range(self.extents.end)) - {b for o, n in self.taken.items() for b in range(o, o + n)}
        offset = self.extents.carve(size)
        inner = {b for b in holes if b < self.extents.end}
        fits = any(set(range(b, b + size)) <= inner for b in inner)
        if offset is None:
            assert not fits
        else:
            assert set(range(offset, offset + size)) <= holes
            self.note(offset, size)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.taken)))
        self.extents.give_back(offset, self.taken.pop(offset))

    @invariant()
    def every_byte_is_accounted_for(self) -> None:
        extents = self.extents
        spans = sorted([*self.taken.items(), *((o, n) for n, offsets in extents._free.items() for o in offsets)])
        reached = 0
        for offset, size in spans:
            assert offset == reached
            reached += size
        assert reached == extents.end
        assert extents.in_use == sum(self.taken.values())
        assert extents.peak == self.peak


TestExtentsAgainstBytes = ExtentsAgainstBytes.TestCase
TestExtentsAgainstBytes.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
