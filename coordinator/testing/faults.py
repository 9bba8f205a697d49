"""Switches that make one participant, or the decision log, fail at a named call.

A switch stands in front of the methods of the object itself for the length of a `with` block. So
the object keeps its identity, by which a transaction knows its participants, and the switch works
for every implementation of the port and for both faces.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from coordinator.coordinator import Coordinator
from coordinator.errors import ConfigurationError, LogUnavailable
from coordinator.log.base import DecisionLog, Housekeeping
from coordinator.model import Branch, Verdict, Vote, VoteKind, Xid
from coordinator.participant import OnePhase, Participant

Method = Callable[..., Awaitable[Any]]

PARTICIPANT_VERBS = ("prepare", "commit", "rollback", "commit_one_phase", "ask")
LOG_VERBS = tuple(
    name
    for port in (DecisionLog, Housekeeping)
    for name in vars(port)
    if not name.startswith("_") and name not in ("open", "close")
)


class AnswerLost(ConnectionError):
    """What a participant raises while a switch is on."""


class Fault:
    """A switch that is on; `struck` is how often it made something fail."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.struck = 0

    def __repr__(self) -> str:
        return f"<Fault {self.what}, struck {self.struck} times>"


@contextmanager
def lose_answer(target: Participant | Coordinator, verb: str, *, times: int = 1) -> Iterator[Fault]:
    """Let `verb` have its effect and lose its answer, the first `times` times in the block.

    `verb` is a method of the port: of a participant `prepare`, `commit`, `rollback`,
    `commit_one_phase` or `ask`; of a coordinator, which stands for its decision log, for instance
    `propose`. Raises `AssertionError` at the end if it was never called: nothing was tested then.
    """
    subject, name = _subject(target)
    known = LOG_VERBS if isinstance(target, Coordinator) else PARTICIPANT_VERBS
    if verb not in known or not hasattr(subject, verb):
        raise ConfigurationError(f"{name} has no verb {verb!r}: there are {', '.join(known)}")
    fault = Fault(f"the answer of {name}.{verb}()")
    real: Method = getattr(subject, verb)

    async def lost(*args: Any, **kwargs: Any) -> Any:
        answer = await real(*args, **kwargs)
        if fault.struck >= times:
            return answer
        fault.struck += 1
        raise _error(target, f"{fault.what} was lost by the test")

    with _in_front(subject, {verb: lost}):
        yield fault
    _require_struck(fault)


@contextmanager
def refuse(
    participant: Participant,
    reason: str = "refused by the test",
    *,
    retryable: bool = False,
    times: int = 1,
) -> Iterator[Fault]:
    """Have the participant vote no, the first `times` times that it is to prepare or to commit.

    The branch is rolled back, as behind every no, and the caller gets `TransactionAborted` with
    `reason` and `retryable`. Raises `AssertionError` at the end if it was never asked.
    """
    fault = Fault(f"the refusal of {participant.name}")
    prepare = participant.prepare

    async def vote_no(xid: Xid) -> Vote:
        if fault.struck >= times:
            return await prepare(xid)
        fault.struck += 1
        await participant.rollback(Branch(xid, participant.name))
        return Vote(VoteKind.ABORTED, reason=reason, retryable=retryable)

    methods: dict[str, Method] = {"prepare": vote_no}
    if isinstance(participant, OnePhase):
        commit_one_phase = participant.commit_one_phase

        async def refuse_one_phase(branch: Branch) -> tuple[Verdict, str, bool]:
            if fault.struck >= times:
                return await commit_one_phase(branch)
            fault.struck += 1
            await participant.rollback(branch)
            return Verdict.ABORT, reason, retryable

        methods["commit_one_phase"] = refuse_one_phase
    with _in_front(participant, methods):
        yield fault
    _require_struck(fault)


@contextmanager
def unreachable(target: Participant | Coordinator) -> Iterator[Fault]:
    """Let nothing get through to a participant, or to a coordinator's log, in the block.

    For a participant that is everything from the vote on, and the sweep's question; the statements
    of the body still get through. What is to be done there is tried again until the block has
    ended, so leave it before you wait for an end.
    """
    subject, name = _subject(target)
    verbs = LOG_VERBS if isinstance(target, Coordinator) else (*PARTICIPANT_VERBS, "recover")
    fault = Fault(f"the way to {name}")

    async def away(*args: Any, **kwargs: Any) -> Any:
        fault.struck += 1
        raise _error(target, f"{fault.what} was cut by the test")

    # A verb that is not there stays absent: it tells which further ports the object has.
    with _in_front(subject, {verb: away for verb in verbs if hasattr(subject, verb)}):
        yield fault


def _subject(target: Participant | Coordinator) -> tuple[object, str]:
    if isinstance(target, Coordinator):
        return target.engine().log, "the log"
    return target, target.name


def _error(target: Participant | Coordinator, message: str) -> Exception:
    return LogUnavailable(message) if isinstance(target, Coordinator) else AnswerLost(message)


@contextmanager
def _in_front(subject: object, methods: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    try:
        own = vars(subject)
    except TypeError as error:
        raise ConfigurationError(
            f"{subject!r} has __slots__ and can have no switches: give it a __dict__ in tests"
        ) from error
    # What is sent without a task goes by other methods, which then cannot.
    by_task = {f"{name}_at_once": _cannot for name in methods}
    methods = {
        **methods,
        **{name: cannot for name, cannot in by_task.items() if hasattr(subject, name)},
    }
    before = {name: own[name] for name in methods if name in own}
    own.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del own[name]
        own.update(before)


def _cannot(*_: object) -> None:
    """None: just now nothing can be sent at once."""


def _require_struck(fault: Fault) -> None:
    if not fault.struck:
        raise AssertionError(f"{fault.what} was never asked for in the block: nothing was tested")
