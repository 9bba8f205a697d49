"""The tables of an SQLite log, as the steps that lead from each version to the next.

A new file goes through all of them, so that it has the tables of one that is as old as can be. A
step only adds tables: an older program that has the file open at that time reads and writes by the
tables it knows, which stay as they are, and goes on unharmed. If it opens the file again, it
refuses it by its version.
"""

from __future__ import annotations

APPLICATION_ID = 0x53796E63
"""The letters `Sync`, in the header of every file that is ours."""

_FIRST = """
CREATE TABLE log (
    only_row   INTEGER PRIMARY KEY CHECK (only_row = 1),
    id         TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    horizon    BLOB NOT NULL
);
-- Sixteen bytes of the id order as its text does. `decision` is never rewritten. `unmarked` holds
-- eight bytes for each named branch that has not ended. `answer` is NULL unless the decision is
-- delegated; then it is 'awaited', 'commit' or 'abort'.
CREATE TABLE record (
    id         BLOB PRIMARY KEY,
    decision   BLOB NOT NULL,
    unmarked   BLOB NOT NULL,
    answer     TEXT,
    unfinished INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX record_unfinished ON record (id) WHERE unfinished = 1;
-- `attachment` is that of the holder's commit, kept here beyond its record.
CREATE TABLE claim (
    space      TEXT NOT NULL,
    key        TEXT NOT NULL,
    holder     BLOB NOT NULL,
    attachment BLOB NOT NULL,
    PRIMARY KEY (space, key)
) WITHOUT ROWID;
CREATE INDEX claim_by_holder ON claim (holder);
-- The current attempt under a key, by its transaction's id.
CREATE TABLE attempt (
    space      TEXT NOT NULL,
    key        TEXT NOT NULL,
    id         BLOB NOT NULL,
    timeout_ms INTEGER NOT NULL,
    member     TEXT NOT NULL,
    PRIMARY KEY (space, key)
) WITHOUT ROWID;
CREATE INDEX attempt_by_id ON attempt (id);
CREATE TABLE resource (
    name     TEXT NOT NULL UNIQUE,
    identity TEXT NOT NULL,
    clear    BLOB NOT NULL,
    swept_ms INTEGER NOT NULL
);
CREATE TABLE incident (
    gid         TEXT NOT NULL UNIQUE,
    participant TEXT NOT NULL,
    kind        TEXT,
    evidence    TEXT NOT NULL,
    noticed_ms  INTEGER NOT NULL
);
"""

_WORDS = """-- What a person said about a branch (by its gid) or a transaction (by its id).
CREATE TABLE word (
    subject  TEXT NOT NULL UNIQUE,
    verdict  TEXT,
    reason   TEXT NOT NULL,
    given_by TEXT NOT NULL,
    given_ms INTEGER NOT NULL
);
"""

STEPS = (_FIRST, _WORDS)
"""What to execute in a file of each version, beginning with an empty one, to reach the next."""

VERSION = len(STEPS)
