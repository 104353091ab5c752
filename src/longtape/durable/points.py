"""What the records of a journal say: where a run was, and where its items lie.

Owns the meaning of records and the checks that stand between a file and what is made of
it.  No I/O.

A journal holds one record "begin", and then a record "point" for every moment from which
the run can be gone on with.  A point tells what has changed since the one before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from math import inf
from typing import Any

import numpy as np

from longtape.actions import Key, Kind
from longtape.durable import sense
from longtape.durable.journal import Record
from longtape.errors import DamagedBlock
from longtape.plan.choose import Choice
from longtape.plan.costs import Costs
from longtape.plan.predict import Prediction
from longtape.tiers.block import CODES, KINDS
from longtape.tiers.named import Place

FORMAT = 2
"""Of the journal and of the blocks; a run of another format is refused."""

_COLUMNS = 6
_GONE = -1


class OddRecord(ValueError):
    """A sound record that cannot be believed; the message is the end of a sentence about the journal."""


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
    written: list[str]
    """Names of what was no part of it after all, for the steps themselves change it."""
    witness: dict[str, Any] | None
    """The number of a state near the beginning, and a hash for each of its leaves."""
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
    return {"what": "begin", "format": FORMAT, "version": _version(), **known}


def _version() -> str:
    return str(getattr(sys.modules.get("longtape"), "__version__", "unknown"))


def read_begin(record: Record) -> Begin:
    """What `begin_header` was given.

    Raises:
        OddRecord: It is of another version, or says what cannot be.
    """
    header = dict(record.header)
    what, found, version = header.pop("what", None), header.pop("format", None), header.pop("version", "before 0.2")
    if what != "begin" or type(found) is not int or found != FORMAT:
        raise OddRecord(
            f"is of format {found!r}, written by Longtape {version}, and this is Longtape {_version()}, which goes on "
            f"with format {FORMAT}; finish it with the version that began it"
        )
    try:
        choice = dict(header.pop("choice"))
        prediction = Prediction(**choice.pop("prediction"))
        costs = {name: inf if value is None else value for name, value in _costs(header.pop("costs"))}
        begin = Begin(
            run_id=record.run_id,
            extra=record.payload,
            choice=Choice(**{**choice, "alternatives": ()}, prediction=prediction),
            costs=Costs(**costs),
            **header,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OddRecord(
            f"was written by Longtape {version}, and this is Longtape {_version()}, which does not know what it says "
            f"({error}); finish it with the version that began it"
        ) from None
    fault = sense.of_plan(begin.choice, begin.costs, begin.steps) or _fault(begin)
    if fault is not None:
        raise OddRecord(f"says {fault}, which cannot be")
    return begin


def _fault(begin: Any) -> str | None:
    """What makes no sense beside the plan; of fields of any types."""
    if not _is_text(begin.fingerprint) or not isinstance(begin.written, list) or not isinstance(begin.title, str):
        return "other than text in its title or its fingerprint"
    witness = begin.witness
    if witness is not None:
        known = isinstance(witness, dict) and sorted(witness) == ["leaves", "state"] and _is_text(witness["leaves"])
        if not known or not sense.is_count(witness["state"], most=begin.steps) or not witness["state"]:
            return f"that its witness is {witness!r:.60}"
    if not sense.is_amount(begin.created) or not sense.is_count(begin.block) or not begin.block:
        return f"that it was begun at {begin.created!r:.60}, on a disk with blocks of {begin.block!r:.60} bytes"
    return None


def _is_text(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(text, str) for text in found.values())


def _costs(found: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Only what was infinite is None in the text, or was None: those two it cannot be confused in."""
    return [(name, value) for name, value in found.items() if value is not None or name.endswith("per_second")]


