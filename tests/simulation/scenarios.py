"""What the worlds must reach, and how often: coverage of faults, not of lines.

`Sxx` is a failure scenario of one log and PostgreSQL, by its number in docs/reliability.md. It is
counted where it really happened: by what a server did, by what a coordinator then found, never
because a fault was drawn. `FLOORS` are for 5,000 worlds, and grow and shrink with their number;
`OFTEN` is the floor of all others.
"""

from __future__ import annotations

from tests.simulation.runner import Summary

FLOOR_SEEDS = 5_000
OFTEN = 100

SCENARIOS = (
    "S01 a crash before any PREPARE",
    "S02 a crash between two PREPAREs",
    "S02 recovery finds what a dead coordinator left undecided",
    "S03 a crash with all votes in hand",
    "S04 a crash between the decision and the second phase",
    "S04 recovery finds a commit standing and obeys",
    "S05 a crash in the middle of the second phase",
    "S06 a crash after the second phase, before the answer",
    "S07 a coordinator wakes with all votes in hand",
    "S07 who slept with all votes in hand finds an abort",
    "S07 who slept with all votes in hand is refused below the horizon",
    "S08 two coordinators drive one transaction",
    "S09 the log's answer is lost after it wrote",
    "S10 a commit comes after another's abort",
    "S12 a decision waits for the log",
    "S14 a decision waits for space in the log",
    "S15 a write is gone with its fsync",
    "S15 a write stands though its fsync failed",
    "S17 a branch that a restored log does not know is quarantined",
    "S17 a log is restored from a backup",
    "S18 a log is lost while branches of it are prepared",
    "S18 a sweep passes over another log's branches",
    "S19 a branch votes no",
    "S20 a PREPARE's answer is lost",
    "S21 a PREPARE lands after its rollback",
    "S22 a PREPARE hangs at a synchronous standby that is away",
    "S22 a rollback finds its branch busy and is tried again",
    "S23 a PREPARE succeeds with a warning and counts as no",
    "S24 COMMIT PREPARED is repeated after it committed",
    "S24 a COMMIT PREPARED's answer is lost",
    "S25 a COMMIT PREPARED cannot reach its server and is tried again",
    "S25 a COMMIT PREPARED finds the disk full and is tried again",
    "S25 a PREPARE finds the disk full",
    "S26 a resource restarts in the second phase",
    "S26 a resource restarts with prepared branches",
    "S28 a lost branch of a commit is shown to a person",
    "S28 a promised branch of a commit is lost",
    "S29 a branch that came back is committed again",
    "S29 a branch that had ended is prepared again",
    "S30 a branch of a restored database is quarantined",
    "S31 a person rolls a branch back by hand",
    "S31 what a person ended against the decision is shown",
    "S32 a PREPARE finds no slot",
    "S33 a COMMIT PREPARED is refused to the role and is tried again",
    "S33 a ROLLBACK PREPARED is refused to the role and is tried again",
    "S34 a deadlock across two resources is ended by a deadline",
    "S34 of two in a deadlock one goes on",
    "S43 a slow clock refuses to begin",
    "S43 it jumps by more than the retention",
    "S43 the clock of a living coordinator jumps",
    "S44 a key is called again",
    "S46 a process without the participant is asked to commit",
    "S46 a process without the participant is asked to rollback",
    "S46 a record cannot be read",
    "S46 all others end beside a record that cannot be read",
    "S47 a sweep finds many in doubt at once",
    "S48 an answer comes too late to be enlisted",
    "a branch is quarantined",
    "a caller learns that its key has committed",
    "a coordinator is paused",
    "a key's former attempt is below the horizon",
    "a key's next attempt begins after a recorded abort",
    "a last resource's answer is lost",
    "a living member looks dead",
    "a one-phase commit is resolved by the resource's own status",
    "a one-phase commit's answer is lost",
    "a one-phase commit's fate is lost with its server",
    "a proposal is refused below the horizon",
    "a request is delivered twice",
    "a request is lost",
    "a request without an answer is repeated under another branch",
    "a resource is unreachable",
    "a resource restarts",
    "a rollback waits for a PREPARE under way",
    "a sweep cannot reach a resource",
    "a sweeper sleeps in the middle of its round",
    "an answer is lost",
    "finished marks are lost",
    "records are forgotten",
    "somebody asks for an abort by id",
    "the horizon is raised early",
    "two callers race for a key",
    "votes are handed to a second coordinator",
)

FLOORS = {
    # Each needs two rare things: a disaster, and a shape or a phase that few are in just then.
    "S30 a branch of a restored database is quarantined": 50,
    "a last resource's answer is lost": 60,
    "a one-phase commit's fate is lost with its server": 30,
}

SHARES = {"committed": 0.25, "aborted": 0.15, "unknown": 0.005, "heuristic": 0.002}
"""The least part of all outcomes told that each must be."""


def missed(summary: Summary) -> list[str]:
    """What was reached too rarely in those worlds: one line for each."""
    lines = []
    for scenario in SCENARIOS:
        floor = FLOORS.get(scenario, OFTEN) * summary.seeds // FLOOR_SEEDS
        found = summary.counts.get(scenario, 0)
        if found < floor:
            lines.append(f"{scenario}: {found} times in {summary.seeds} worlds, expected {floor}")
    for outcome, share in SHARES.items():
        if summary.share(outcome) < share:
            lines.append(f"{outcome} told: {summary.share(outcome):.1%}, expected {share:.1%}")
    return lines
