"""`syncpoint bench`: how fast transfers over two databases are, against loops written by hand.

`run` measures part by part, each in interleaved rounds: `transfers` on two servers of its own,
`log_alone`, and `growth` with a log that has long been in use. `workload` is the work, the same for
every case; `handwritten` and `syncpoint` are the cases, and `cases` says which of them run.
`counting` counts what was used, `results` takes the medians, `bars` and `tables` tell them.
"""

from __future__ import annotations
