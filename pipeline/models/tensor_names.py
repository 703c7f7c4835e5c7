"""The names that a model's tensors have in its weight files, where transformers renames on loading.

transformers 5 keeps a table of renamings per model class (GPT-NeoX's `embed_out` became `lm_head`,
LLaVA's `language_model.model` became `model.language_model`), and saves under the old names again.
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
except ImportError:  # transformers 4: parameters have the names that are stored
    get_model_conversion_mapping = None


def renamed_tensors(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Name in the model -> name in the weight files, of the tensors whose names differ.

    `stored`: all names in the weight files. Tensors that are more than renamed (stacked, split) are
    left out, and so are those that the model does not have.
    """
    if get_model_conversion_mapping is None:
        return {}
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    names: dict[str, str] = {}
    for name in stored:
        target, converted = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if converted is None and target != name and target in state:
            names[target] = name
    return names
