"""Every way in which a state can go on: wishes, deliveries, sweeps, crashes, losses, time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from coordinator.events import (
    AbortRequested,
    Commit,
    CommitRequested,
    Decide,
    Event,
    Finished,
    Prepare,
    Rollback,
)
from coordinator.log.base import Mark
from coordinator.model import ABORT, TransactionId
from coordinator.protocol import Phase
from tests.exhaustive.bounds import (
    IDS,
)
from tests.exhaustive.delivering import ON_SESSION
from tests.exhaustive.state import (
    ABORTED,
    ABSENT,
    CALLS,
    COMMITTED,
    CUT,
    DONE,
    GONE,
    LEFT,
    NOBODY,
    QUARANTINED,
    READING,
    STATES,
    WORKING,
    Draft,
    Mail,
    Name,
    ReadKey,
    Serve,
    Settle,
    Slow,
    State,
)
from tests.exhaustive.sweeping import IDLE, Label, Sweeping

WANTED = AbortRequested("the body raised")
DEADLINE = AbortRequested("the deadline passed", True)
COMMIT = CommitRequested()
_UNDER_WAY = (Phase.PREPARING, Phase.COMMIT_PROPOSED, Phase.DELEGATED, Phase.ANSWERED)
_ENDED_FOR_EVER = (COMMITTED, ABORTED, LEFT)
_ENDED = (COMMITTED, ABORTED, LEFT, QUARANTINED, ABSENT)

Moves = Iterator[tuple[Label, bool, State]]
"""What happens, whether it is a fault, and the state that follows."""


class Searched(Sweeping):
    """The whole world of a search."""

    # All moves.

    def moves(self, state: State) -> Moves:
        for label, fault, draft in self._moves(state):
            self.tidy(draft)
            yield label, fault, draft.frozen()

    def tidy(self, draft: Draft) -> None:
        """What can change nothing any more is over at once: it would be the same at any time.

        A request to a branch that has ended finds the same answer for ever; a proposal that nobody
        waits for is passed over once a record stands or the horizon is above; so is a mark that is
        made already, or whose record is gone.
        """
        view = self.logs.views[draft.log]
        again = True
        while again:
            again = False
            for number in draft.mail:
                mail = self.mails[number]
                if isinstance(mail.what, Commit | Rollback):
                    again = self._has_ended(draft, number, mail)
                elif isinstance(mail.what, Mark):
                    record = view.records[mail.transaction]
                    again = (
                        mail.what.branch in record.ended if record else self._is_closed(draft, mail)
                    )
                    if again:
                        draft.mail.remove(number)
                elif mail.sender == NOBODY and isinstance(mail.what, Decide):
                    again = self._is_closed(draft, mail)
                    if again:
                        draft.mail.remove(number)
                if again:
                    break

    def _is_closed(self, draft: Draft, mail: Mail) -> bool:
        """Nothing will be recorded under this id any more."""
        view = self.logs.views[draft.log]
        forgotten = view.statuses[mail.transaction] == "forgotten"
        return forgotten or view.records[mail.transaction] is not None

    def _has_ended(self, draft: Draft, number: int, mail: Mail) -> bool:
        if draft.branches[self.place(draft, mail.what.branch)] not in _ENDED_FOR_EVER:
            return False
        if isinstance(mail.what, Rollback) or mail.what.branch.token:
            draft.mail.remove(number)
            if mail.sender != NOBODY:
                self.hear(draft, mail, Finished(mail.what.branch.id))
            return True
        return False

    def _moves(self, state: State) -> Iterator[tuple[Label, bool, Draft]]:
        for number in dict.fromkeys(state.mail):
            self.note("arrives", number)
            nobodys = self.mails[number].sender == NOBODY  # healing must not rest on it
            for unheard, draft in self.arrives(state, number):
                word = "answer is lost" if unheard else "arrives"
                yield (word, number), unheard or nobodys, draft
            if state.faults and self.mails[number].sender != NOBODY:
                yield from self._losses(state, number)
        for original, core in enumerate(state.originals):
            if core >= 0 or core == CALLS:
                yield from self._original_moves(state, original, core)
        for sweeper in range(len(state.sweepers)):
            yield from self._sweeper_moves(state, sweeper)
        yield from self._surroundings(state)

    def _losses(self, state: State, number: int) -> Iterator[tuple[Label, bool, Draft]]:
        for word, becomes in (("is lost", self.lost), ("is doubled", self.doubled)):
            label = self.note(word, number)
            draft = becomes(state, number)
            if draft is not None:
                draft.faults -= 1
                yield label, True, draft

    # Originals.

    def _original_moves(
        self, state: State, original: int, core: int
    ) -> Iterator[tuple[Label, bool, Draft]]:
        if core == CALLS:
            if not any(self.mails[number].sender == original for number in state.mail):
                draft = Draft(state)
                self.send(draft, Mail(original, self.bounds.drives[original], Settle(IDS[0])))
                yield self.note("calls", original), False, draft
        else:
            for event in self._wishes(state, original, core):
                label = self.note("event", original, type(event).__name__)
                draft = Draft(state)
                self.feed(draft, original, event)
                if draft.originals[original] != core:
                    yield label, False, draft
            if self.cores.cores[core].phase is Phase.ACTIVE and self._may_call(state):
                draft = Draft(state)
                draft.requests += 1
                self.send(
                    draft, Mail(original, self.bounds.drives[original], Serve(draft.requests))
                )
                yield self.note("calls a service", original), False, draft
        if state.crashes[original]:
            yield self.note("crashes", original), True, self._crash(state, original)

    def _wishes(self, state: State, original: int, core: int) -> Iterator[Event]:
        phase = self.cores.cores[core].phase
        if phase is Phase.ACTIVE:
            remote = any(place.kind == "remote" for place in self.places)
            if not remote or state.answered >= 0:
                yield COMMIT
            yield WANTED
        elif phase in _UNDER_WAY:
            yield DEADLINE

    def _may_call(self, state: State) -> bool:
        remote = sum(place.kind == "remote" for place in self.places)
        return state.answered < 0 and state.requests < remote

    def _crash(self, state: State, sender: int) -> Draft:
        """A process is gone: nobody waits for its answers, and its sessions end."""
        draft = Draft(state)
        draft.crashes = list(draft.crashes)
        draft.crashes[sender] -= 1
        draft.mail = []
        for number in state.mail:
            mail = self.mails[number]
            if mail.sender != sender:
                draft.mail.append(number)
            elif not isinstance(mail.what, Slow | Serve | Settle | Name | ReadKey):
                self.send(draft, mail._replace(sender=NOBODY))
        if sender >= self.originals:
            draft.sweepers[sender - self.originals] = 0
            return draft
        draft.originals[sender] = GONE
        for place, at in enumerate(draft.branches):
            if self.is_own(sender, place):
                draft.branches[place] = {WORKING: CUT, READING: LEFT}.get(at, at)
        return draft

    def _sweeper_moves(self, state: State, sweeper: int) -> Iterator[tuple[Label, bool, Draft]]:
        stage = self.stages[state.sweepers[sweeper]]
        sender = self.originals + sweeper
        busy = stage is not IDLE or any(self.mails[n].sender == sender for n in state.mail)
        if state.crashes[sender] and busy:
            yield self.note("crashes", sender), True, self._crash(state, sender)
        if stage.kind != "drive" and not (stage is IDLE and busy):  # its marks are written first
            for following, what, draft in self.sweep_steps(state, stage, sender):
                draft.sweepers[sweeper] = self.stage_number(following)
                yield ("sweeps", sweeper, what), False, draft

    # What else happens.

    def _surroundings(self, state: State) -> Iterator[tuple[Label, bool, Draft]]:
        for place, at in enumerate(state.branches):
            if at == CUT or (at == WORKING and self._expires(state, place)):
                yield self.note("is cut off", place), False, self._cut_off(state, place)
        if self.bounds.rules:
            if not state.late and not self._delays(state):
                draft = Draft(state)
                draft.late = True
                yield self.note("time passes"), False, draft
            yield from self.forgets(state)
        else:
            for to in self.horizons:
                yield from self.forgets(state, to)
        if self.bounds.meddles and not state.meddled:
            draft = Draft(state)
            draft.meddled = True
            self.send(draft, Mail(NOBODY, 0, Decide(ABORT)))
            yield self.note("somebody asks for an abort by id"), True, draft

    def forgets(
        self, state: State, to: TransactionId | None = None
    ) -> Iterator[tuple[Label, bool, Draft]]:
        """The horizon is raised to `to`, and at once all below it is deleted that may be.

        While a record stands nobody can tell where the horizon is: so these two are one step.
        """
        label = self.note("the log forgets", "" if to is None else f"below {to[:13]}")
        draft = Draft(state)
        if to is not None:
            self.change_log(draft, ("raise", to), lambda log: log.raise_horizon(to))
        self.change_log(draft, "forget", lambda log: log.forget(1000, claims_before_ms=0))
        if draft.log != state.log:
            yield label, False, draft

    def _expires(self, state: State, place: int) -> bool:
        """A last resource aborts what nobody asks it about any more."""
        waits = any(core >= 0 for core in state.originals)
        return self.places[place].kind == "last resource" and not waits

    def _cut_off(self, state: State, place: int) -> Draft:
        """The server notices that the session is gone: what was not done by then never is."""
        draft = Draft(state)
        branch = self.branches[place].id
        for number in state.mail:
            mail = self.mails[number]
            if isinstance(mail.what, ON_SESSION) and mail.what.branch.id == branch:
                draft.mail.remove(number)
        self.end(draft, place, ABORTED)
        return draft

    def _delays(self, state: State) -> bool:
        """Something is under way that takes less than the retention."""
        for core in state.originals:
            phase = self.cores.cores[core].phase if core >= 0 else None
            if core == CALLS or phase in (Phase.ACTIVE, Phase.PREPARING):
                return True
        return any(isinstance(self.mails[n].what, Prepare | Serve) for n in state.mail)

    # Ends, and what people read.

    def is_end(self, state: State) -> bool:
        """All has ended, and the log has forgotten it."""
        return (
            all(self.mails[number].sender == NOBODY for number in state.mail)
            and not any(state.sweepers)
            and all(core in (GONE, DONE) for core in state.originals)
            and all(at in _ENDED for at in state.branches)
            and all(status == "forgotten" for status in self.logs.views[state.log].statuses)
        )

    def _who(self, sender: int) -> str:
        if sender == NOBODY:
            return "somebody who waits no more"
        if sender < self.originals:
            return f"coordinator {sender + 1}"
        return f"sweep {sender - self.originals + 1}"

    def say(self, label: Label) -> str:
        word, *rest = label
        if word in ("arrives", "answer is lost", "is lost", "is doubled", "is never delivered"):
            mail = self.mails[rest[0]]
            how = "arrives, its answer is lost" if word == "answer is lost" else word
            return f"{self._who(mail.sender)}: {_brief(mail.what)} {how}"
        if word == "is cut off":
            return f"the session of {self.places[rest[0]].name} is cut off"
        if word == "event":
            return f"{self._who(rest[0])}: {rest[1]}"
        if word == "sweeps":
            return f"{self._who(self.originals + rest[0])} {rest[1]}"
        if word in ("crashes", "calls", "calls a service"):
            return f"{self._who(rest[0])} {word}"
        return " ".join(str(each) for each in label)

    def describe(self, state: State) -> list[str]:
        lines = [
            f"  {p.name}: {STATES[at]}" for p, at in zip(self.places, state.branches, strict=True)
        ]
        view = self.logs.views[state.log]
        lines.append(f"  the log: {', '.join(view.statuses)}")
        lines += [f"  under way: {self.say(('arrives', n))}" for n in state.mail]
        return lines


def _brief(what: Any) -> str:
    from tests.protocol.values import describe, tell

    if isinstance(what, Mark):
        return f"mark {bytes.fromhex(what.branch).lstrip(bytes(1)).decode()}"
    for words in (lambda: describe(what, {}), lambda: tell(what)):
        try:
            text = words()
        except Exception:
            continue
        if text:
            return text
    return repr(what)
