"""One file a method: its file name is its name. A user's own file works by its path, as `method: ./mine.py`.

The contract of such a file:

    SUMMARY, FORMULA, SOURCE       what `hybridtune methods` prints
    MERGES                         True, or why its result cannot be folded into the model's weights
    WRAPS                          True where it replaces the matrices that it sits on: two such on one are refused
    class Options(BaseModel)       its options with their defaults
    learning_rate(part, width)     default learning rate for a model of this hidden width
    WEIGHT_DECAY                   default weight decay
    claims(part, options)          names of the tensors that are its own: it trains them or keeps them frozen
    attach(model, part, options)   puts it on the model; returns the names of the parameters to train
    merge(model, names)            folds what was attached into the weights (where MERGES is True)
    detach(model, names)           takes what was attached off again

`part` comes less what later rules have claimed. No method sets `requires_grad`: `train.py` does, from the names.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from pathlib import Path
from typing import Any, Protocol, cast

from pydantic import BaseModel, ValidationError
from torch import nn

from ..anatomy import Part
from ..errors import MethodError, RecipeError, nearest, unknown


class Method(Protocol):
    """What a method's module offers; see above."""

    SUMMARY: str
    FORMULA: str
    SOURCE: str
    MERGES: bool | str
    WRAPS: bool
    WEIGHT_DECAY: float
    Options: type[BaseModel]

    def learning_rate(self, part: Part, width: int) -> float: ...
    def claims(self, part: Part, options: Any) -> tuple[str, ...]: ...
    def attach(self, model: nn.Module, part: Part, options: Any) -> list[str]: ...
    def merge(self, model: nn.Module, names: list[str]) -> None: ...
    def detach(self, model: nn.Module, names: list[str]) -> None: ...


def names() -> list[str]:
    """Names of the methods that the package brings."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Method:
    """Finds a method by its name, or by the path of a user's own file.

    Raises:
        MethodError: there is no such method, or the file does not keep the contract.
    """
    if name.endswith(".py"):
        return _load_file(Path(name))
    if name not in names():
        raise MethodError(
            f"method: {unknown('method', name, names())}", expected=", ".join(names()) + ", or a path such as ./mine.py"
        )
    return cast(Method, importlib.import_module(f".{name}", __name__))


def options_of(method: Method, name: str, given: dict[str, Any]) -> BaseModel:
    """Checks a rule's options with the method's own Options.

    Raises:
        RecipeError: an option is unknown or has a value it cannot have.
    """
    known = method.Options.model_fields
    for option in given:
        if option not in known:
            guess = nearest(option, [*known, "learning_rate", "weight_decay"])
            raise RecipeError(
                f"method {name}: unknown option {option}" + (f", did you mean {guess}?" if guess else ""),
                expected=", ".join(known) or "no options",
            )
    try:
        return method.Options(**given)
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(step) for step in first["loc"])
        raise RecipeError(
            f"method {name}: {option} cannot be what it is", found=repr(first.get("input")), expected=first["msg"]
        ) from None


def _load_file(path: Path) -> Method:
    if not path.is_file():
        raise MethodError(f"method: {path}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"hybridtune_method_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [name for name in ("Options", "learning_rate", "claims", "attach", "detach") if not hasattr(module, name)]
    if missing:
        raise MethodError(
            f"method: {path}: lacks {', '.join(missing)}", mend="see hybridtune/methods/__init__.py for the contract"
        )
    for name, value in (
        ("SUMMARY", path.stem),
        ("FORMULA", ""),
        ("SOURCE", str(path)),
        ("WRAPS", False),
        ("WEIGHT_DECAY", 0.0),
    ):
        if not hasattr(module, name):
            setattr(module, name, value)
    if not hasattr(module, "MERGES"):
        module.MERGES = hasattr(module, "merge") or "it has no merge()"  # type: ignore[attr-defined]
    return cast(Method, module)
