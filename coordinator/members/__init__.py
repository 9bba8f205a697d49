"""Who is alive, and what it is working on: the port and its implementations."""

from __future__ import annotations
