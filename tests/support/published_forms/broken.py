"""The forms whose outcome is not yet what their data states, and why. Strict: a cure shows."""

from __future__ import annotations

BROKEN: dict[str, str] = {}
"""Name of a form → reason."""
