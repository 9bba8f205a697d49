"""Planted bugs that the search must find, each with the search that finds it.

Those of the simulation that replace the core, the register or the rules of the horizon serve here
as they are; `OTHERS` are mistakes around them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from msgspec import structs

from coordinator.events import (
    AbortRequested,
    Decide,
    Decided,
    Enlisted,
    Event,
    Finished,
    Voted,
)
from coordinator.log.base import Record, Stands
from coordinator.model import ABORT, Branch
from coordinator.protocol import Phase, Transaction
from tests.exhaustive.bounds import OTHER_LOG, SMALL, Bounds, Parts
from tests.exhaustive.delivering import Served
from tests.exhaustive.moves import Searched
from tests.exhaustive.search import Found, search
from tests.exhaustive.state import PREPARED, Draft, Mail, State
from tests.exhaustive.sweeping import Stage
from tests.simulation.bugs import BY_NAME
from tests.simulation.planting import mutant, without
from tests.simulation.world import REAL

ABORT_STANDS = Decided(ABORT)


class Planted(NamedTuple):
    """A bug, the rule that it breaks, and where it shows."""

    name: str
    rule: str
    bounds: Bounds
    parts: Parts = Parts()
    world: type[Searched] = Searched

    def find(self) -> Found:
        return search(self.world(self.bounds, self.parts))


def _shared(name: str, bounds: Bounds) -> Planted:
    bug = BY_NAME[name]
    pure = Parts(*(getattr(bug.parts, part) for part in Parts._fields))
    return Planted(name, bug.rule, bounds, pure)


TWO = SMALL["two branches"]
FEW = TWO._replace(reads=False, faults=0)
FORGETTING = SMALL["forgetting by the rules"]._replace(faults=0, sweep_crashes=0)

SHARED = (
    _shared("commit-before-decision", TWO),
    _shared("refused-is-abort", TWO),
    _shared("deadline-rolls-back", TWO),
    _shared("last-writer-wins", TWO),
    _shared("horizon-falls", TWO),
    _shared("forget-unfinished", TWO),
    _shared("forget-above-horizon", TWO),
    _shared("first-vote-decides", TWO),
    _shared("no-counts-as-reading", TWO),
    _shared("readers-end-early", TWO),
    _shared("tokens-lost", TWO),
    _shared("mark-before-end", TWO),
    _shared("handed-abort-unrecorded", SMALL["votes handed on"]),
    _shared("one-phase-published", SMALL["one phase"]),
    _shared("delegation-beside", SMALL["a last resource"]),
    _shared("answer-unrecorded", SMALL["a last resource"]),
    _shared("commit-all-prepared", SMALL["a called service"]),
    _shared("clear-marks-ignored", FORGETTING),
)


# The core and the rules of the horizon.


def _names_too_little(self: Any) -> list[Any]:
    return [
        structs.replace(
            action,
            decision=structs.replace(action.decision, branches=action.decision.branches[1:]),
        )
        if isinstance(action, Decide)
        else action
        for action in Transaction._all_voted(self)
    ]


def _roll_back_at_once(self: Any, event: Event) -> list[Any]:
    return self._roll_back()  # type: ignore[no-any-return]


def _say_nothing(self: Any, event: Event) -> list[Any]:
    return []


def _clear_up_to_the_scan(**seen: Any) -> Any:
    return REAL.clear_mark(**{**seen, "retention_ms": 0, "alive": {}})


# Around them.


class _ErrorIsAbort(Searched):
    def miss(self, draft: Draft, mail: Mail) -> None:
        if mail.sender < self.originals and isinstance(mail.what, Decide):
            self.feed(draft, mail.sender, ABORT_STANDS)
        else:
            super().miss(draft, mail)


class _AbsentIsAbort(Searched):
    def recovers(self, draft: Draft, sender: int, transaction: int, seen: list[int]) -> int:
        if self.logs.views[draft.log].records[transaction] is not None:
            return super().recovers(draft, sender, transaction, seen)
        branches = [self.found(place) for place in seen]
        core = self.parts.transaction.in_doubt(self.transactions[transaction], branches)
        core.phase = Phase.ABORT_PROPOSED
        number, actions = self.cores.step(self.cores.number(core), ABORT_STANDS)
        self.send_all(draft, sender, transaction, actions)
        return number


class _QuarantinesUnseen(Searched):
    def is_still_there(self, state: State, place: int) -> bool:
        return True


class _NeverSweeps(Searched):
    def sweep_steps(
        self, state: State, stage: Stage, sender: int
    ) -> Iterator[tuple[Stage, str, Draft]]:
        return iter(())


class _IgnoresRefusal(Searched):
    def quarantine(self, draft: Draft, place: int) -> None:
        """Nobody is told."""


class _SeesAllLogs(Searched):
    """Another log's branch lies in the same resource, under an id like ours."""

    def found(self, place: int) -> Any:
        branch = super().found(place)
        xid = structs.replace(branch.xid, log=OTHER_LOG)
        return structs.replace(branch, xid=xid)


