"""The forms whose outcome is not yet what their data states, and why. Strict: a cure shows."""

from __future__ import annotations

BROKEN: dict[str, str] = {
    "google/recurrentgemma-2b": "`plan` accepts it",
    "HuggingFaceTB/SmolVLM-256M-Instruct": "its forward needs the towers",
}
"""Name of a form → reason."""
