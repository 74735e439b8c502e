"""What has been put on a model, kept on the model itself; and how a model with something on it is saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, vocabulary
from .checkpoint import Base
from .compose import Assembly
from .errors import RecipeError
from .recipe import Stage, Strategy


@dataclass
class Tuned:
    """What has been put on a model, kept on it as `_hybridtune` for the next trainer to find.

    Attributes:
        assembly: the model and what is on it.
        base: what it was loaded from.
        strategy: the one stage that a trainer without a strategy of its own runs.
        tokenizer: whose vocabulary the model has, where it is not that of its base.
    """

    assembly: Assembly
    base: Base
    strategy: Strategy
    tokenizer: Any = None

    @classmethod
    def by(cls, strategy: str, stage: Stage, assembly: Assembly, base: Base, tokenizer: Any = None) -> Tuned:
        """What a stage has put there. Its rules are trained on; for how long, the next trainer's arguments say."""
        only = Strategy(name=strategy, stages=[Stage(name=stage.name, rules=stage.rules)])
        return cls(assembly, base, only, tokenizer if base.vocabulary else None)


def save_pretrained(
    model: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: dict[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """Stands in for a tuned model's own `save_pretrained`, whose files no `from_pretrained` could read rightly.

    Args:
        model: the model; one that nothing sits on is saved as transformers does.
        save_directory: where to.
        is_main_process: whether this process writes.
        state_dict: only where nothing sits on the model.
        push_to_hub: whether to upload it too, to the repository `repo_id`, or one that is called as the folder.
        **kwargs: as transformers takes them.

    Raises:
        RecipeError: something is asked for that cannot be done with a delta.
    """
    there: Tuned | None = getattr(model, "_hybridtune", None)
    if there is None or not there.assembly.attachments:
        if is_main_process:  # an earlier delta would be read instead
            (Path(save_directory) / checkpoint.MANIFEST).unlink(missing_ok=True)
        model = vocabulary.folded(model)
        type(model).save_pretrained(model, save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
        return
    undone = ["state_dict"] if state_dict is not None else []
    undone += [key for key in ("variant", "distributed_checkpoint") if kwargs.get(key)]
    if undone:
        raise RecipeError(
            f"save_pretrained: {', '.join(undone)} cannot be kept: the model is saved as a delta of its own weights",
            found=f"{there.assembly.attachments[0]} on it",
            mend="leave it out; put other weights into the model first, with load_state_dict",
        )
    if is_main_process:
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        strategy = there.strategy.model_dump(mode="json", exclude_none=True)
        checkpoint.write(folder, there.assembly, there.base, strategy=strategy)
        model.config.save_pretrained(folder)
        if there.tokenizer is not None:
            there.tokenizer.save_pretrained(folder)
        if push_to_hub:  # saves once more, into a folder of its own
            model.push_to_hub(kwargs.pop("repo_id", folder.resolve().name), **kwargs)
