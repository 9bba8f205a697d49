"""Planted bugs about servers and time: what a log, a database or a clock does to the rules."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from coordinator.events import Commit
from coordinator.log.base import KeyState
from coordinator.model import FINISHED, Branch, Decision, Ending, Status, Verdict, Vote
from coordinator.protocol import Phase, Transaction
from tests.simulation.bugs_around import EverythingIsDue
from tests.simulation.drivers import Driver
from tests.simulation.keys import Caller
from tests.simulation.logserver import LogServer
from tests.simulation.planting import Bug, mutant
from tests.simulation.processes import Process
from tests.simulation.resources import STRANGER, VOTED_PREPARED, Resource, Slot
from tests.simulation.sweeper import Sweeper
from tests.simulation.world import REAL


def _leaves_the_horizon(register: Any, to: Any) -> None:
    """A restored log begins where its backup stood."""


class _RollsBackWhenRefused(Sweeper):
    def _look_again(self, driver: Driver, branches: list[Branch]) -> None:
        for branch in branches:
            resource = self.world.slots[branch.xid.branch].resource
            request = (branch, self.log, STRANGER)
            self.world.network.call(
                self.process, resource, resource.rollback, request, _nothing, None
            )
        self._case_done()


def _nothing(_: Any, __: Any) -> None:
    """Nobody waits for this answer."""


class _StopsAtDamage(Sweeper):
    def _judge(self) -> None:
        if self.unreadable:
            self._rest()
        else:
            super()._judge()


class _DamageIsAbsence(LogServer):
    def _is_poisoned(self, transaction: Any) -> bool:
        if transaction in self.poisoned:
            self.poisoned.discard(transaction)
            self.register._records.pop(transaction, None)
        return False


class _PromotionUnnoticed(Resource):
    def commit(self, request: Any) -> Ending | None:
        slot = self.slots[request[0].xid.branch]
        return FINISHED if slot.lost else super().commit(request)


class _SilenceIsYes(Driver):
    __slots__ = ()

    def _prepared(self, slot: Slot, vote: Vote | None) -> None:
        super()._prepared(slot, vote or VOTED_PREPARED)


class _LostOnePhaseIsAbort(Driver):
    __slots__ = ()

    def _ask_what_became(self, action: Any) -> None:
        self.out += 1
        self._one_phase(action, Verdict.ABORT)


class _NamesLate(Caller):
    """Works and prepares while its name is still being written."""

    def attempt(self, former: Any) -> None:
        super().attempt(former)
        if hasattr(self, "driver") and self.enlist_all():
            self.process.later(self.plan.work, self.finish)

    def _named(self, _: None, state: KeyState) -> None:
        self.world.checker.attempt_begins(self.key, self.truth)


class _BeginsAnyhow(Process):
    def _is_near_horizon(self, transaction: Any) -> bool:
        return False


def _behind_the_fastest(**seen: Any) -> Any:
    fastest = max([beat.clock_ms for beat in seen["alive"].values()] + [seen["now_ms"]])
    alive = {
        member: structs.replace(beat, clock_ms=fastest) for member, beat in seen["alive"].items()
    }
    return REAL.horizon_candidate(**{**seen, "alive": alive, "now_ms": fastest})


def _forgotten_is_aborted(world: Any, truth: Any, reading: Any) -> Status:
    status = REAL.status(world, truth, reading)
    return Status.ABORTED if status is Status.FORGOTTEN else status


def _once_is_enough(
    self: Any, decision: Decision, ended: frozenset[Any] = frozenset()
) -> list[Any]:
    actions = Transaction._commit(self, decision, ended)
    left = [each for each in actions if not isinstance(each, Commit) or each.branch.id not in ended]
    for branch in ended:
        self._unended.pop(branch, None)
        self._out.pop(branch, None)
    if not left:
        self.phase = Phase.ENDED
    return left


OF_SERVERS: tuple[Bug, ...] = (
    Bug(
        "restored-log-keeps-its-horizon",
        "after a restore the horizon is raised to the present before anything is served",
        REAL._replace(restore=_leaves_the_horizon),
    ),
    Bug(
        "refused-sweep-rolls-back",
        "a branch below the horizon without a record is never presumed aborted",
        REAL._replace(sweeper=_RollsBackWhenRefused),
    ),
    Bug(
        "damage-stops-the-sweep",
        "a record that cannot be read parks its own transaction only",
        REAL._replace(sweeper=_StopsAtDamage),
    ),
    Bug(
        "damage-is-absence",
        "a record that cannot be read is not absent",
        REAL._replace(log=_DamageIsAbsence),
    ),
    Bug(
        "promotion-unnoticed",
        "an unknown name after a promotion is shown, never taken for committed",
        REAL._replace(resource=_PromotionUnnoticed),
    ),
    Bug(
        "came-back-ignored",
        "a branch that was marked as ended and is seen prepared is ended again",
        REAL._replace(transaction=mutant(_commit=_once_is_enough)),
    ),
    Bug(
        "silence-is-yes",
        "a PREPARE without an answer counts as no",
        REAL._replace(driver=_SilenceIsYes),
    ),
    Bug(
        "lost-one-phase-is-abort",
        "the database says what became of a one-phase commit without an answer",
        REAL._replace(driver=_LostOnePhaseIsAbort),
    ),
    Bug(
        "key-named-late",
        "a key names its attempt before that attempt prepares",
        REAL._replace(caller=_NamesLate),
    ),
    Bug(
        "begins-near-the-horizon",
        "who would draw an id near the horizon refuses to begin",
        REAL._replace(process=_BeginsAnyhow),
    ),
    Bug(
        "behind-the-fastest-clock",
        "the horizon stays the retention behind the smallest clock of the live members",
        REAL._replace(horizon_candidate=_behind_the_fastest),
        first_seed=300,
    ),
    Bug(
        "forgotten-reads-aborted",
        "below the horizon absence reads as forgotten",
        REAL._replace(status=_forgotten_is_aborted),
    ),
    Bug(
        "live-ignored",
        "who lives and is within its deadline is left alone",
        REAL._replace(watch=EverythingIsDue),
        first_seed=400,
    ),
)
