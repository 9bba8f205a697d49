"""`syncpoint demo`: the problem and the answer, told on two real servers.

`story` tells it, `stage` is the two databases, `crash` starts a process and kills it at a named
place, `handwritten` and `transfer` are the programs that are killed. Every number that is told was
read from the servers; what does not come out as told ends the story with exit code 1.
"""

from __future__ import annotations
