"""Messages: delayed, lost before or after they took effect, delivered twice.

A call is two events of the world's queue, the arrival and the answer. What is lost is known when it
is drawn, so only one event tells the caller that it got no answer; a late answer counts as lost.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappush
from typing import TYPE_CHECKING, Any

from tests.simulation.faults import CALL_TIMEOUT, Options
from tests.simulation.resources import HANGS

if TYPE_CHECKING:
    from tests.simulation.processes import Process
    from tests.simulation.world import World

NEVER = float("inf")
WRITES = frozenset(
    (
        "propose",
        "record_answer",
        "name_attempt",
        "finish",
        "raise_horizon",
        "forget",
        "swept",
        "report",
    )
)
"""The operations of a log that write to its disk."""


class Network:
    """The links between processes, resources and logs of one world."""

    def __init__(self, world: World, options: Options) -> None:
        self.world = world
        self.loss = options.rate("loss", 0.005, 0.12)
        self.lost_answer = self.loss + options.rate("lost-answer", 0.005, 0.15)
        self.duplicate = self.lost_answer + options.rate("duplicate", 0.01, 0.2)
        self.delay = self.duplicate + options.rate("delay", 0.01, 0.2)
        self.delay_most = options.rate("delay", 0.5, 4.0)

    def heal(self) -> None:
        self.loss = self.lost_answer = self.duplicate = self.delay = 0.0

    def call(
        self,
        process: Process,
        server: Any,
        operation: Callable[[Any], Any],
        request: Any,
        done: Callable[[Any, Any], None],
        context: Any,
        once: bool = False,
        extra: float = 0.0,
    ) -> float:
        """Ask a server; `done(context, answer)` follows in the process, with None for no answer.

        `once`: the message travels on a session of its own, so it is never delivered twice. `extra`
        delays it.
        Returns when it arrives, or `NEVER`.
        """
        if not process.alive:
            return NEVER
        if process.paused:
            asked = (process, server, operation, request, done, context, once, extra)
            process.backlog.append((self.call, asked))
            return NEVER
        world = self.world
        draw = world.random
        if (process.lacks or process.log_broken) and not process.reaches(server, operation):
            self._no_answer(process, done, context, world.now + 0.02)
            return NEVER
        if process.crash_rate and draw() < process.crash_rate:
            process.crash()
            return NEVER
        now = world.now
        arrival = now + 0.002 + 0.02 * draw() + extra
        lost = False
        if self.delay:
            chance = draw()
            if chance < self.delay:
                if chance < self.loss:
                    world.count("a request is lost")
                    self._no_answer(process, done, context, now + CALL_TIMEOUT)
                    return NEVER
                if chance < self.lost_answer:
                    lost = True
                elif chance < self.duplicate:
                    if not once:
                        self._again(now + 2.0 * draw() ** 2, server, operation, request)
                else:
                    arrival += self.delay_most * draw() ** 2
                    world.quiet_at = max(world.quiet_at, arrival)
        if arrival - now > CALL_TIMEOUT:
            lost = True
        world.sequence += 1
        heappush(
            world.queue,
            (
                arrival,
                world.sequence,
                self._arrive,
                (process, server, operation, request, done, context, lost),
            ),
        )
        if lost:
            self._no_answer(process, done, context, now + CALL_TIMEOUT)
        return arrival

    def _arrive(
        self,
        process: Process,
        server: Any,
        operation: Callable[[Any], Any],
        request: Any,
        done: Callable[[Any, Any], None],
        context: Any,
        lost: bool,
    ) -> None:
        world = self.world
        answer = None
        if server.down:
            world.count(_DOWN.get(operation.__name__, "a request finds its server down"))
        elif process.disk_fails and operation.__name__ in WRITES:
            self._break_disk(process, operation, request)
        else:
            answer = operation(request)
            if lost:
                world.count(_LOST.get(operation.__name__, "an answer is lost"))
        if lost or not process.alive:
            return
        if answer is HANGS:
            request.answer = lambda vote: self._let_go(process, done, context, vote)
            return
        if world.healed:
            process.deliver(done, context, answer)
            return
        world.sequence += 1
        heappush(
            world.queue,
            (
                world.now + 0.002 + 0.02 * world.random(),
                world.sequence,
                process.deliver,
                (done, context, answer),
            ),
        )

    def _let_go(
        self, process: Process, done: Callable[[Any, Any], None], context: Any, answer: Any
    ) -> None:
        """A server that kept its caller waiting answers."""
        self.world.at(0.01, process.deliver, done, context, answer)

    def _break_disk(self, process: Process, operation: Callable[[Any], Any], request: Any) -> None:
        """An fsync fails: what was written may stand; the process uses its log no more, and ends.

        Whoever runs it starts it again.
        """
        world = self.world
        process.disk_fails, process.log_broken = False, True
        world.note(f"the log breaks for {process}")
        if world.random() < 0.5:
            operation(request)
            world.count("S15 a write stands though its fsync failed")
        else:
            world.count("S15 a write is gone with its fsync")
        seconds = 0.2 + world.random()
        world.quiet_at = max(world.quiet_at, world.now + seconds)
        world.at(seconds, process.crash)

    def _again(self, at: float, server: Any, operation: Callable[[Any], Any], request: Any) -> None:
        self.world.quiet_at = max(self.world.quiet_at, at + 0.02)
        self.world.at(at - self.world.now + 0.02, self._arrive_again, server, operation, request)

    def _arrive_again(self, server: Any, operation: Callable[[Any], Any], request: Any) -> None:
        if not server.down:
            self.world.count("a request is delivered twice")
            operation(request)

    def _no_answer(
        self, process: Process, done: Callable[[Any, Any], None], context: Any, at: float
    ) -> None:
        self.world.at(at - self.world.now, process.deliver, done, context, None)


_DOWN = {
    "propose": "S12 a decision waits for the log",
    "commit": "S25 a COMMIT PREPARED cannot reach its server and is tried again",
}

_LOST = {
    "propose": "S09 the log's answer is lost after it wrote",
    "prepare": "S20 a PREPARE's answer is lost",
    "commit": "S24 a COMMIT PREPARED's answer is lost",
    "commit_one_phase": "a one-phase commit's answer is lost",
    "ask": "a last resource's answer is lost",
}
