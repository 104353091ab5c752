"""What the records of a journal say: where a run was, and where its items lie.

Owns the meaning of records and the checks that stand between a file and what is made of
it.  No I/O.

A journal holds one record "begin", and then a record "point" for every moment from which
the run can be gone on with.  A point tells what has changed since the one before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from math import inf
from typing import Any

import numpy as np

from longtape.actions import Key, Kind
from longtape.durable.journal import Record
from longtape.errors import DamagedBlock
from longtape.plan.choose import Choice
from longtape.plan.costs import Costs
from longtape.plan.predict import Prediction
from longtape.tiers.block import CODES, KINDS
from longtape.tiers.named import Place

FORMAT = 1
"""Of the journal and of the blocks; a run of another format is refused."""

_COLUMNS = 6
_GONE = -1


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutively numbered parts, and the steps they are of."""

    first: int
    count: int
    start: int
    stop: int

    def names(self) -> list[Key]:
        """The keys of the parts."""
        return [Key(Kind.PARTS, self.first + k) for k in range(self.count)]


@dataclass(slots=True)
class Point:
    """The moment to go on from."""

    reached: int = 0
    """The forward sweep was at this step, or N if it had turned."""
    turned: bool = False
    adjoint: Stretch | None = None
    """The adjoint at step `start`; None: the reverse sweep has no durable point yet."""
    seed: str | None = None
    """Fingerprint of the adjoint at the end, from which `adjoint` was computed."""
    rows: list[Stretch] = field(default_factory=list)
    """What the forward sweep has produced."""
    bars: list[Stretch] = field(default_factory=list)
    """What the reverse sweep has produced."""
    standing: Stretch | None = None
    """What the forward sweep updates beside the state, as it stood at `reached`."""
    items: dict[Key, Place] = field(default_factory=dict)
    count: int = 0
    """How many points there were."""

    @property
    def stretches(self) -> list[Stretch]:
        """All that it names."""
        return [*self.rows, *self.bars, *(stretch for stretch in (self.adjoint, self.standing) if stretch)]

    @property
    def parts(self) -> int:
        """How many parts its stretches name."""
        return sum(stretch.count for stretch in self.stretches)


@dataclass(frozen=True, slots=True)
class Begin:
    """What a run is."""

    run_id: bytes
    fingerprint: dict[str, str]
    front: dict[str, Any]
    """What the front end wants to know again."""
    extra: bytes | bytearray
    choice: Choice
    costs: Costs
    title: str
    steps: int
    block: int
    created: float


def begin_header(begin: Begin) -> dict[str, Any]:
    """The record that opens a journal; `Begin.extra` is its payload."""
    known = {f.name: getattr(begin, f.name) for f in fields(begin)}
    del known["run_id"], known["extra"]
    known["choice"] = {**asdict(begin.choice), "alternatives": []}
    known["costs"] = {name: None if value == inf else value for name, value in asdict(begin.costs).items()}
    return {"what": "begin", "format": FORMAT, **known}


