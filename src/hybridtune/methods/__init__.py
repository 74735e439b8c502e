"""One file a method: its file name is its name. A user's own file works by its path, as `method: ./mine.py`.

The contract of such a file; what stands in brackets may be left out:

    class Options(BaseModel)       its options with their defaults
    learning_rate(part, width)     default learning rate for a model of this hidden width
    attach(model, part, options)   puts it on the model; returns the names of the parameters to train
    [claims(part, options)]        names of the tensors that are its own: it trains them or keeps them frozen
    [changes(part, options)]       names of the model's own tensors that attach itself changes
    [rate(name, options)]          factor on the rule's learning rate for one of its parameters
    [positions(options)]           how many positions of the model's sequence it takes
    [detach(model, names)]         takes what was attached off again; needed where attach adds parameters
    [merge(model, names)]          folds what was attached into the weights and takes it off
    [MERGES]                       why what it adds cannot be folded into the model's weights, where it cannot
    [WRAPS]                        True where it replaces the matrices that it sits on: two such on one are refused
    [FREEZES]                      True where it keeps what it claims from being trained
    [PER_TOKEN]                    True where its hooks in layers look at one token at a time: rows run without padding
    [WEIGHT_DECAY]                 default weight decay
    [config(options, part, **keys)]   PEFT's configuration of it, where PEFT can load what it adds
    [SUMMARY, FORMULA, SOURCE]     what `hybridtune methods` prints

`part` comes less what later rules have claimed. No method sets `requires_grad`: `train.py` does, from the names.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ValidationError
from torch import nn

from .. import own_file
from ..anatomy import Part
from ..errors import MethodError, RecipeError, nearest, unknown
from ..recipe import Rule


def _no_names(part: Part, options: Any) -> tuple[str, ...]:
    return ()


def _nothing(model: nn.Module, names: list[str]) -> None:
    """Nothing was added."""


@dataclass(frozen=True)
class Method:
    """A method as its file gives it; see above."""

    name: str
    module: ModuleType
    Options: type[BaseModel]
    learning_rate: Callable[[Part, int], float]
    attach: Callable[[nn.Module, Part, Any], list[str]]
    claims: Callable[[Part, Any], tuple[str, ...]] = _no_names
    changes: Callable[[Part, Any], tuple[str, ...]] = _no_names
    rate: Callable[[str, Any], float] = lambda name, options: 1.0
    positions: Callable[[Any], int] = lambda options: 0
    merge: Callable[[nn.Module, list[str]], None] = _nothing
    detach: Callable[[nn.Module, list[str]], None] = _nothing
    MERGES: bool | str = True
    WRAPS: bool = False
    FREEZES: bool = False
    WEIGHT_DECAY: float = 0.0
    config: Callable[..., Any] | None = None
    SUMMARY: str = ""
    FORMULA: str = ""
    SOURCE: str = ""

    @property
    def documentation(self) -> str:
        """What the file says of itself."""
        return inspect.getdoc(self.module) or ""


def names() -> list[str]:
    """Names of the methods that the package brings."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> Method:
    """Finds a method by its name, or by the path of a user's own file.

    Raises:
        MethodError: there is no such method, or the file does not keep the contract.
    """
    if own_file.is_path(name):
        return _method(name, own_file.load(name, "method", MethodError))
    if name not in names():
        raise MethodError(
            f"method: {unknown('method', name, names())}",
            at=("method",),
            given=name,
            expected=", ".join(names()) + ", or a path such as ./mine.py",
        )
    return _brought(name)


@functools.cache
def _brought(name: str) -> Method:
    return _method(name, importlib.import_module(f".{name}", __name__))


def _method(name: str, module: ModuleType) -> Method:
    """Raises MethodError where the module lacks what it must have."""
    own = [field for field in fields(Method) if field.name not in ("name", "module")]
    missing = [field.name for field in own if field.default is MISSING and not hasattr(module, field.name)]
    if missing:
        raise MethodError(
            f"method: {name}: lacks {', '.join(missing)}",
            mend="the contract stands at the top of hybridtune/methods/__init__.py",
        )
    given = {field.name: getattr(module, field.name) for field in own if hasattr(module, field.name)}
    if hasattr(module, "detach") and not hasattr(module, "merge"):
        given.setdefault("MERGES", "it has no merge()")
    given.setdefault("SUMMARY", Path(name).stem)
    return Method(name, module, **given)


def options_of(method: Method, given: dict[str, Any]) -> BaseModel:
    """Checks a rule's options with the method's own Options.

    Raises:
        RecipeError: an option is unknown or has a value it cannot have.
    """
    made, mistakes = _tried(method, given)
    if made is None:
        raise _mistake(method, mistakes[0])
    return made


def check(rule: Rule) -> None:
    """Refuses what is wrong with a rule whatever the model is, and whatever an earlier stage has put on it.

    Raises:
        MethodError: there is no such method.
        RecipeError: an option is unknown or has a value it cannot have.
    """
    method = load(rule.method)
    _, mistakes = _tried(method, rule.options)
    # The method's own validators may look at other options too, which an earlier stage may give.
    alone = [one for one in mistakes if "error" not in one.get("ctx", {})]
    if alone:
        raise _mistake(method, alone[0])


def _tried(method: Method, given: dict[str, Any]) -> tuple[BaseModel | None, list[Any]]:
    """A method's options, or what pydantic says of them.

    Raises:
        RecipeError: an option is unknown.
    """
    _refuse_unknown(method, given)
    try:
        return method.Options(**given), []
    except ValidationError as error:
        return None, error.errors()


def _refuse_unknown(method: Method, given: dict[str, Any]) -> None:
    known = method.Options.model_fields
    for option, value in given.items():
        if option not in known:
            guess = nearest(option, [*known, "learning_rate", "weight_decay"])
            guess = guess or next((real for real in known if option in _WORDS.get(real, ())), None)
            raise RecipeError(
                f"method {method.name}: unknown option {option}" + (f", did you mean {guess}?" if guess else ""),
                at=(option,),
                given=value,
                expected=", ".join(known) or "no options",
            )


def _mistake(method: Method, first: Any) -> RecipeError:
    """What pydantic says of an option."""
    option = ".".join(map(str, first["loc"])) or "its options"
    cause = first.get("ctx", {}).get("error")
    return RecipeError(
        f"method {method.name}: {option}: {cause or first['msg'].removeprefix('Input ')}",
        at=first["loc"],
        given=first.get("input"),
        found=repr(first.get("input")),
    )


# What people call the options of PEFT's names.
_WORDS = {
    "r": ("rank", "lora_rank", "lora_r"),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    "num_virtual_tokens": ("length", "tokens", "prompt_length", "prefix_length"),
    "bottleneck": ("r", "rank", "dim", "reduction_factor"),
    "loraplus_lr_ratio": ("lora_plus", "loraplus"),
}
