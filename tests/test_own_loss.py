"""Where a model, a trainer or a user computes another loss than the task's, theirs is what is trained on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from torch import nn
from torch.nn import functional

from hybridtune import loss, tasks
from hybridtune.errors import RecipeError
from hybridtune.tasks.classification import Task
from hybridtune.train import HybridTrainer

Config = dict[str, Any]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WEIGHTS = (1.0, 30.0)


class WeighedForSequenceClassification(hf.BertForSequenceClassification):
    """Weighs classes, and smooths labels."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        if labels is not None:
            weight = torch.tensor(WEIGHTS)
            output["loss"] = functional.cross_entropy(output.logits, labels, weight=weight, label_smoothing=0.2)
        return output


class PenalizedForSequenceClassification(hf.BertForSequenceClassification):
    """Has weights that its logits do not depend on."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.price = nn.Parameter(torch.ones(3))

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        if output.loss is not None:
            output["loss"] = output.loss + 0.1 * self.price.square().sum()
        return output


class TupleForSequenceClassification(hf.BertForSequenceClassification):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        logits = super().forward(input_ids=input_ids, attention_mask=attention_mask).logits
        return (logits,) if labels is None else (functional.cross_entropy(logits, labels), logits)


def weighed_from_outside() -> hf.PreTrainedModel:
    model = tiny.classifier("llama", use_cache=False)
    weight = torch.tensor(WEIGHTS)
    model.loss_function = lambda labels, pooled_logits, **_: functional.cross_entropy(pooled_logits, labels, weight)
    return model


def of(kind: type[hf.PreTrainedModel]) -> Callable[[], hf.PreTrainedModel]:
    def build() -> hf.PreTrainedModel:
        torch.manual_seed(0)
        return kind(tiny.classifier("bert", **NO_DROPOUT).config)

    return build


class EachForSequenceClassification(hf.BertForSequenceClassification):
    """Gives a loss for every row, which a `compute_loss` is to weigh."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        if labels is not None:
            output["loss"] = functional.cross_entropy(output.logits, labels, reduction="none")
        return output


OTHERS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "weights and smoothing": of(WeighedForSequenceClassification),
    "a penalty": of(PenalizedForSequenceClassification),
    "a loss function": weighed_from_outside,
    "tuples": of(TupleForSequenceClassification),
    "return_dict=False": lambda: tiny.classifier("bert", return_dict=False, **NO_DROPOUT),
}


