"""What a PostgreSQL server's settings mean for transactions: pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta

from psycopg.sql import Identifier

from coordinator.config import Settings
from coordinator.model import LogId, Xid
from coordinator.participant import Finding, Level
from participants.postgres.checks import unfit
from participants.postgres.observation import Prepared, Server
from participants.postgres.opened import FINISHING_CONNECTIONS
from participants.postgres.slots import RESERVE_SHARE
from participants.postgres.statements import REPLICATED, Begin

SKEW_SECONDS_MAX = 2.0
VERSION_MAINTAINED = 14


def judge(
    server: Server,
    location: str,
    pool_size: int,
    begin: Begin,
    log: LogId | None,
    settings: Settings,
) -> Iterator[Finding]:
    """Everything, in the order in which it is shown. `location` is for people."""
    yield Finding(
        "connection",
        Level.OK,
        f"PostgreSQL {_version(server.version)} at {location}, as role {server.role}",
    )
    problem = unfit(server.version, server.in_recovery, server.number("max_prepared_transactions"))
    if problem is not None:
        yield _must(*problem)
    elif server.version < VERSION_MAINTAINED * 10000:
        message = f"PostgreSQL {server.version // 10000} gets no corrections any more"
        yield Finding("version", Level.NOTE, message, "upgrade to a version that does")
    yield from _role(server)
    if problem is None:
        yield from _slots(server, pool_size)
        if server.prepared is not None:
            yield from _branches(server, server.prepared, log, settings)
    yield from _connections(server, pool_size)
    yield from _pooler(server)
    yield from _durability(server)
    if not server.in_recovery:
        yield from _standbys(server)
    yield from _timeouts(server, begin, settings)
    yield from _clock(server)


def _role(server: Server) -> Iterator[Finding]:
    role = server.role
    if server.forbidden or not server.sees_prepared:
        closed = [f"EXECUTE ON FUNCTION pg_catalog.{name}" for name in server.forbidden]
        if not server.sees_prepared:
            closed.append("SELECT ON pg_catalog.pg_prepared_xacts")
        grants = "; ".join(f"GRANT {each} TO {quoted(role)}" for each in closed)
        yield _must(
            "role",
            f"role {role} has not the right to {', '.join(closed)}",
            f"as a superuser, in database {server.database}: {grants}",
        )
    elif server.is_superuser:
        yield Finding(
            "role",
            Level.NOTE,
            f"role {role} is a superuser, which is far more than is needed",
            "make a role of its own for the service: `syncpoint check --role-sql` prints the SQL",
        )
    else:
        yield Finding(
            "role",
            Level.OK,
            f"role {role} may see prepared branches, may end those that it prepared itself, and "
            "may end its own sessions",
        )
    if server.other_roles and not server.is_superuser:
        yield Finding(
            "other roles",
            Level.NOTE,
            f"other processes work here with the adapter as {', '.join(server.other_roles)}: a "
            f"branch can be ended by the role that prepared it and by a superuser, not by {role}",
            "let all processes that share a decision log connect as one role",
        )
    if server.text("default_transaction_read_only") == "on":
        yield _must(
            "read only",
            f"default_transaction_read_only is on{_from(server, 'default_transaction_read_only')}",
            _reset(server, "default_transaction_read_only", "off"),
        )


def _slots(server: Server, pool_size: int) -> Iterator[Finding]:
    slots = server.number("max_prepared_transactions")
    usable = slots - max(1, round(slots * RESERVE_SHARE))
    by_slots, by_connections = usable // pool_size, _room(server) // _needed(pool_size)
    wanted = max(64, server.number("max_connections"))
    fix = (
        f"ALTER SYSTEM SET max_prepared_transactions = {wanted}; then restart the server, its "
        "standbys first; or lower pool_size"
    )
    told = f"max_prepared_transactions is {slots}, of which {usable} can be used beside the reserve"
    if by_slots == 0:
        yield _must("slots", f"{told}: less than the {pool_size} of one pool", fix)
    elif by_slots < by_connections:
        yield Finding(
            "slots",
            Level.NOTE,
            f"{told}: enough for {_processes(by_slots)} of pool_size {pool_size} at full load; "
            f"max_connections has room for {by_connections}. Further ones wait for slots",
            fix,
        )
    else:
        yield Finding(
            "slots", Level.OK, f"{told}: enough for {_processes(by_slots)} of pool_size {pool_size}"
        )


def _branches(
    server: Server, found: Sequence[Prepared], log: LogId | None, settings: Settings
) -> Iterator[Finding]:
    """What is prepared: ours, of other decision logs, of others; since when, and whose."""
    slots = server.number("max_prepared_transactions")
    of_log = [each for each in found if log and each.gid.startswith(Xid.prefix(log))]
    of_other_logs = [each for each in found if Xid.parse(each.gid) and each not in of_log]
    ours = [each for each in of_log if each.here]
    counts = {
        "ours": len(ours),
        "ours in other databases of this server": len(of_log) - len(ours),
        "of other decision logs" if log else "of decision logs": len(of_other_logs),
        "of others": len(found) - len(of_log) - len(of_other_logs),
    }
    told = f"{len(found)} of {slots} slots are in use"
    if found:
        told += ": " + ", ".join(f"{count} {whose}" for whose, count in counts.items() if count)
        told += f"; the oldest for {_age(found[0].age)}"
    if len(found) >= slots:
        fix = "run `syncpoint recover`; who prepared the others must end them, or raise the setting"
        yield _must("branches", told, fix)
    else:
        yield Finding("branches", Level.OK, told)
    limit = settings.timeout_max
    if old := [each for each in ours if each.age > limit]:
        yield Finding(
            "old branches",
            Level.NOTE,
            f"{len(old)} of ours are prepared for longer than the longest deadline ({limit:g} s), "
            f"the oldest for {_age(old[0].age)}: they hold their locks and hold back vacuum",
            "run `syncpoint recover`, which says why if it cannot end them",
        )
    if old := [each for each in found if each not in of_log and each.age > limit]:
        yield Finding(
            "foreign branches",
            Level.NOTE,
            f"{len(old)} that are not ours are prepared for longer than {limit:g} s, the oldest, "
            f"{old[0].gid!r}, for {_age(old[0].age)} by role {old[0].owner}: they hold their locks "
            "and a slot each, and hold back vacuum",
            "ask who prepared them: only they know whether to COMMIT PREPARED or ROLLBACK PREPARED",
        )
    owners = sorted({each.owner for each in ours} - {server.role})
    if owners and not server.is_superuser:
        yield _must(
            "owners",
            f"branches of ours were prepared by {', '.join(owners)}, and role {server.role} may "
            "not end them",
            f"connect as {owners[0]} in every process that shares the decision log",
        )


def _connections(server: Server, pool_size: int) -> Iterator[Finding]:
    room, needed = _room(server), _needed(pool_size)
    told = (
        f"{room} connections are open to role {server.role}, {server.sessions} of the server's are "
        f"in use now; one process takes up to {needed} (pool_size {pool_size} and "
        f"{FINISHING_CONNECTIONS} to end branches)"
    )
    if room < needed:
        yield _must("connections", told, "raise max_connections (or the limit of the role or the "
                    "database), or lower pool_size")  # fmt: skip
    else:
        yield Finding(
            "connections", Level.OK, f"{told}: room for {_processes(room // needed)} at full load"
        )


def _pooler(server: Server) -> Iterator[Finding]:
    if server.shared:
        yield _must(
            "pooler",
            "a pooler such as pgbouncer sits between and shares sessions (pool_mode = "
            "transaction): the server can be replaced by its standby under a connection that has "
            "not noticed, so that who ends a branch may read its fate on the wrong server",
            "connect to the server itself; or set pool_mode = session for this database",
        )
    elif server.has_pooler:
        yield Finding(
            "pooler",
            Level.NOTE,
            "a pooler such as pgbouncer sits between: it is seen to share no session just now",
            "make sure that it has pool_mode = session for this database; better, connect to the "
            "server itself, since the adapter has a pool of its own",
        )


def _durability(server: Server) -> Iterator[Finding]:
    risks = {
        "fsync": "a prepared branch does not survive a power cut",
        "full_page_writes": "a power cut can damage pages, and with them prepared branches",
    }
    off = [name for name in risks if server.text(name) == "off"]
    for name in off:
        yield _must(
            name,
            f"{name} is off: {risks[name]}",
            f"ALTER SYSTEM SET {name} = on; SELECT pg_reload_conf()",
        )
    if not off:
        yield Finding("durability", Level.OK, "fsync and full_page_writes are on")
    synchronous = server.text("synchronous_commit")
    if synchronous not in REPLICATED:
        yield Finding(
            "synchronous_commit",
            Level.OK,
            f"it is {synchronous} by default{_from(server, 'synchronous_commit')}; the adapter "
            "sets it on for its own transactions",
        )


def _standbys(server: Server) -> Iterator[Finding]:
    names = server.text("synchronous_standby_names")
    if names:
        yield Finding("standbys", Level.OK, f"synchronous_standby_names is {names!r}")
        return
    attached = f"{server.standbys} attached" if server.standbys else "none is attached just now"
    yield Finding(
        "standbys",
        Level.NOTE,
        f"no standby is synchronous ({attached}): where one is promoted, branches whose vote was "
        "given may be gone, and committed ones may be prepared again or gone",
        "set synchronous_standby_names if a standby may ever be promoted; without standbys there "
        "is nothing to do",
    )


def _timeouts(server: Server, begin: Begin, settings: Settings) -> Iterator[Finding]:
    limits = ["transaction_timeout", "idle_in_transaction_session_timeout"]
    if begin.statement_timeout_ms is None:
        limits.append("statement_timeout")
    if begin.lock_timeout_ms is None:
        limits.append("lock_timeout")
    shorter = [name for name in limits if 0 < server.number(name) < settings.timeout * 1000]
    for name in shorter:
        told = (
            f"{name} is {server.number(name) / 1000:g} s{_from(server, name)}, shorter than the "
            f"deadline of a transaction ({settings.timeout:g} s)"
        )
        if name == "transaction_timeout":
            told += ": the server ends the session in the middle of the transaction"
            yield _must(name, told, f"{_reset(server, name, '0')}; or lower the setting timeout")
        elif name == "idle_in_transaction_session_timeout":
            told += "; every branch sets its own by its deadline, so that this one cuts nothing"
            yield Finding(name, Level.OK, told)
        else:
            told += ": a statement that takes longer fails, and its transaction is rolled back"
            fix = f"if that is not meant: {_reset(server, name, '0')}"
            yield Finding(name, Level.NOTE, told, fix)
    if not shorter:
        yield Finding("timeouts", Level.OK, f"none is below the deadline ({settings.timeout:g} s)")
    if idle := server.number("idle_session_timeout"):
        yield Finding(
            "idle_session_timeout",
            Level.OK,
            f"the server closes pooled connections that are idle for {idle / 1000:g} s; the "
            "adapter replaces them",
        )


def _clock(server: Server) -> Iterator[Finding]:
    off = abs(server.ahead)
    if off - server.unsure <= SKEW_SECONDS_MAX:
        yield Finding("clock", Level.OK, f"{off:.1f} s from this machine's")
        return
    yield Finding(
        "clock",
        Level.NOTE,
        f"the server's is {off:.1f} s {'ahead of' if server.ahead > 0 else 'behind'} this "
        "machine's: ages are shown wrong by as much, outcomes do not depend on it",
        "let both machines follow a time server (NTP)",
    )


def quoted(name: str) -> str:
    """The name of a role or a database as it is written in SQL."""
    return Identifier(name).as_string()


def _must(subject: str, message: str, fix: str) -> Finding:
    return Finding(subject, Level.MUST_CHANGE, message, fix)


def _room(server: Server) -> int:
    """How many connections the role may have at a time, those in use now among them."""
    room = server.number("max_connections")
    if server.is_superuser:
        return room
    room -= server.number("superuser_reserved_connections") + server.number("reserved_connections")
    limits = [each for each in (server.role_limit, server.database_limit) if each >= 0]
    return min(room, *limits) if limits else room


def _needed(pool_size: int) -> int:
    return pool_size + FINISHING_CONNECTIONS


def _from(server: Server, setting: str) -> str:
    """Where a setting was made, if that is not the server's own."""
    return {
        "user": f" by ALTER ROLE {quoted(server.role)}",
        "database": f" by ALTER DATABASE {quoted(server.database)}",
        "database user": f" by ALTER ROLE {quoted(server.role)} IN DATABASE",
        "client": " by the url or PGOPTIONS",
    }.get(server.values[setting].source, "")


def _reset(server: Server, setting: str, value: str) -> str:
    """The SQL, or the words, that undo a setting for this role where it was made."""
    role, database = quoted(server.role), quoted(server.database)
    return {
        "user": f"ALTER ROLE {role} RESET {setting}",
        "database": f"ALTER DATABASE {database} RESET {setting}",
        "database user": f"ALTER ROLE {role} IN DATABASE {database} RESET {setting}",
        "client": f"take {setting} out of the url and of PGOPTIONS",
    }.get(server.values[setting].source, f"ALTER ROLE {role} SET {setting} = {value}")


def _processes(count: int) -> str:
    return f"{count} process{'' if count == 1 else 'es'}"


def _age(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _version(number: int) -> str:
    return f"{number // 10000}.{number % 10000}"
