"""`syncpoint bench`: how fast transfers over two databases are, against loops written by hand.

`run` measures in interleaved rounds on two servers of its own and tells the medians; `workload` is
the work, the same for every case; `handwritten` and `syncpoint` are the cases.
"""

from __future__ import annotations
