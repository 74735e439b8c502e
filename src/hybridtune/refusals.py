"""What a trainer with a strategy cannot do, said before anything is put on its model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.trainer_utils import has_length

from . import vocabulary
from .engine import precision
from .errors import RecipeError
from .recipe import Strategy
from .stage import CHECKPOINTING
from .tuned import Tuned

if TYPE_CHECKING:
    from .train import HybridTrainer


def refuse(trainer: HybridTrainer, there: Tuned | None, strategy: Strategy) -> None:
    """Says what would be trained or saved wrongly, and silently so.

    Args:
        trainer: that is to run the strategy.
        there: what is on its model already.
        strategy: as asked for.

    Raises:
        RecipeError: it cannot run there.
    """
    if trainer.model_init is not None:
        raise RecipeError("model_init: a strategy is put on one model", mend="give model= instead")
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise RecipeError(
            "optimizers: a strategy makes its own for every stage, with a group for every rule",
            mend="give optim and lr_scheduler_type in TrainingArguments, or optimizer_cls_and_kwargs",
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise RecipeError(
            "a strategy cannot be trained under FSDP or DeepSpeed yet", mend="torchrun alone (DDP), or one process"
        )
    if trainer.args.fp16:
        precision.refuse_fp16(trainer.args.device)
    rules = [rule for stage in strategy.stages for rule in stage.rules]
    if trainer.args.world_size > 1 and any(rule.active for rule in rules):
        raise RecipeError("active: layers cannot take turns in several processes yet", mend="one process")
    asks = getattr(trainer.args, CHECKPOINTING) or any(stage.gradient_checkpointing for stage in strategy.stages)
    if asks and not getattr(trainer.model, "supports_gradient_checkpointing", False):
        raise RecipeError(
            f"gradient_checkpointing: {type(trainer.model).__name__} does not support it",
            mend="leave it out; lower per_device_train_batch_size, or give max_tokens_per_micro_batch",
        )
    tokenizer = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    changed = there.base.vocabulary if there is not None else None
    if changed and tokenizer is not None and vocabulary.digest(tokenizer) != changed:
        raise RecipeError(
            "processing_class: is not the tokenizer that the model's vocabulary was changed to",
            mend="take the one that lies beside the model: AutoTokenizer.from_pretrained(FOLDER)",
        )
    endless = trainer.train_dataset is not None and not has_length(trainer.train_dataset)
    for stage in strategy.stages:
        if endless and stage.num_train_epochs is not None and stage.max_steps is None:
            raise RecipeError(
                f"stage {stage.name}: num_train_epochs cannot be counted, train_dataset has no length",
                mend="give the stage max_steps",
            )
    if there is None and any(hasattr(module, "base_layer") for module in trainer.model.modules()):
        raise RecipeError(
            "strategy: PEFT sits on the model already; a checkpoint could not name what it starts from",
            mend="load the plain model and give LoRA as a rule: {part: layers, method: lora}",
        )
