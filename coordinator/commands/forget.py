"""`syncpoint forget`: a person has dealt with what ended against the decision, and says so.

What is still prepared is never forgotten: it is ended with `syncpoint resolve`. The word is
recorded before the incident is dropped, so that who acknowledged it can be asked later.
"""

from __future__ import annotations

import asyncio

import msgspec
from rich.markup import escape

from coordinator.commands.list_transactions import Picture, look
from coordinator.commands.next_step import to_type
from coordinator.commands.output import messages, print_json, results
from coordinator.commands.show import EXIT_NO_SUCH, parse_id, tell_none
from coordinator.commands.words import read_reason, said_now
from coordinator.coordinator import Coordinator
from coordinator.errors import one_line
from coordinator.log.base import Incident
from coordinator.model import Status, TransactionId, Xid

EXIT_FORGOTTEN = 0
EXIT_LEFT = 4


class _Result(msgspec.Struct):
    """What was acknowledged, and why each of the others was not; `known` is False for no such."""

    known: bool = True
    status: Status | None = None
    forgotten: list[Incident] = msgspec.field(default_factory=list)
    left: dict[str, str] = msgspec.field(default_factory=dict)


def run(coordinator: Coordinator, transaction: str, reason: str, *, as_json: bool) -> int:
    """Acknowledge, tell, and return the exit code. Raises `ConfigurationError` for a wrong id."""
    transaction_id, reason = parse_id(transaction), read_reason(reason)
    result = asyncio.run(_forget(coordinator, transaction_id, reason))
    if not result.known:
        tell_none(transaction_id, result.status)
        return EXIT_NO_SUCH
    code = EXIT_LEFT if result.left else EXIT_FORGOTTEN
    if as_json:
        print_json(_as_plain(transaction_id, result, code))
    elif result.forgotten:
        for incident in result.forgotten:
            results().print(escape(f"acknowledged: {_shown(incident)}"), soft_wrap=True)
    elif not result.left:
        nothing = f"transaction {transaction_id}: there is nothing to acknowledge"
        results().print(nothing, soft_wrap=True)
    for line in result.left.values():
        messages().print(escape(f"syncpoint: {one_line(line)}"), soft_wrap=True)
    return code


async def _forget(coordinator: Coordinator, transaction: TransactionId, reason: str) -> _Result:
    await coordinator.open(sweep=False, tolerate_unreachable=True)
    try:
        picture = await look(coordinator, also=transaction)
        if picture.view(transaction) is None:
            return _Result(known=False, status=await coordinator.status(transaction))
        result = _Result()
        log = coordinator.engine().log
        for incident in picture.incidents.get(transaction, ()):
            if why := _why_not(incident, picture):
                result.left[incident.gid] = why
                continue
            await log.give_word(said_now(incident.gid, None, reason))
            await log.acknowledge(incident.gid)
            result.forgotten.append(incident)
        return result
    finally:
        await coordinator.close()


def _why_not(incident: Incident, picture: Picture) -> str:
    """Why it cannot be acknowledged yet; empty if it can. What has ended always can."""
    xid = Xid.parse(incident.gid)
    if incident.kind is not None or xid is None:
        return ""
    if not picture.answered(incident.participant):
        why = picture.unreachable.get(incident.participant, "it is not configured here")
        return f"{_shown(incident)} may still be prepared: {incident.participant}: {why}"
    if all(str(each.xid) != incident.gid for each in picture.held.get(xid.transaction, ())):
        return ""
    commands = " or ".join(f"`{command}`" for command in to_type(incident))
    return f"{_shown(incident)} is still prepared: end it with {commands}"


def _shown(incident: Incident) -> str:
    branch = incident.gid.rpartition(":")[2]
    return f"branch {branch} of {incident.participant}, {incident.kind or 'quarantined'}"


def _as_plain(transaction: TransactionId, result: _Result, code: int) -> dict[str, object]:
    return {
        "transaction": transaction,
        "forgotten": [msgspec.to_builtins(incident) for incident in result.forgotten],
        "left": result.left,
        "exit_code": code,
    }
