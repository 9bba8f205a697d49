"""Both faces have the same verbs with the same parameters: the public names are compared.

A pair is one line. What differs on purpose stands in `EXCEPTIONS`, each with its reason; one that
is not needed any more is a failure.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import get_overloads

import pytest

from coordinator.blocking import BlockingCoordinator
from coordinator.coordinator import Coordinator
from coordinator.scope import BlockingScope, Scope
from coordinator.testing import (
    assert_atomic,
    assert_atomic_blocking,
    rolled_back,
    rolled_back_blocking,
)
from participants.memory import BlockingMemory, Memory
from participants.postgres.blocking import BlockingPostgreSQL
from participants.postgres.blocking_lease import BlockingLease
from participants.postgres.lease import Lease
from participants.postgres.participant import PostgreSQL

PAIRS: list[tuple[type, type]] = [
    (Coordinator, BlockingCoordinator),
    (Scope, BlockingScope),
    (Memory, BlockingMemory),
    (PostgreSQL, BlockingPostgreSQL),
    (Lease, BlockingLease),
]
FUNCTIONS: list[tuple[Callable[..., object], Callable[..., object]]] = [
    (assert_atomic, assert_atomic_blocking),
    (rolled_back, rolled_back_blocking),
]

PORT = ("open", "close", "prepare", "commit", "rollback", "commit_one_phase", "recover")
PROMPT = ("prepare_at_once", "commit_at_once")
EXCEPTIONS: dict[tuple[type, str], str] = {
    (Coordinator, "from_config"): "makes a coordinator, which then has both faces",
    (Coordinator, "options"): "internal: checks the arguments of both faces",
    (Coordinator, "is_closed"): "the same coordinator, whichever face is used",
    (Coordinator, "loop"): "there is one loop, whichever face is used",
    (Coordinator, "unreachable"): "the same objects, whichever face is used",
    (Coordinator, "participants"): "the same objects, whichever face is used",
    (Coordinator, "open.sweep"): "for a recovery run, which is asynchronous",
    (Coordinator, "open.tolerate_unreachable"): "for a recovery run, which is asynchronous",
    (BlockingCoordinator, "run"): "internal: the port of a synchronous scope",
    (Memory, "committed"): "a plain value, whoever asks",
    (Memory, "name"): "a plain value, whoever asks",
    (PostgreSQL, "name"): "a plain value, whoever asks",
    (PostgreSQL, "pool_size"): "a plain value, whoever asks",
    (PostgreSQL, "at_once"): "a plain value, whoever asks",
    (PostgreSQL, "check"): "for the command line, which is asynchronous",
    (PostgreSQL, "waiting"): "for the command line, which is asynchronous",
    (PostgreSQL, "role_sql"): "needs no loop and no transaction",
    (Lease, "wait.interval"): "of psycopg, whose two faces have different defaults",
    **{
        (each, name): "the port, which the engine calls on its event loop"
        for each in (Memory, PostgreSQL)
        for name in PORT
    },
    **{(PostgreSQL, name): "the port, which the engine calls on its loop" for name in PROMPT},
}


def verbs(face: type) -> dict[str, object]:
    """The public names that a face defines, also those by which `with` works."""
    found: dict[str, object] = {}
    for each in reversed(face.__mro__):
        if each.__module__.startswith(("coordinator.", "participants.")):
            found |= {name: value for name, value in vars(each).items() if is_public(name)}
    return {name.replace("__a", "__"): value for name, value in found.items()}


def is_public(name: str) -> bool:
    return not name.startswith("_") or name in ("__aenter__", "__aexit__", "__enter__", "__exit__")


def parameters(verb: object) -> dict[str, tuple[object, object]] | None:
    """Each parameter's kind and default, as users see them; None for what is no function."""
    if not callable(verb):
        return None
    seen = get_overloads(verb) or [verb]
    found = [each for shape in seen for each in inspect.signature(shape).parameters.values()]
    return {each.name: (each.kind, each.default) for each in found}


def differences(first: type, second: type) -> set[tuple[type, str]]:
    """The verbs, and `verb.parameter`s, that only one of the faces has, or has otherwise."""
    ours, theirs = verbs(first), verbs(second)
    found = {(first, name) for name in ours.keys() - theirs.keys()}
    found |= {(second, name) for name in theirs.keys() - ours.keys()}
    for name in ours.keys() & theirs.keys():
        mine, its = parameters(ours[name]), parameters(theirs[name])
        if mine is None or its is None:
            found |= {(first, name)} if mine != its else set()
            continue
        only_mine = {each for each in mine if its.get(each) != mine[each]}
        only_its = {each for each in its if mine.get(each) != its[each]} - only_mine
        found |= {(first, f"{name}.{each}") for each in only_mine}
        found |= {(second, f"{name}.{each}") for each in only_its}
    return found


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0].__name__)
def test_both_faces_have_the_same_verbs(pair: tuple[type, type]) -> None:
    found = differences(*pair)
    assert found - EXCEPTIONS.keys() == set()
    allowed = {(face, name) for face, name in EXCEPTIONS if face in pair}
    assert allowed - found == set(), "no longer needs its exception"


@pytest.mark.parametrize("pair", FUNCTIONS, ids=lambda pair: pair[0].__name__)
def test_functions_for_both_faces_have_the_same_parameters(
    pair: tuple[Callable[..., object], Callable[..., object]],
) -> None:
    assert parameters(pair[0]) == parameters(pair[1]) != {}


def test_the_comparison_finds_what_differs() -> None:
    class Asynchronous:
        async def same(self, name: str, *, timeout: float = 1) -> None: ...
        async def renamed(self, key: str) -> None: ...
        async def defaulted(self, timeout: float = 1) -> None: ...
        async def missing(self) -> None: ...
        async def __aenter__(self) -> None: ...

    class Synchronous:
        def same(self, name: str, *, timeout: float = 1) -> None: ...
        def renamed(self, name: str) -> None: ...
        def defaulted(self, timeout: float = 2) -> None: ...
        def more(self) -> None: ...
        def __enter__(self) -> None: ...

    for each in (Asynchronous, Synchronous):
        each.__module__ = "coordinator.planted"
    assert differences(Asynchronous, Synchronous) == {
        (Asynchronous, "missing"),
        (Asynchronous, "renamed.key"),
        (Asynchronous, "defaulted.timeout"),
        (Synchronous, "renamed.name"),
        (Synchronous, "more"),
    }
