"""Every form, by its name."""

from __future__ import annotations

import importlib

from tests.support.published.form import Form

_MODULES = ("llamas", "older", "modern", "mixtures", "hybrids", "multimodal", "refused")


def _collected() -> dict[str, Form]:
    forms: dict[str, Form] = {}
    for module in _MODULES:
        for form in importlib.import_module(f"tests.support.published.{module}").FORMS:
            if form.name in forms:
                raise ValueError(f"{form.name} is there twice")
            forms[form.name] = form
    return forms


FORMS = _collected()
