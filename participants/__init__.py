"""Adapters: resources that can take part in a transaction, a module or a package each."""

from __future__ import annotations
