"""What the methods that PEFT brings have in common: putting its layers on matrices by name, and taking them off."""

from __future__ import annotations

import re
import warnings
from typing import Any

from torch import nn

ADAPTER_NAME = "default"
_INFIX = re.compile(rf"\.{ADAPTER_NAME}(?=\.|$)")


def name_in_file(name: str) -> str:
    """The name that an added parameter has in PEFT's own files, which leave the adapter's name out."""
    return _INFIX.sub("", name)


def inject(model: nn.Module, config: Any, targets: list[str], infix: str) -> list[str]:
    """Puts PEFT's layers on matrices.

    Args:
        model: any model.
        config: PEFT's configuration; its target pattern matches the targets and nothing else.
        targets: names of the matrices.
        infix: how the names of the added parameters go on after the matrix's.

    Returns:
        Names of the added parameters.
    """
    from peft import inject_adapter_in_model

    noted = hasattr(model, "peft_config")
    with warnings.catch_warnings():  # PEFT finds GPT-2's transposed matrices itself, and says so every time
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        inject_adapter_in_model(config, model, ADAPTER_NAME)
    if not noted:
        del model.peft_config  # the next rule would get a warning for it
    inside = tuple(f"{name}.{infix}" for name in targets)
    return [name for name, _ in model.named_parameters() if name.startswith(inside)]


def take_off(model: nn.Module, names: list[str], infix: str, merge: bool = False) -> None:
    """Puts the plain matrices back in the place of PEFT's layers, merged or as they were."""
    for path in dict.fromkeys(name.split(infix)[0] for name in names):
        parent, _, child = path.rpartition(".")
        layer: Any = model.get_submodule(path)
        if merge:
            numbers = not layer.base_layer.weight.is_meta  # a rehearsal has none that could overflow
            layer.merge(safe_merge=numbers, adapter_names=[ADAPTER_NAME])
        setattr(model.get_submodule(parent), child, layer.base_layer)
