"""The sweep in the search: real rules of forgetting, and anything may be due at any time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any, NamedTuple

from coordinator.events import AbortRequested, Event
from coordinator.members.base import Beat, InFlight
from coordinator.model import Branch, MemberId, TransactionId, id_floor
from coordinator.protocol import Phase
from tests.exhaustive.bounds import (
    ABSENCE_LIMIT_MS,
    IDS,
    OLD_MS,
    RETENTION_MS,
    YOUNG_MS,
    Bounds,
    Parts,
)
from tests.exhaustive.delivering import Deliveries
from tests.exhaustive.state import (
    ABORTED,
    COMMITTED,
    PREPARED,
    QUARANTINED,
    TOLD_COMMITTED,
    Draft,
    State,
)
from tests.simulation.checkers import Violation

FOUND = AbortRequested("found by recovery")

Label = tuple[Any, ...]


class Stage(NamedTuple):
    """Where a sweep stands, and what it remembers of what it saw.

    `flights` is what the members published when the round began, `missed` the resources that could
    not be reached, `clears` what the others were found clear of.
    """

    kind: str = "idle"
    old: bool = False
    flights: tuple[InFlight, ...] = ()
    scanned: tuple[str, ...] = ()
    missed: tuple[str, ...] = ()
    seen: tuple[int, ...] = ()
    transaction: int = 0
    core: int = -1
    clears: tuple[tuple[str, TransactionId], ...] = ()
    candidate: TransactionId = TransactionId("")


IDLE = Stage()


class Sweeping(Deliveries):
    """The sweepers' side of the world."""

    def __init__(self, bounds: Bounds, parts: Parts = Parts()) -> None:  # noqa: B008
        super().__init__(bounds, parts)
        self.resources = tuple(dict.fromkeys(branch.participant for branch in self.branches))
        self.stages = [IDLE]
        self._stage_numbers = {IDLE: 0}
        self.last: Label = ("begins",)
        last = len(self.transactions)
        self.horizons = [id_floor(0), *map(self.horizon_above, range(last))]
        self.everything_forgotten = self.horizons[-1]

    def note(self, *label: Any) -> Label:
        """What is about to happen, kept for the trace of a violation in it."""
        self.last = label
        return label

    def stage_number(self, stage: Stage) -> int:
        number = self._stage_numbers.setdefault(stage, len(self.stages))
        if number == len(self.stages):
            self.stages.append(stage)
        return number

    def sweep_steps(
        self, state: State, stage: Stage, sender: int
    ) -> Iterator[tuple[Stage, str, Draft]]:
        self.note("sweeps", sender - self.originals, stage.kind)
        if stage.kind == "idle" and self.bounds.rules:
            flights = tuple(self.flights(state))
            yield Stage("scan", state.late, flights=flights), "begins a round", Draft(state)
        elif stage.kind == "idle":
            for seen in self.glimpses(state):
                yield from self._judge(state, stage._replace(seen=seen), sender)
        elif stage.kind == "scan":
            yield from self.scans(state, stage, sender)
        elif stage.kind == "look":
            yield self._look(state, stage)
        elif stage.kind == "swept":
            yield self._publish_clear(state, stage)
        elif stage.kind == "candidate":
            candidate = self._candidate(state, stage)
            yield Stage("raise", candidate=candidate), "computes the horizon", Draft(state)
        elif stage.kind == "raise":
            draft = Draft(state)
            to = stage.candidate
            self.change_log(draft, ("raise", to), lambda log: log.raise_horizon(to))
            yield IDLE, "raises the horizon", draft

    def scans(self, state: State, stage: Stage, sender: int) -> Iterator[tuple[Stage, str, Draft]]:
        left = [each for each in self.resources if each not in stage.scanned]
        for resource in left:
            found = self.listed(state, resource)
            following = stage._replace(
                kind="scan",
                scanned=tuple(sorted((*stage.scanned, resource))),
                seen=tuple(sorted((*stage.seen, *found))),
            )
            yield following, f"scans {resource}", Draft(state)
            if self.bounds.rules:
                missed = tuple(sorted((*stage.missed, resource)))
                following = following._replace(seen=stage.seen, missed=missed)
                yield following, f"cannot reach {resource}", Draft(state)
        if not left:
            yield from self._judge(state, stage, sender)

    def glimpses(self, state: State) -> Iterator[tuple[int, ...]]:
        """All that a round may have seen, which scanned each resource some time before now.

        What is or was prepared may have been seen; what is prepared now may have been missed.
        """
        open_to = [n for n, at in enumerate(state.branches) if at in (PREPARED, COMMITTED, ABORTED)]
        for size in range(len(open_to) + 1):
            yield from combinations(open_to, size)

    def listed(self, state: State, resource: str) -> list[int]:
        """The branches that a scan of a resource finds and that wait for no person."""
        return [
            place
            for place, branch in enumerate(self.branches)
            if state.branches[place] == PREPARED and branch.participant == resource
        ]

    def _judge(self, state: State, stage: Stage, sender: int) -> Iterator[tuple[Stage, str, Draft]]:
        """Anything may be due: `coordinator.sweep.Watch` only says when somebody should try."""
        records = self.logs.views[state.log].records
        clears: tuple[tuple[str, TransactionId], ...] = ()
        if self.bounds.rules:
            clears = self._clears(stage, records)
        due = False
        for transaction, record in enumerate(records):
            seen = [n for n in stage.seen if self.places[n].transaction == transaction]
            if not seen and (record is None or record.finished):
                continue
            due = True
            draft = Draft(state)
            number = self.recovers(draft, sender, transaction, seen)
            following = Stage(
                "drive",
                stage.old,
                seen=tuple(seen),
                transaction=transaction,
                core=number,
                clears=clears,
            )
            yield self.follow(draft, sender, following), "recovers", draft
        if not due and self.bounds.rules:
            yield self.house(state.log, Stage(old=stage.old, clears=clears)), "rests", Draft(state)

    def recovers(self, draft: Draft, sender: int, transaction: int, seen: list[int]) -> int:
        """A core for a transaction that was found, told to abort."""
        branches = [self.found(place) for place in seen]
        core = self.parts.transaction.in_doubt(IDS[transaction], branches)
        number, actions = self.cores.step(self.cores.number(core), FOUND)
        self.send_all(draft, sender, transaction, actions)
        return number

    def found(self, place: int) -> Branch:
        branch = self.branches[place]
        return Branch(branch.xid, branch.participant, b"xid8")

    def sweep_hears(self, draft: Draft, sweeper: int, event: Event) -> None:
        stage = self.stages[draft.sweepers[sweeper]]
        core, actions = self.cores.step(stage.core, event)
        sender = self.originals + sweeper
        self.send_all(draft, sender, stage.transaction, actions)
        stage = self.follow(draft, sender, stage._replace(core=core))
        draft.sweepers[sweeper] = self.stage_number(stage)

    def sweep_misses(self, draft: Draft, sweeper: int) -> None:
        """Its patience is for one try: it goes on with what it hears, and comes again."""
        stage = self.stages[draft.sweepers[sweeper]]
        stage = self.follow(draft, self.originals + sweeper, stage)
        draft.sweepers[sweeper] = self.stage_number(stage)

    def follow(self, draft: Draft, sender: int, stage: Stage) -> Stage:
        """The stage after a step of a sweep's core."""
        if self.waits(draft, sender):
            return stage
        if self.cores.cores[stage.core].phase is Phase.UNKNOWN and stage.seen:
            return stage._replace(kind="look", core=-1)
        return self.house(draft.log, stage)

    def _look(self, state: State, stage: Stage) -> tuple[Stage, str, Draft]:
        """After a refusal another look at each branch; what is still there is shown to a person."""
        draft = Draft(state)
        place, rest = stage.seen[0], stage.seen[1:]
        if self.is_still_there(state, place):
            self.quarantine(draft, place)
        following = stage._replace(seen=rest) if rest else self.house(draft.log, stage)
        return following, f"looks at {self.places[place].name} again", draft

    def is_still_there(self, state: State, place: int) -> bool:
        return state.branches[place] in (PREPARED, QUARANTINED)

    def quarantine(self, draft: Draft, place: int) -> None:
        transaction, name = self.places[place].transaction, self.places[place].name
        if draft.branches[place] not in (PREPARED, QUARANTINED):
            raise Violation("I7", f"{name} was quarantined although it had ended before")
        if self.bounds.rules:
            raise Violation("I7", f"{name} was quarantined without need")
        committed = COMMITTED in self.writers(draft, transaction)
        told = draft.told[transaction] == TOLD_COMMITTED
        if self.accepted(draft, place) and (committed or told):
            raise Violation("I9", f"{name} was forgotten although its transaction committed")
        draft.branches[place] = QUARANTINED

    # Forgetting by the rules of `coordinator.sweep`.

    def house(self, log: int, stage: Stage) -> Stage:
        """What a round does last: nothing without rules, and nothing when all is forgotten."""
        forgotten = self.logs.registers[log].horizon >= self.everything_forgotten
        if not self.bounds.rules or forgotten:
            return IDLE
        return Stage("swept", stage.old, clears=stage.clears)

    def flights(self, state: State) -> Iterator[InFlight]:
        """What living originals publish of what they drive."""
        for original, core in enumerate(state.originals):
            if core >= 0:
                phase = self.cores.cores[core].phase
                yield InFlight(IDS[self.bounds.drives[original]], 0.0, phase.value)

    def _alive(self, flights: tuple[InFlight, ...], old: bool) -> dict[MemberId, Beat]:
        beat = Beat(OLD_MS if old else YOUNG_MS, 1, flights)
        return {MemberId("20" * 8): beat}

    def _clears(self, stage: Stage, records: Any) -> tuple[tuple[str, TransactionId], ...]:
        known = {record.transaction: record for record in records if record is not None}
        return tuple(
            (
                resource,
                self.parts.clear_mark(
                    scan_began_ms=OLD_MS if stage.old else YOUNG_MS,
                    retention_ms=RETENTION_MS,
                    alive=self._alive(stage.flights, stage.old),
                    seen=[
                        self.found(place)
                        for place in stage.seen
                        if self.branches[place].participant == resource
                    ],
                    records=known,
                ),
            )
            for resource in self.resources
            if resource not in stage.missed
        )

    def _publish_clear(self, state: State, stage: Stage) -> tuple[Stage, str, Draft]:
        draft = Draft(state)
        swept_ms = OLD_MS if stage.old else YOUNG_MS

        def publish(log: Any) -> None:
            for resource, clear in stage.clears:
                log.swept(resource, clear, swept_ms)

        self.change_log(draft, ("swept", stage.clears, swept_ms), publish)
        return Stage("candidate", stage.old), "publishes what it saw clear", draft

    def _candidate(self, state: State, stage: Stage) -> TransactionId:
        now_ms = OLD_MS if state.late else YOUNG_MS
        candidate: TransactionId = self.parts.horizon_candidate(
            retention_ms=RETENTION_MS,
            absence_limit_ms=ABSENCE_LIMIT_MS,
            now_ms=OLD_MS if stage.old else YOUNG_MS,
            alive=self._alive(tuple(self.flights(state)), state.late),
            newest_seen=id_floor(now_ms),
            resources=self.logs.registers[state.log].resources(),
        )
        return candidate
