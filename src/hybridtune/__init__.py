"""hybridtune: hybrid fine-tuning of pretrained language models.

Names are loaded on first use, so that `import hybridtune` costs nothing and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "tune": "api",
    "load": "api",
    "check": "api",
    "compare": "api",
    "Run": "api",
    "Recipe": "recipe",
    "Stage": "recipe",
    "Rule": "recipe",
    "HybridTrainer": "train",
    "HybridtuneError": "errors",
    "Trainer": "drop_in",
    "TrainingArguments": "drop_in",
    "AutoTokenizer": "drop_in",
    "AutoModelForSequenceClassification": "drop_in",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from .api import Run as Run
    from .api import check as check
    from .api import compare as compare
    from .api import load as load
    from .api import tune as tune
    from .drop_in import AutoModelForSequenceClassification as AutoModelForSequenceClassification
    from .drop_in import AutoTokenizer as AutoTokenizer
    from .drop_in import Trainer as Trainer
    from .drop_in import TrainingArguments as TrainingArguments
    from .errors import HybridtuneError as HybridtuneError
    from .recipe import Recipe as Recipe
    from .recipe import Rule as Rule
    from .recipe import Stage as Stage
    from .train import HybridTrainer as HybridTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
