"""What happens to a transaction next: who does it, when, and what a person may type.

Pure: it says what the rules of the sweep, of the engine and of the log make of what `look` saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from coordinator.commands.list_transactions import Picture, State, View
from coordinator.config import Settings
from coordinator.log.base import Incident, Record, Word
from coordinator.model import TransactionId, Verdict, Xid

BEATS = 3
"""So many beats of a living member that do not list a transaction say that it has ended it."""


class Actor(StrEnum):
    OWNER = "owner"
    SWEEP = "sweep"
    PERSON = "person"
    NOBODY = "nobody"


class Next(msgspec.Struct, frozen=True):
    """`within_seconds` is when it happens at the latest, None where nothing tells.

    `commands` are what a person types, in this order, or chooses from.
    """

    text: str
    actor: Actor
    within_seconds: float | None = None
    commands: Sequence[str] = ()


def next_step(view: View, record: Record | None, picture: Picture, settings: Settings) -> Next:
    """What will happen to the transaction of this view."""
    if view.why_unreadable:
        return Next(
            f"nothing: its record cannot be read ({view.why_unreadable}); run a version of "
            "syncpoint that can, or restore the log from its backup. It holds up no other",
            Actor.PERSON,
        )
    if view.state is State.NEEDS_PERSON:
        return _person(view, picture)
    verdict = None if record is None else record.answer or record.decision.verdict
    if view.state is State.FINISHED:
        return Next(_finished(verdict), Actor.NOBODY)
    end = {
        None: "is rolled back, unless a commit is recorded first",
        Verdict.ABORT: "is rolled back",
        Verdict.COMMIT: "is committed",
        Verdict.DELEGATED: "ends as its last resource answers",
    }[verdict]
    missing = sorted(each.participant for each in view.branches if each.state == "not configured")
    if missing:
        return _not_configured(missing, end)
    away = sorted({each.participant for each in view.branches} & picture.unreachable.keys())
    if view.state is State.IN_FLIGHT:
        return _in_flight(view, verdict, end + _once(away), settings)
    return _in_doubt(end, away, picture.services, settings)


def to_type(incident: Incident, *, gone: bool = False, word: Word | None = None) -> list[str]:
    """The commands that deal with an incident, to choose one from.

    `gone` says that its participant holds the branch no more, `word` is the one that stands.
    """
    xid = Xid.parse(incident.gid)
    if xid is None:
        return []
    if incident.kind is not None or gone:
        return [forget_command(xid.transaction)]
    verdicts = ("commit", "rollback") if word is None else (_verb(word),)
    resolve = f"syncpoint resolve {xid.transaction} --branch {xid.branch}"
    return [f"{resolve} {each} --reason TEXT" for each in verdicts]


def forget_command(transaction: TransactionId) -> str:
    return f"syncpoint forget {transaction} --reason TEXT"


def _verb(word: Word) -> str:
    return "commit" if word.verdict is Verdict.COMMIT else "rollback"


def _person(view: View, picture: Picture) -> Next:
    held = {str(branch.xid) for branch in picture.held.get(view.transaction, ())}
    words = {
        each.subject: each
        for each in picture.words.get(view.transaction, ())
        if each.verdict is not None
    }
    incidents = picture.incidents.get(view.transaction, ())
    parts: list[str] = []
    commands: list[str] = []
    for incident in incidents:
        gone = incident.gid not in held and picture.answered(incident.participant)
        where = f"branch {incident.gid.rpartition(':')[2]} of {incident.participant}"
        if incident.kind is not None:
            parts.append(
                f"{where} may have ended against the decision: compare the databases, mend them by "
                "hand, then acknowledge it"
            )
        elif gone:
            parts.append(f"{where} is not prepared any more: compare, then acknowledge it")
        elif incident.gid in words:
            parts.append(f"{where} waits for what {words[incident.gid].by} ordered: type it again")
        else:
            parts.append(f"compare the databases, then end {where} as the others have ended")
        commands += to_type(incident, gone=gone, word=words.get(incident.gid))
    text = f"nothing by itself: {'; '.join(parts)}"
    if held - {each.gid for each in incidents}:
        text += "; its other branches are ended by the sweep"
    return Next(text, Actor.PERSON, commands=list(dict.fromkeys(commands)))


def _finished(verdict: Verdict | None) -> str:
    if verdict is None:
        return "nothing: it has ended, and of it only what a person said is kept"
    ended = "committed" if verdict is Verdict.COMMIT else "rolled back"
    return f"nothing: it has {ended} everywhere, and its record is kept for a while"


def _not_configured(missing: list[str], end: str) -> Next:
    names = " and ".join(missing)
    return Next(
        f"it {end} by a process that has {names}, which is not configured here: if no process has "
        "it any more, put it back into the configuration and recover. It holds up no other",
        Actor.SWEEP,
        commands=["syncpoint recover"],
    )


def _in_flight(view: View, verdict: Verdict | None, end: str, settings: Settings) -> Next:
    if verdict is not None:
        return Next(
            f"its owner tries again with pauses of up to {settings.retry_most:g} s, and a sweep "
            f"every {settings.sweep_interval:g} s, until it {end}",
            Actor.OWNER,
            settings.retry_most,
        )
    abort = [f"syncpoint resolve {view.transaction} abort --reason TEXT"]
    if view.seconds_left is not None:
        left = view.seconds_left
        return Next(
            f"its owner goes on with it for at most {left:.0f} s; then it {end}. It can be "
            "aborted now",
            Actor.OWNER,
            left,
            abort,
        )
    soon = BEATS * settings.beat_interval + 2 * settings.sweep_interval
    return Next(
        f"its owner goes on with it if it is younger than a second; if it was left behind, it {end}"
        f" within about {soon:g} s. It can be aborted now",
        Actor.OWNER,
        soon,
        abort,
    )


def _in_doubt(end: str, away: list[str], services: int, settings: Settings) -> Next:
    every = settings.sweep_interval
    if not services:
        wait = " --wait 60" if away else ""
        return Next(
            f"no service runs: with `syncpoint recover`, or once one does, it {end}{_once(away)}",
            Actor.PERSON,
            commands=[f"syncpoint recover{wait}"],
        )
    if away:
        return Next(
            f"it is tried again by the sweep of a service, every {every:g} s: it {end}"
            f"{_once(away)}",
            Actor.SWEEP,
        )
    return Next(f"with a sweep of a service, every {every:g} s, it {end}", Actor.SWEEP, every)


def _once(away: list[str]) -> str:
    return f", once {' and '.join(away)} can be reached" if away else ""