class _EnlistsEveryAnswer(Searched):
    def enlist_remote(self, draft: Draft, mail: Mail, answer: Any) -> None:
        core = draft.originals[mail.sender]
        if core >= 0 and self.cores.cores[core].phase is Phase.ACTIVE:
            draft.answered = self.place_of[answer.branch]
            self.feed(draft, mail.sender, Enlisted(self.branches[draft.answered], answer.vote))


class _DerivesNames(Searched):
    """The repeat of a request prepares under the name of the first one."""

    def __init__(self, bounds: Bounds, parts: Parts) -> None:
        super().__init__(bounds, parts)
        local, first, _ = self.branches
        self.branches = (local, first, first)
        self.place_of = {local.id: 0, first.id: 1}

    def place(self, draft: Draft, branch: Branch) -> int:
        number = super().place(draft, branch)
        return 2 if number == 1 and draft.branches[2] == PREPARED else number

    def glimpses(self, state: State) -> Iterator[tuple[int, ...]]:
        return (seen for seen in super().glimpses(state) if not {1, 2} <= set(seen))


class _MovesByLease(Searched):
    def settle(self, draft: Draft, mail: Mail) -> Served:
        yield draft, Stands(Record(mail.what.former, ABORT), ours=True)


def _mutated(**methods: Any) -> Parts:
    return Parts(transaction=mutant(**methods))


OTHERS = (
    Planted(
        "names-too-little",
        "a commit names every branch that promised",
        TWO,
        _mutated(_all_voted=_names_too_little),
    ),
    Planted(
        "recovery-presumes-abort",
        "recovery records abort, and obeys what stands",
        TWO,
        _mutated(rules={(Phase.IN_DOUBT, AbortRequested): _roll_back_at_once}),
    ),
    Planted(
        "disobeys-what-stands",
        "everybody obeys what stands",
        TWO,
        _mutated(rules={(Phase.ABORT_PROPOSED, Decided): _roll_back_at_once}),
    ),
    Planted(
        "never-ends",
        "everything ends",
        FEW,
        _mutated(rules={(Phase.COMMITTING, Finished): _say_nothing}),
    ),
    Planted(
        "a-hole-in-the-table",
        "every event that can happen is legal",
        TWO,
        Parts(transaction=without((Phase.ROLLING_BACK, Voted))),
    ),
    Planted(
        "young-counts-as-clear",
        "a scan is clear only of what can prepare no more",
        FORGETTING,
        Parts(clear_mark=_clear_up_to_the_scan),
    ),
    Planted(
        "error-is-abort",
        "an error of the log is indefinite",
        TWO,
        world=_ErrorIsAbort,
    ),
    Planted(
        "absent-is-abort",
        "nothing recorded is no permission to roll back",
        TWO,
        world=_AbsentIsAbort,
    ),
    Planted(
        "quarantine-unseen",
        "after a refusal the branch is looked at again",
        TWO,
        world=_QuarantinesUnseen,
    ),
    Planted(
        "refusal-ignored",
        "what the log has forgotten is shown to a person",
        FEW,
        world=_IgnoresRefusal,
    ),
    Planted("no-sweep", "the sweep is part of the protocol", FEW, world=_NeverSweeps),
    Planted(
        "any-log",
        "a sweep acts only on its own log's branches",
        TWO,
        world=_SeesAllLogs,
    ),
    Planted(
        "every-answer-enlisted",
        "an answer to a request that was given up is dropped",
        SMALL["a called service"],
        world=_EnlistsEveryAnswer,
    ),
    Planted(
        "names-derived",
        "a branch id is drawn at random for every attempt, and never derived",
        SMALL["a called service"]._replace(faults=1),
        world=_DerivesNames,
    ),
    Planted(
        "key-by-lease",
        "the next attempt waits for a recorded abort",
        SMALL["two attempts under a key"],
        world=_MovesByLease,
    ),
)

PLANTED = (*SHARED, *OTHERS)