def trained(
    trainer: type[hf.Trainer],
    model: nn.Module,
    folder: Path,
    rows: Any = None,
    more: Config | None = None,
    **given: Any,
) -> tuple[hf.Trainer, dict[str, torch.Tensor]]:
    """A step of plain SGD over 16 rows; the trainer, and by how much it has moved the weights."""
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    fixed = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "seed": 0}
    steps = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    made = trainer(
        model,
        hf.TrainingArguments(
            str(folder), **fixed | steps | {"per_device_train_batch_size": 16, "max_grad_norm": 0.0} | given
        ),
        train_dataset=rows or tiny.rows(16),
        data_collator=hf.DataCollatorWithPadding(tiny.tokenizer()),
        **more or {},
    )
    made.remove_callback(hf.PrinterCallback)
    made.train()
    return made, {name: one.detach() - before[name] for name, one in model.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert any(bool(one.any()) for one in expected.values())
    for name, one in expected.items():
        torch.testing.assert_close(
            found[name], one, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", OTHERS)
def test_a_models_own_loss_is_used_where_it_is_another(name: str, tmp_path: Path) -> None:
    _, expected = trained(hf.Trainer, OTHERS[name](), tmp_path)
    with pytest.warns(UserWarning, match="the model's own loss is used, as Trainer does, not that of classification"):
        trainer, found = trained(HybridTrainer, OTHERS[name](), tmp_path)
    assert trainer.compute_loss_func is None
    assert_same(found, expected)


def test_all_rows_of_one_class_do_not_hide_weights(tmp_path: Path) -> None:
    """The weighted mean of one class is the plain one."""
    with pytest.warns(UserWarning, match="the model's own loss is used"):
        trained(HybridTrainer, weighed_from_outside(), tmp_path, rows=[row | {"labels": 0} for row in tiny.rows(16)])


KINDS: dict[str, tuple[Callable[[], nn.Module], Config]] = {
    **{
        name: (lambda name=name: tiny.classifier(name), {"labels": torch.tensor([1, 0, 1])})
        for name in tiny.CLASSIFIERS
    },
    "several classes": (lambda: tiny.classifier("bert", num_labels=5), {"labels": torch.tensor([4, 4, 4])}),
    "several labels a row": (
        lambda: tiny.classifier("bert", num_labels=3, problem_type="multi_label_classification"),
        {"labels": torch.tensor([[0.0, 1.0, 1.0]] * 3)},
    ),
    "several labels, by their type": (
        lambda: tiny.classifier("bert", num_labels=3),
        {"labels": torch.tensor([[0.0, 1.0, 1.0]] * 3)},
    ),
    "a number": (lambda: tiny.classifier("bert", num_labels=1), {"labels": torch.tensor([2.5, -100.0, 0.0])}),
    "several numbers": (
        lambda: tiny.classifier("bert", num_labels=3, problem_type="regression"),
        {"labels": torch.tensor([[1.0, 2.0, 3.0]] * 3)},
    ),
    "tags": (lambda: tiny.headed("bert", "TokenClassification"), {"labels": torch.full((3, 9), -100)}),
    "spans": (
        lambda: tiny.headed("bert", "QuestionAnswering"),
        {"start_positions": torch.tensor([8, 1, 2]), "end_positions": torch.tensor([8, 3, 500])},
    ),
}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_transformers_own_losses_are_the_tasks(name: str, half: bool) -> None:
    """Whatever stands in the rows: padding on the right, rows without labels, classes that are missing."""
    build, labels = KINDS[name]
    model = build()
    kind = tasks.for_model(model)
    assert kind is not None
    task = kind()
    task.ready(model)
    lengths, before = torch.tensor([9, 4, 6]), model.config.to_dict()
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = torch.randint(4, 90, (3, 9)) * mask
    ids[torch.arange(3), lengths - 1] = 3  # the end, which BART and T5 look for
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        assert loss.differs(model, task, {"input_ids": ids, "attention_mask": mask, **labels}) == ""
    assert model.config.to_dict() == before
    assert not model.training


def test_a_little_smoothing_is_seen_in_half_precision_too() -> None:
    model = of(WeighedForSequenceClassification)()
    rows = {"input_ids": torch.ones(2, 5, dtype=torch.long), "labels": torch.tensor([0, 1])}
    model.forward = lambda input_ids, labels: _smoothed(
        hf.BertForSequenceClassification.forward(model, input_ids), labels
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert "would be another" in loss.differs(model, Task(range(2)), rows)


def _smoothed(output: Any, labels: torch.Tensor) -> Any:
    output["loss"] = functional.cross_entropy(output.logits.float(), labels, label_smoothing=0.01)
    return output


def test_a_loss_for_every_row_is_no_reason_to_stop() -> None:
    rows = {"input_ids": torch.ones(2, 5, dtype=torch.long), "labels": torch.tensor([0, 1])}
    said = loss.differs(of(EachForSequenceClassification)(), Task(range(2)), rows)
    assert said == "it is no single number"


class Weighted:
    """What many programs have, mixed into a trainer."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        found = functional.cross_entropy(outputs.logits, labels, weight=torch.tensor(WEIGHTS))
        return (found, outputs) if return_outputs else found


class Penalty:
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        found, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)  # type: ignore[misc]
        found = found + 0.1 * model.classifier.weight.square().sum()
        return (found, outputs) if return_outputs else found


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("engine", ["auto", "off"])
@pytest.mark.parametrize("own", [Weighted, Penalty])
def test_a_compute_loss_of_the_users_own_is_trainers(own: type, engine: str, accumulation: int, tmp_path: Path) -> None:
    """A mean of two halves of a batch is none of the batch."""
    given = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 16 // accumulation}
    rows = tiny.rows(16, longest=40)
    plain = type("Plain", (own, hf.Trainer), {})
    _, expected = trained(plain, tiny.classifier("bert", **NO_DROPOUT), tmp_path, rows, **given)
    ours = type("Ours", (own, HybridTrainer), {})
    _, found = trained(ours, tiny.classifier("bert", **NO_DROPOUT), tmp_path, rows, {"engine": engine}, **given)
    assert_same(found, expected)


def test_with_it_a_batch_cannot_be_cut(tmp_path: Path) -> None:
    ours = type("Ours", (Weighted, HybridTrainer), {})
    with pytest.raises(RecipeError, match="max_tokens_per_micro_batch: a batch can only be cut where"):
        trained(ours, tiny.classifier("bert"), tmp_path, more={"max_tokens_per_micro_batch": 32})


def test_a_loss_that_is_assigned_later_counts(tmp_path: Path) -> None:
    calls: list[int] = []

    def mine(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        calls.append(len(labels))
        return functional.cross_entropy(outputs["logits"], labels)

    class Late(HybridTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            self.compute_loss_func = mine
            return super().train(*args, **kwargs)

    trained(Late, tiny.classifier("bert"), tmp_path)
    assert calls == [16]


@pytest.mark.parametrize("odd", [8, 16])
def test_a_number_that_is_minus_100_is_one(odd: int, tmp_path: Path) -> None:
    """-100 marks what has no label among classes; HF's mean has it as any other number."""
    rows = [row | {"labels": -100.0 if number < odd else 1.0} for number, row in enumerate(tiny.rows(16))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, expected = trained(hf.Trainer, tiny.classifier("bert", num_labels=1, **NO_DROPOUT), tmp_path, rows)
        _, found = trained(HybridTrainer, tiny.classifier("bert", num_labels=1, **NO_DROPOUT), tmp_path, rows)
    assert_same(found, expected)


class LaterForSequenceClassification(hf.BertForSequenceClassification):
    """Weighs classes as its config says."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        if labels is not None:
            weights = torch.tensor([1.0, getattr(self.config, "second", 1.0)])
            summed = functional.cross_entropy(output.logits, labels, weight=weights, reduction="sum")
            output["loss"] = summed / len(labels)
        return output


def test_what_a_model_init_makes_is_tried_anew(tmp_path: Path) -> None:
    """Trainer makes a model when it is made itself, and another one when it trains."""

    def trainer(kind: type) -> Any:
        made = []

        def init() -> Any:
            config = tiny.classifier("bert", **NO_DROPOUT).config
            config.second = 9.0 if made else 1.0
            torch.manual_seed(0)
            made.append(LaterForSequenceClassification(config))
            return made[-1]

        arguments = hf.TrainingArguments(
            str(tmp_path), use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", seed=0, max_steps=2,
            logging_steps=1,
        )  # fmt: skip
        collator = hf.DataCollatorWithPadding(tiny.tokenizer())
        one = kind(None, arguments, train_dataset=tiny.rows(16), data_collator=collator, model_init=init)
        one.remove_callback(hf.PrinterCallback)
        return one

    expected = trainer(hf.Trainer)
    expected.train()
    found = trainer(HybridTrainer)
    with pytest.warns(UserWarning, match="the model's own loss is used"):
        found.train()
    for one, other in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
