"""Adapters (PEFT) beside a model: files that say how to change it, which are no part of it.

An adapter was trained on the dense weights, and its own weights are not copied. Its config without
them would send transformers looking for them, so neither belongs to a pruned model.
"""

from __future__ import annotations

from pathlib import Path

from storage.errors import ModelError

ADAPTER_CONFIG = "adapter_config.json"


def has_adapter(folder: Path) -> bool:
    """Whether the folder says that an adapter belongs to its model."""
    return (folder / ADAPTER_CONFIG).is_file()


def adapter_note(folder: Path, place: object) -> str | None:
    """One line for the user where an adapter lies beside a model, in `folder`; otherwise None.

    `place`: how the user named the folder. transformers would add the adapter if peft is installed.
    """
    if not has_adapter(folder):
        return None
    return f"{place}: the adapter beside the model ({ADAPTER_CONFIG}) is left out"


def refuse_adapter_alone(folder: Path, place: object) -> None:
    """Raises ModelError where a folder in which no model was found has an adapter.

    `place`: how the user named the folder.
    """
    if has_adapter(folder):
        raise ModelError(
            f"{place}: holds an adapter ({ADAPTER_CONFIG}) and no model; merge it into its model "
            "first: AutoPeftModelForCausalLM.from_pretrained(OLD).merge_and_unload()"
            ".save_pretrained(NEW), with peft"
        )
