"""An executor that runs nothing and allows nothing but what the rules of checkpoint_schedules allow."""

from checkpoint_schedules import Copy, EndForward, EndReverse, Forward, Move, Reverse, StorageType

RAM, DISK, WORK, NONE = StorageType.RAM, StorageType.DISK, StorageType.WORK, StorageType.NONE


def judge(schedule, steps, *, ram, disk=None):
    """Follow an offline schedule to its end; every rule is an assertion.

    A forward action stores at most one snapshot, of the state it starts from; adjoint
    dependencies live in WORK, those of one reverse action at a time.

    Returns:
        Forward steps run, and the most snapshots in RAM and on disk.
    """
    assert schedule.n == 0
    assert schedule.r == 0
    assert schedule.max_n == steps
    forward, taken, ended = 0, 0, False
    snapshots = {RAM: set(), DISK: set()}
    limits = {RAM: ram, DISK: disk}
    taped, ran, peaks = set(), 0, {RAM: 0, DISK: 0}
    while True:
        action = next(schedule)
        adjoint = steps - taken
        if isinstance(action, Forward):
            assert forward == action.n0 < action.n1 <= adjoint
            assert ended or action.n0 >= ran  # the forward calculation runs each step once
            if action.write_ics:
                assert schedule.uses_storage_type(action.storage)
                assert all(action.n0 not in there for there in snapshots.values())
                snapshots[action.storage].add(action.n0)
            if action.write_adj_deps:
                assert action.storage is WORK
                assert not taped
                taped.update(range(action.n0, action.n1))
            if not action.write_ics and not action.write_adj_deps:
                assert action.storage is WORK
            forward, ran = action.n1, ran + action.n1 - action.n0
        elif isinstance(action, Reverse):
            assert ended
            assert action.n1 == adjoint
            assert action.n0 < action.n1
            assert set(range(action.n0, action.n1)) <= taped
            taken += action.n1 - action.n0
            if action.clear_adj_deps:
                taped.clear()
        elif isinstance(action, (Copy, Move)):
            assert ended, "nothing is read while the forward calculation is taped"
            assert action.n in snapshots[action.from_storage]
            if action.to_storage is WORK:
                assert action.n < adjoint
                assert not taped
                forward = action.n
            else:
                assert isinstance(action, Move)
                assert action.to_storage is NONE
            if isinstance(action, Move):
                snapshots[action.from_storage].remove(action.n)
        elif isinstance(action, EndForward):
            assert not ended
            assert forward == steps
            assert ran == steps
            ended = True
        elif isinstance(action, EndReverse):
            assert taken == steps
            break
        else:
            raise AssertionError(f"no action of that vocabulary: {action!r}")
        assert schedule.n == forward
        assert schedule.r == taken
        for storage, kept in snapshots.items():
            peaks[storage] = max(peaks[storage], len(kept))
            assert limits[storage] is None or len(kept) <= limits[storage]
    assert schedule.is_exhausted
    assert not any(snapshots.values())
    assert not taped
    assert next(schedule, None) is None
    return ran, peaks[RAM], peaks[DISK]
