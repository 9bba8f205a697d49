"""Sagas: compensated transactions. Not built yet; the package holds their place in the layout."""

from __future__ import annotations
