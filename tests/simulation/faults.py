"""What may go wrong in one world: drawn from its seed, kind by kind.

Swarm testing: each kind of fault is on in half of the worlds, with a rate of its own, so that no
kind always hides behind another. Everything is drawn in one fixed order; switching a kind off
afterwards, as the shrinker does, leaves all other draws as they were.
"""

from __future__ import annotations

from random import Random

# Times in seconds of the world; only their relations matter. They keep those of `Settings`:
# retention is more than twice the longest deadline, and members beat several times in a round.
DEADLINE = 1.0
TIMEOUT_MAX = 2.0
RETENTION = 5.0
ABSENCE_LIMIT = 60.0
KEY_RETENTION = 300.0
SWEEP_INTERVAL = 1.2
BEAT_INTERVAL = 0.4
HOUSEKEEPING = 1.5
PUBLISHED_AFTER = 0.6
MARKS_INTERVAL = 0.15
CALL_TIMEOUT = 0.35
GRACE = 0.4

KINDS = (
    "loss",
    "lost-answer",
    "duplicate",
    "delay",
    "late-prepare",
    "crash",
    "crash-at-decision",
    "pause",
    "pause-at-decision",
    "sleepy-sweep",
    "resource-down",
    "resource-restart",
    "log-down",
    "clocks",
    "marks-lost",
    "early-horizon",
    "members-wrong",
    "person",
    "two-logs",
    "vote-no",
    "short-deadline",
    "absent-sweeper",
)
"""Every kind of fault, in the order in which they are drawn."""

RARE = (
    "sync-stall",
    "resource-full",
    "few-slots",
    "locked-out",
    "promotion",
    "resource-restored",
    "log-full",
    "log-breaks",
    "log-restored",
    "log-wiped",
    "poison",
    "participant-removed",
    "crash-all",
    "deadlock",
)
"""Disasters: each is on in one of eight worlds, unless `_CHANCES` says otherwise."""

SHAPES = ("plain", "one-phase", "read-only", "remote", "last-resource", "handed", "keyed")
"""Every shape of a client's transaction."""

_SHAPE_WEIGHTS = (9, 2, 2, 4, 3, 3, 5)


class Options:
    """The drawn world: its size, the fault kinds that are on, and the rate of each.

    `dropped` and `only` are what the shrinker takes away; `salt` stirs the events but not the plan.
    """

    __slots__ = (
        "_by_weight",
        "cancel_prepare",
        "dropped",
        "fresh_log",
        "members_linger",
        "only",
        "processes",
        "rates",
        "resources",
        "restart_all",
        "safety",
        "salt",
        "seed",
        "shapes",
        "shortened",
        "transactions",
    )

    def __init__(
        self,
        seed: int,
        *,
        transactions: int = 20,
        dropped: tuple[str, ...] = (),
        only: tuple[int, ...] | None = None,
        safety: float | None = None,
        salt: int = 0,
    ) -> None:
        draw = Random(f"options {seed}")
        self.seed = seed
        self.transactions = transactions
        self.dropped = dropped
        self.only = only
        self.salt = salt
        self.processes = draw.choice((2, 2, 3, 3, 4))
        self.resources = draw.choice((2, 2, 3, 4))
        length = 1.0 + 11.0 * draw.random() ** 2
        self.safety = length if safety is None else safety
        self.shortened = self.safety != length
        self.cancel_prepare = draw.random() < 0.5
        self.members_linger = draw.choice((0.0, 0.0, 1.5))
        self.fresh_log = draw.random() < 0.3
        self.restart_all = draw.random() < 0.5
        self.rates: dict[str, float] = {}
        for kind in KINDS:
            on, rate = draw.random() < _CHANCES.get(kind, 0.5), draw.random()
            if on and kind not in dropped:
                self.rates[kind] = rate
        rare = Random(f"disasters {seed}").random
        for kind in RARE:
            on, rate = rare() < _CHANCES.get(kind, 0.125), rare()
            if on and kind not in dropped:
                self.rates[kind] = rate
        chosen = [shape for shape in SHAPES if draw.random() < 0.6] or ["plain"]
        self.shapes = tuple(chosen)
        self._by_weight = [
            shape for shape in chosen for _ in range(_SHAPE_WEIGHTS[SHAPES.index(shape)])
        ]

    def on(self, kind: str) -> bool:
        return kind in self.rates

    def rate(self, kind: str, least: float, most: float) -> float:
        """The rate of a kind, scaled into a range with small values more likely; 0.0 when off."""
        drawn = self.rates.get(kind)
        return 0.0 if drawn is None else least + (most - least) * drawn * drawn

    def shape_at(self, drawn: float) -> str:
        """The shape for a number drawn from 0 to 1, each by its weight."""
        return self._by_weight[int(drawn * len(self._by_weight))]

    def command(self, bug: str = "") -> str:
        """The line that replays exactly this world."""
        parts = ["python -m tests.simulation", f"--seed {self.seed}"]
        if bug:
            parts.append(f"--bug {bug}")
        if self.dropped:
            parts.append(f"--drop {','.join(self.dropped)}")
        if self.only is not None:
            parts.append(f"--only {','.join(map(str, self.only)) or 'none'}")
        if self.shortened:
            parts.append(f"--safety {self.safety!r}")
        if self.salt:
            parts.append(f"--salt {self.salt}")
        return " ".join(parts)

    def describe(self) -> str:
        rates = ", ".join(f"{kind} {rate:.2f}" for kind, rate in self.rates.items())
        return (
            f"{self.processes} coordinators, {self.resources} resources, "
            f"{self.safety:.1f} s of faults; on: {rates or 'nothing'}; "
            f"shapes: {', '.join(self.shapes)}"
        )


# Kinds that change what a whole world can show are on less often than in half of the worlds.
_CHANCES = {
    "two-logs": 0.25,
    "early-horizon": 0.2,
    "person": 0.2,
    "log-down": 0.35,
    "resource-down": 0.35,
    "members-wrong": 0.3,
    "pause": 0.35,
    "short-deadline": 0.35,
    "crash": 0.5,
    "absent-sweeper": 0.3,
    "resource-restored": 0.3,
}
