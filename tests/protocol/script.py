"""The small language of the transcripts in `testdata`, and the runner that plays them.

A transcript is prose, commands and what the core answered. A command stands behind `>`, its answer
indented below; all other lines are prose and are kept. Where several coordinators meet, the word
before `>` says whose step it is:

    recovery> stands abort
        rolling back, aborted
        Rollback accounts

The commands, one for each event; brackets mark what may be left out:

    begin [handed] [claiming KEY]
    recover [NAME ...]
    enlist NAME [one-phase] [last-resource] [VOTE]
    publish
    commit [with TEXT]
    abort [retryable] [REASON]
    vote NAME VOTE                           VOTE: prepared, read-only, aborted [REASON]
    stands abort
    stands commit [NAME ...] [ended NAME ...]
    stands delegated [NAME ...] to NAME [answered commit|abort] [ended NAME ...]
    refused
    held KEY
    answer commit|abort [REASON]
    resolved commit|abort
    finished NAME [heuristic-commit|heuristic-rollback|heuristic-hazard EVIDENCE]
"""

from __future__ import annotations

import re

from coordinator.errors import ProtocolError
from coordinator.events import (
    AbortRequested,
    Answered,
    ClaimStands,
    CommitRequested,
    Decided,
    Enlisted,
    Event,
    Finished,
    Published,
    Refused,
    Resolved,
    Voted,
)
from coordinator.model import (
    ABORT,
    FINISHED,
    BranchId,
    Claim,
    Decision,
    Ending,
    EndingKind,
    Verdict,
    Vote,
    VoteKind,
)
from coordinator.protocol import Transaction
from tests.protocol.values import ID, OTHER_ID, branch, describe

_COMMAND = re.compile(r"(?P<who>[a-z]*)> (?P<words>\S.*)")
_INDENT = "    "


class Script:
    """Plays one transcript: `play` returns it with the answers the core gives today."""

    def __init__(self) -> None:
        self._transactions: dict[str, Transaction] = {}
        self._names: dict[BranchId, str] = {}

    def play(self, text: str) -> str:
        lines: list[str] = []
        for line in text.splitlines():
            command = _COMMAND.fullmatch(line)
            if command is not None:
                answers = self._perform(**command.groupdict())
                lines += [line, *(_INDENT + answer for answer in answers)]
            elif not line.startswith(_INDENT):
                lines.append(line)
        return "\n".join(lines) + "\n"

    def _perform(self, who: str, words: str) -> list[str]:
        verb, *rest = words.split()
        if verb in ("begin", "recover"):
            self._transactions[who] = self._begin(verb, rest)
            return [str(self._transactions[who].phase)]
        transaction = self._transactions.setdefault(who, Transaction(ID))
        event = self._event(verb, rest)
        try:
            actions = transaction.step(event)
        except ProtocolError:
            return [f"ProtocolError: {verb} is refused while {transaction.phase}"]
        told = [str(transaction.phase)]
        if transaction.outcome is not None:
            told.append(str(transaction.outcome))
        head = ", ".join(told) + (f" ({transaction.reason})" if transaction.reason else "")
        return [head, *sorted(describe(action, self._names) for action in actions)]

    def _begin(self, verb: str, rest: list[str]) -> Transaction:
        if verb == "recover":
            found = [branch(name) for name in rest]
            self._names |= {each.id: each.participant for each in found}
            return Transaction.in_doubt(ID, found)
        claims: tuple[Claim, ...] = ()
        if "claiming" in rest:
            claims = (Claim("key", rest[rest.index("claiming") + 1]),)
        return Transaction(ID, claims=claims, handed="handed" in rest)

    def _event(self, verb: str, rest: list[str]) -> Event:
        match verb, rest:
            case "enlist", [name, *more]:
                return self._enlisted(name, more)
            case "publish", []:
                return Published()
            case "commit", []:
                return CommitRequested()
            case "commit", ["with", *text]:
                return CommitRequested(" ".join(text).encode())
            case "abort", ["retryable", *reason]:
                return AbortRequested(" ".join(reason), retryable=True)
            case "abort", reason:
                return AbortRequested(" ".join(reason))
            case "vote", [name, *vote]:
                return Voted(branch(name).id, _vote(vote))
            case "stands", [verdict, *more]:
                return self._stands(Verdict(verdict), more)
            case "refused", []:
                return Refused()
            case "held", [key]:
                return ClaimStands(Claim("key", key), OTHER_ID)
            case "answer", [verdict, *reason]:
                return Answered(Verdict(verdict), " ".join(reason))
            case "resolved", [verdict]:
                return Resolved(Verdict(verdict))
            case "finished", [name]:
                return Finished(branch(name).id, FINISHED)
            case "finished", [name, kind, *evidence]:
                ending = Ending(EndingKind(kind.replace("-", " ")), " ".join(evidence))
                return Finished(branch(name).id, ending)
        raise AssertionError(f"unknown command: {verb} {' '.join(rest)}")

    def _enlisted(self, name: str, more: list[str]) -> Enlisted:
        enlisted = branch(name)
        self._names[enlisted.id] = name
        flags = [word for word in more if word in ("one-phase", "last-resource")]
        vote = more[len(flags) :]
        return Enlisted(
            enlisted,
            _vote(vote) if vote else None,
            one_phase="one-phase" in flags,
            last_resource="last-resource" in flags,
        )

    def _stands(self, verdict: Verdict, more: list[str]) -> Decided:
        if verdict is Verdict.ABORT:
            return Decided(ABORT)
        parts: dict[str, list[str]] = {"named": [], "to": [], "answered": [], "ended": []}
        part = "named"
        for word in more:
            if word in parts:
                part = word
            else:
                parts[part].append(word)
        named = tuple(branch(name) for name in parts["named"])
        self._names |= {each.id: each.participant for each in named}
        last = branch(parts["to"][0]) if parts["to"] else None
        answer = Verdict(parts["answered"][0]) if parts["answered"] else None
        ended = frozenset(branch(name).id for name in parts["ended"])
        return Decided(Decision(verdict, named, last), ended, answer)


def _vote(words: list[str]) -> Vote:
    kind, *reason = words
    return Vote(VoteKind(kind), reason=" ".join(reason))
