"""Every form, by its name."""

from __future__ import annotations

import importlib

from tests.support.published_forms.form import Form

_MODULES = (
    "llama",
    "mistral",
    "gemma",
    "dense",
    "gpt",
    "bloom",
    "mixtures",
    "deepseek",
    "hybrids",
    "state_spaces",
    "multimodal",
    "refused",
)


def _collected() -> dict[str, Form]:
    forms: dict[str, Form] = {}
    for module in _MODULES:
        for form in importlib.import_module(f"tests.support.published_forms.forms.{module}").FORMS:
            if form.name in forms:
                raise ValueError(f"{form.name} is there twice")
            forms[form.name] = form
    return forms


FORMS = _collected()