def read_begin(record: Record) -> Begin | None:
    """What `begin_header` was given; None where the record is no such one."""
    try:
        header = dict(record.header)
        if header.pop("what") != "begin" or header.pop("format") != FORMAT:
            return None
        choice = dict(header.pop("choice"))
        prediction = Prediction(**choice.pop("prediction"))
        costs = {name: inf if value is None else float(value) for name, value in _costs(header.pop("costs"))}
        begin = Begin(
            run_id=record.run_id,
            extra=record.payload,
            choice=Choice(**{**choice, "alternatives": ()}, prediction=prediction),
            costs=Costs(**costs),
            **header,
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    choice_is_sane = all(
        isinstance(value, int) and 0 <= value < 1 << 40
        for value in (begin.choice.window, begin.choice.slots, begin.choice.blocks, begin.steps)
    )
    texts = [*begin.fingerprint.keys(), *begin.fingerprint.values()] if isinstance(begin.fingerprint, dict) else [0]
    sane = choice_is_sane and isinstance(begin.front, dict) and all(isinstance(text, str) for text in texts)
    return begin if sane and begin.choice.window > 0 and begin.choice.slots > 0 else None


def _costs(found: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Only what was infinite is None in the text, or was None: those two it cannot be confused in."""
    return [(name, value) for name, value in found.items() if value is not None or name.endswith("per_second")]


def point_header(
    point: Point,
    *,
    adjoint: Stretch | None = None,
    rows: Stretch | None = None,
    bars: Stretch | None = None,
    standing: Stretch | None = None,
) -> dict[str, Any]:
    """The JSON part of a record: what has changed in it, not all that holds."""
    return {
        "what": "point",
        "reached": point.reached,
        "turned": point.turned,
        "seed": point.seed,
        "adjoint": None if adjoint is None else asdict(adjoint),
        "rows": None if rows is None else asdict(rows),
        "bars": None if bars is None else asdict(bars),
        "standing": None if standing is None else asdict(standing),
    }


def items_payload(there: Iterable[tuple[Key, Place]], gone: Iterable[Key]) -> bytes:
    """The items that are new, and those that are no more, as bytes."""
    table = [(CODES[k.kind], k.step, p.reserved, p.written, p.offset, p.sequence) for k, p in there]
    table += [(CODES[k.kind], k.step, 0, _GONE, 0, 0) for k in gone]
    return np.array(table, "<i8").reshape(-1, _COLUMNS).tobytes()


def read_point(records: Iterable[Record], *, most: int) -> Point:
    """What the points after each other come to; a record that makes no sense ends them.

    Args:
        records: Those after "begin".
        most: How many items the scratch file can hold, twice over, for new ones are entered before old ones go.

    Raises:
        DamagedBlock: The records name more; nothing of them can be believed.
    """
    point, parts = Point(), 0
    for record in records:
        if len(record.payload) % (8 * _COLUMNS) or not apply_header(point, record):
            break
        parts += _parts_of(record)
        if parts > most:  # of the adjoints only the last one counts
            parts = point.parts
        if parts > most or not _apply_items(point, record.payload, most):
            raise DamagedBlock(f"the journal names more items than the scratch file can hold ({most // 2:,})")
    return point


def _parts_of(record: Record) -> int:
    """How many parts a record adds, at most."""
    found = [record.header.get(name) for name in ("adjoint", "rows", "bars", "standing")]
    return sum(stretch["count"] for stretch in found if stretch)


def apply_header(point: Point, record: Record) -> bool:
    """Where the run was, without its items; False, and nothing is changed, if the record makes no sense."""
    header = record.header
    if header.get("what") != "point":
        return False
    reached: Any = header.get("reached")
    turned, seed = header.get("turned"), header.get("seed")
    stretches = [_stretch(header.get(name)) for name in ("adjoint", "rows", "bars", "standing")]
    if not _is_count(reached) or not isinstance(turned, bool) or not (seed is None or isinstance(seed, str)):
        return False
    if any(stretch is False for stretch in stretches):
        return False
    adjoint, rows, bars, standing = stretches
    if seed != point.seed:
        point.adjoint, point.bars = None, []
    point.reached, point.turned, point.seed = reached, turned, seed
    point.adjoint = adjoint or point.adjoint  # type: ignore[assignment]
    point.standing = standing or point.standing  # type: ignore[assignment]
    point.rows += [rows] if rows else []  # type: ignore[list-item]
    point.bars += [bars] if bars else []  # type: ignore[list-item]
    point.count += 1
    return True


def _apply_items(point: Point, payload: bytes | bytearray, most: int) -> bool:
    """Items come and go; False as soon as there are more than `most`."""
    items = point.items
    for row in np.frombuffer(payload, "<i8").reshape(-1, _COLUMNS):
        code, step, reserved, written, offset, sequence = row.tolist()
        if code not in KINDS:
            continue
        key = Key(KINDS[code], step)
        if written == _GONE:
            items.pop(key, None)
        elif all(map(_is_count, (step, reserved, written, offset, sequence))):
            items[key] = Place(key, reserved, written, offset, sequence)
            if len(items) > most:
                return False
    return True


def _stretch(found: Any) -> Stretch | bool | None:
    """A stretch, None where there is none, False where it makes no sense."""
    if found is None:
        return None
    names = [f.name for f in fields(Stretch)]
    if not isinstance(found, dict) or sorted(found) != sorted(names) or not all(map(_is_count, found.values())):
        return False
    stretch = Stretch(**found)
    return stretch if stretch.count > 0 else False


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