def point_header(
    point: Point,
    *,
    anew: bool = False,
    adjoint: Stretch | None = None,
    rows: Stretch | None = None,
    bars: Stretch | None = None,
    standing: Stretch | None = None,
) -> dict[str, Any]:
    """The JSON part of a record: what has changed in it, not all that holds; `anew`: the reverse sweep began again."""
    return {
        "what": "point",
        "reached": point.reached,
        "turned": point.turned,
        "seed": point.seed,
        "anew": anew,
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


def read_point(records: Iterable[Record], begin: Begin, *, most: int) -> Point:
    """What the points after each other come to.

    Args:
        records: Those after "begin".
        begin: Of the run.
        most: How many items the scratch file can hold, twice over, for new ones are entered before old ones go.

    Raises:
        OddRecord: A record is of another version, or says what cannot be.
        DamagedBlock: The records name more than `most`, so the scratch file has lost its end.
    """
    point, parts = Point(), 0
    for record in records:
        apply_header(point, record)
        fault = sense.of_point(point, begin.steps, begin.choice.window)
        if fault is not None:
            raise OddRecord(f"says {fault}, which cannot be")
        parts += _parts_of(record)
        if parts > most:  # of the adjoints only the last one counts
            parts = point.parts
        if parts > most or not _apply_items(point, record.payload, most):
            raise DamagedBlock(f"the journal names more items than the scratch file can hold ({most // 2:,})")
    fault = sense.of_items(point, begin.steps, begin.choice.window, begin.block)
    if fault is not None:
        raise OddRecord(f"says {fault}, which cannot be")
    return point


def _parts_of(record: Record) -> int:
    """How many parts a record adds, at most."""
    found = [record.header.get(name) for name in ("adjoint", "rows", "bars", "standing")]
    return sum(stretch["count"] for stretch in found if stretch)


def apply_header(point: Point, record: Record) -> None:
    """Where the run was, without its items.

    Raises:
        OddRecord: It is no such record.
    """
    header = dict(record.header)
    what = header.pop("what", None)
    if what != "point" or sorted(header) != _POINT_NAMES:
        strange = sorted({*header} ^ {*_POINT_NAMES})
        raise OddRecord(
            f"has a record {what!r:.40} whose fields this Longtape ({_version()}) does not know: {strange!r:.80}; "
            "finish it with the version that wrote it"
        )
    reached, turned, seed, anew = header["reached"], header["turned"], header["seed"], header["anew"]
    if not sense.is_count(reached) or not isinstance(turned, bool) or not isinstance(anew, bool):
        raise OddRecord(f"says that step {reached!r:.60} was reached, and turned {turned!r:.20}, which cannot be")
    if not (seed is None or isinstance(seed, str)):
        raise OddRecord(f"says that the adjoint began with {seed!r:.60}, which cannot be")
    adjoint, rows, bars, standing = (_stretch(header[name]) for name in ("adjoint", "rows", "bars", "standing"))
    if seed != point.seed or anew:
        point.adjoint, point.bars = None, []
    point.reached, point.turned, point.seed = reached, turned, seed
    point.adjoint = adjoint or point.adjoint
    point.standing = standing or point.standing
    point.rows += [rows] if rows else []
    point.bars += [bars] if bars else []
    point.count += 1


def _apply_items(point: Point, payload: bytes | bytearray, most: int) -> bool:
    """Items come and go; False as soon as there are more than `most`."""
    if len(payload) % (8 * _COLUMNS):
        raise OddRecord("has a table of items that is cut off, which cannot be")
    items = point.items
    for row in np.frombuffer(payload, "<i8").reshape(-1, _COLUMNS):
        code, step, reserved, written, offset, sequence = row.tolist()
        if code not in KINDS or not all(map(sense.is_count, (step, reserved, offset, sequence))):
            raise OddRecord(f"has an item {row.tolist()} in its table, which cannot be")
        key = Key(KINDS[code], step)
        if written == _GONE:
            items.pop(key, None)
        elif not 0 <= written <= reserved:
            raise OddRecord(f"says that {written} of {reserved} bytes of {key} were written, which cannot be")
        else:
            items[key] = Place(key, reserved, written, offset, sequence)
            if len(items) > most:
                return False
    return True


def _stretch(found: Any) -> Stretch | None:
    """A stretch, None where there is none.  Raises `OddRecord`."""
    if found is None:
        return None
    known = isinstance(found, dict) and sorted(found) == _STRETCH_NAMES
    if known and all(map(sense.is_count, found.values())) and found["count"]:
        return Stretch(**found)
    raise OddRecord(f"says that parts of it are {found!r:.100}, which cannot be")


_POINT_NAMES = sorted(["reached", "turned", "seed", "anew", "adjoint", "rows", "bars", "standing"])
_STRETCH_NAMES = sorted(f.name for f in fields(Stretch))
