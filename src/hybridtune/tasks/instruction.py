"""Instructions and conversations: an assistant's answers to what a user says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..data.checking import check
from ..data.checking.findings import EXAMPLES, SHOWN, Finding
from ..data.checking.instruction import TURNS
from ..data.checking.rows import as_text, batches, of_table, row_numbers, texts_of
from ..data.checking.turns import ROLES, Turn, as_one_text, parted, settled, turns_of, turns_of_history, without_oldest
from ..errors import DataError, ModelError, RecipeError
from . import Baseline, Stats, _rouge, _squad, baselines, metrics
from ._chats import IGNORED, Chats, Item
from ._generation import WritingTask
from ._prompts import Prompts, Row
from ._texts import count_unknown
from .metrics import Interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..recipe import Recipe

_RAW = ("messages", "conversations", "instruction", "input", "output", "system", "history")  # columns as they come
_THOUGHTS = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)


class Task(WritingTask):
    """Conversations whose assistant is to be learnt.

    Rows are conversations (`messages`), or `instruction` and `output` with perhaps `input`, `system` and `history`.
    What the task works on is `messages`, what goes before the last answer; `conversation`, the same as one text; and
    `answer`. A decoder learns every answer of a conversation, an encoder-decoder the last one.

    Args:
        chat_template: Jinja, in place of the tokenizer's.
        **more: of every task whose models write.
    """

    name = "instruction"
    keys = (*WritingTask.keys, "chat_template")
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "messages": ("dialogue", "dialog", "chat", "turns"),
        "conversations": ("conversation",),  # of its own: rows of several files may have either
        "instruction": ("prompt", "question", "query", "user"),
        "input": ("context",),
        "output": ("response", "answer", "completion", "assistant", "reply"),
        "system": ("system_prompt",),
        "history": (),
    }
    required: tuple[str, ...] = ("messages",)
    instead: ClassVar[str] = "messages, a column of conversations"
    inputs: tuple[str, ...] = ("messages",)
    target: ClassVar[str] = "answer"

    def __init__(self, *, chat_template: str | None = None, **more: Any) -> None:
        super().__init__(**more)
        self.chat_template = chat_template
        # ROUGE-L first: exact match alone moves too seldom to choose by, where answers are long.
        self.metrics = {"rougeL": "maximize", "exact_match": "maximize"}

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Self:
        """Reads the templates and how to write."""
        given = recipe.chat_template
        if given is not None and "{" not in given:
            path = Path(given).expanduser()
            if not path.is_file():
                raise RecipeError(
                    "chat_template: is neither Jinja nor a file",
                    found=given,
                    expected='a template such as "{% for message in messages %}...", or the path of one',
                )
            given = path.read_text("utf-8")
        return cls(**cls.arguments(recipe), chat_template=given)

    @classmethod
    def placed(cls) -> str:
        """A turn of the user's."""
        return "instruction"

    @property
    def about(self) -> str:
        """What goes before the answer."""
        return "conversation"

    @property
    def read_texts(self) -> tuple[str, ...]:
        """The same: messages are no text."""
        return ("conversation",)

    @property
    def apart(self) -> tuple[str, ...]:
        """Equal conversations stay together."""
        return ("conversation",)

    def state(self) -> dict[str, Any]:
        """The chat template too."""
        return {**super().state(), "chat_template": self.chat_template}

    def asked(self, columns: Sequence[str], labelled: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Conversations, or an instruction and its output."""
        talks = next((name for name in ("messages", "conversations") if self.has(name, columns)), None)
        if talks:
            return (talks,), _RAW
        return ("instruction", "output") if labelled else ("instruction",), _RAW

    def gather(self, rows: Dataset) -> Dataset:
        """`messages`, `conversation` and `answer` of rows in any of their forms; `answer` is missing where a row ends
        with a user's turn.

        Raises:
            DataError: a row is no conversation.
        """
        there = [name for name in _RAW if name in rows.column_names]
        made: list[pa.Table] = []
        numbers = iter(row_numbers(rows).tolist())
        for columns in batches(rows, there):
            parts = []
            for values in zip(*columns, strict=True):
                number = next(numbers)
                try:
                    parts.append(parted(_turns(dict(zip(there, values, strict=True)))))
                except ValueError as error:
                    raise DataError(
                        f"row {number}: {error}",
                        found=repr(dict(zip(there, values, strict=True)))[:160],
                        expected='[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], the '
                        "same with from and value, or a text",
                    ) from None
            columns_made = {
                "messages": pa.array([before for before, _ in parts], TURNS),
                "conversation": pa.array([as_one_text(before) for before, _ in parts], pa.string()),
                "answer": pa.array([answer for _, answer in parts], pa.string()),
            }
            made.append(pa.table(columns_made))
        if not made:
            return rows
        table, gathered = rows.with_format("arrow")[:], pa.concat_tables(made)
        table = table.drop_columns([name for name in table.column_names if name in {*_RAW, *gathered.column_names}])
        for name in gathered.column_names:
            table = table.append_column(name, gathered[name])
        return of_table(table)

    def problem(self, column: str, value: Any) -> str | None:
        """Why a conversation cannot be answered, or None."""
        turns, kinds = settled(value or [])
        odd = [turn["role"] for turn in turns if turn["role"] not in ROLES]
        if odd:
            return f"has a turn of the role {odd[0]}, expected system, user or assistant"
        if "late_system" in kinds:
            return "has a system turn behind others"
        return None if turns and turns[-1]["role"] == "user" else "has no turn of a user to answer"

    def check(self, splits: dict[str, Dataset], sources: dict[str, str]) -> tuple[dict[str, Dataset], list[Finding]]:
        """Checks conversations; learns whether words have spaces between them."""
        splits, findings = check.check_instruction(splits, sources=sources)
        return splits, [*findings, *self.learn_script(splits["train"])]

    def recheck(self, rows: Dataset, source: str) -> tuple[Dataset, list[Finding]]:
        """As test rows are when tuning."""
        splits, findings = check.check_instruction({"test": rows}, sources={"test": source}, known=True)
        return splits["test"], findings

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Gives the tokenizer the chat template, where one is given.

        Raises:
            ModelError: an encoder-decoder has no use for it.
        """
        if self.chat_template is not None and model.config.is_encoder_decoder:
            raise ModelError(
                "chat_template: an encoder-decoder reads a conversation as one text",
                mend="leave it away; template: '... {instruction} ...' says what is put around the text",
            )
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        super().prepare(model, tokenizer)

    def _prompts(self, tokenizer: PreTrainedTokenizerBase) -> Prompts:
        chat = not self.encoder_decoder and bool(tokenizer.chat_template)
        place = self.placed()
        return Prompts(tokenizer, self.template or f"{{{place}}}", place, self.encoder_decoder, chat)

    def target_limit(self, limit: int) -> None:
        """Answers are learnt whole, however long the model may write; a conversation is cut as one."""

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int) -> Dataset:
        """Tokens of conversations; to a decoder one is a text with labels for all that the assistant says.

        Of a conversation that is too long the end is cut off, where it is learnt. Where it is asked with, older turns
        are left out, so that the last turn is read, and there is room for the answer. `row` says which conversation an
        item is of: several items where an answer at a time is learnt, the last answer's first.
        """
        chats = Chats(self._prompts(tokenizer))
        turns = [settled(value or [])[0] for value in rows["messages"][:]]
        answers = rows[self.target][:] if self.target in rows.column_names else None
        if answers is not None and not all(answers):
            at = next(at for at, answer in enumerate(answers) if not answer)
            raise DataError(
                f"row {int(row_numbers(rows)[at])}: the row has no answer",
                expected="a conversation that ends with a turn of the assistant's",
            )
        if self.encoder_decoder:
            return self._encode_apart(turns, answers, tokenizer, limit)
        room = limit - self._longest(limit)
        if answers is None:
            asked = [chats.asked(one) for one in turns]
            made = [[Item(ids, [], ids)] for ids in asked]
        else:
            talks = zip(turns, answers, strict=True)
            made = chats.learnt([[*before, {"role": "assistant", "content": answer}] for before, answer in talks])
        columns: dict[str, list[Any]] = {
            key: [] for key in ("input_ids", "labels", "length", "unknown", "row", "prompt", "question")
        }
        for row, items in enumerate(made):
            for number, item in enumerate(items):
                ids, question = item.ids[:limit], item.question
                if len(question) > room:
                    question = chats.shortened(turns[row], room) if number == 0 else []
                begins = ids[: len(question)] == question
                columns["input_ids"].append(ids if answers is not None else question)
                columns["labels"].append(item.labels[:limit])
                columns["length"].append(len(item.ids) if answers is not None else len(item.ids) + limit - room)
                columns["unknown"].append(count_unknown([item.ids], tokenizer)[0])
                columns["row"].append(row)
                columns["prompt"].append(len(question) if begins or answers is None else 0)
                columns["question"].append([] if begins or answers is None else question)
        if answers is None:
            del columns["labels"]
        columns["attention_mask"] = [[1] * len(ids) for ids in columns["input_ids"]]
        return Dataset.from_dict(columns)

    def _encode_apart(
        self, turns: Sequence[Sequence[Turn]], answers: Any, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> Dataset:
        """Of an encoder-decoder: what goes before the last answer is read, and the answer is written."""
        prompts = self._prompts(tokenizer)
        rows: list[Row] = [{self.placed(): as_one_text(one)} for one in turns]
        given, lengths, unknown = prompts.said(rows, limit)
        long = [at for at, length in enumerate(lengths) if length > limit]
        for at in long:
            kept, length = turns[at], lengths[at]
            while length > limit and (kept := without_oldest(kept)):
                rows[at] = {self.placed(): as_one_text(kept)}
                length = prompts.length(rows[at])
        for at, ids in zip(long, prompts.said([rows[at] for at in long], limit)[0] if long else (), strict=True):
            given[at] = ids
        columns: dict[str, Any] = {"input_ids": given, "length": lengths, "unknown": unknown}
        if answers is not None:
            written, own, _ = prompts.written(answers, limit)
            columns |= {"labels": written, "length": np.maximum(lengths, own).tolist()}
        columns["attention_mask"] = [[1] * len(ids) for ids in given]
        return Dataset.from_dict(columns)

    def sifted(self, items: Dataset, rows: Dataset, split: str, limit: int) -> tuple[Dataset, list[Finding]]:
        """Without conversations that are cut off before the first answer."""
        if "row" not in items.column_names:
            return items, []
        numbers, owner = row_numbers(rows), np.asarray(items["row"][:])
        texts = texts_of(rows, "conversation")

        def told(kind: str, of: np.ndarray, did: str, level: str) -> Finding:
            some = np.unique(owner[of])
            examples = [{"row": int(numbers[at]), "conversation": texts[at][:SHOWN]} for at in some[:EXAMPLES].tolist()]
            return Finding(kind, split, len(some), did, level, examples)

        found = []
        several = np.flatnonzero(np.bincount(owner, minlength=len(rows))[owner] > 1)
        if len(several):
            did = "learnt an answer at a time: the chat template writes earlier answers otherwise than the last one"
            found.append(told("one_by_one", several, did, "info"))
        empty = np.array([not any(label != IGNORED for label in labels) for labels in items["labels"][:]], bool)
        if empty.any():
            what = f"what comes before the answer has {limit} tokens or more, and nothing of the answer is left"
            did = f"left out: {what}" if split == "train" else f"kept, without a part in the loss: {what}"
            found.append(told("answer_cut_away", np.flatnonzero(empty), did, "warning"))
        if split != "train" or not empty.any():
            return items, found
        if empty.all():
            raise DataError(
                "train: nothing of any answer is left where conversations are cut off",
                found=f"conversations of {min(items['length'][:])} tokens and more, cut after {limit}",
                mend="raise max_length, or take a model with more positions",
            )
        return items.select(np.flatnonzero(~empty)), found

    def answered(self, items: Dataset) -> Dataset:
        """The first item of each conversation, which ends with its last answer."""
        if "row" not in items.column_names:
            return items
        return items.select(np.flatnonzero(np.diff(items["row"][:], prepend=-1) > 0))

    def questions(self, items: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """What goes before the last answers."""
        if "question" not in items.column_names:
            return super().questions(items, tokenizer)
        last = self.answered(items)
        places = zip(last["question"][:], last["input_ids"][:], last["prompt"][:], strict=True)
        given = [own or ids[:count] for own, ids, count in places]
        return Dataset.from_dict({"input_ids": given, "attention_mask": [[1] * len(ids) for ids in given]})

    def decode(self, logits: Any, items: Dataset, rows: Dataset) -> list[dict[str, Any]]:
        """`text`: the answer; `thinking`, where the model has thought aloud before it."""
        found = []
        for text in super().texts(logits):
            thoughts = _THOUGHTS.match(text)
            more = {"thinking": thoughts[1].strip()} if thoughts and thoughts[1].strip() else {}
            found.append({"text": _spoken(text), **more})
        return found

    def texts(self, answers: Any) -> list[str]:
        """What was said, without what was thought."""
        return list(map(_spoken, super().texts(answers)))

    def gold(self, rows: Dataset) -> list[Any]:
        """The answers, without thoughts."""
        return [gold for (gold,) in self.golds(rows)]

    def golds(self, rows: Dataset) -> list[list[str]]:
        """The same, one for each row."""
        return [[_spoken(text)] for text in texts_of(rows, self.target)]

    def scores(self, texts: Sequence[str], golds: Sequence[Sequence[str]]) -> Stats:
        """ROUGE-L and exact match of each row, 0 to 1."""
        exact = [_squad.score(text, gold)[0] for text, gold in zip(texts, golds, strict=True)]
        return {"rougeL": _rouge.stats(texts, golds, self.script)["rougeL"], "exact_match": np.array(exact)}

    def aggregate(self, stats: Stats) -> dict[str, float]:
        """The means over the rows, 0 to 100."""
        return {name: 100 * float(stats[name].mean()) for name in self.metrics}

    def intervals(self, stats: Stats) -> dict[str, Interval]:
        """Wilson for exact match, BCa bootstrap for ROUGE-L."""
        right = int(stats["exact_match"].sum())
        return {**super().intervals(stats), "exact_match": metrics.wilson(right, len(stats["rougeL"])).times(100)}

    def each(self, stats: Stats) -> np.ndarray:
        """ROUGE-L."""
        return np.asarray(stats["rougeL"])

    @property
    def signatures(self) -> dict[str, str]:
        """How both are computed."""
        return {
            "rougeL": _rouge.signature(self.script),
            "exact_match": "after SQuAD's normalization: without case, punctuation, a, an and the",
        }

    def baselines(
        self, train: Dataset, test: Dataset, features: tuple[np.ndarray, np.ndarray] | None
    ) -> list[Baseline]:
        """The most frequent answer, the user's own words, and the answer to the likest conversation of train."""
        known = [gold for (gold,) in self.golds(train)]
        common = Counter(known).most_common(1)[0][0]
        said = [turns[-1]["content"] if turns else "" for turns in test["messages"][:]]
        likest = baselines.likest(texts_of(train, "conversation"), texts_of(test, "conversation"))
        made = [
            ("frequent answer", "the most frequent answer of train", [common] * len(test)),
            ("echo", "what the user says last", said),
            (
                "likest row",
                "the answer to the conversation of train whose words (tf-idf) are most alike",
                [known[at] for at in likest],
            ),
        ]
        return [Baseline(name, how, self.stats(texts, test), texts) for name, how, texts in made]

    @property
    def reading(self) -> str:
        """How it is asked."""
        if self.encoder_decoder:
            how = "as one text, a line for each turn (`user: ...`), without the role where there is a single turn"
            how += f", in `{self.template}`" if self.template else ""
        else:
            how = f"with `{self.template}` for each turn" if self.template else "by the tokenizer's chat template"
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        return (
            f"It answers conversations, put before it {how}. Its generation_config.json says how it writes: "
            f"{settings}. `hybridtune predict` does both."
        )


def _turns(row: dict[str, Any]) -> list[Turn]:
    """A conversation out of a row's columns.

    Raises:
        ValueError: it is none.
    """
    talk = next((row[name] for name in ("messages", "conversations") if row.get(name) is not None), None)
    if talk is not None:
        turns = turns_of(talk)
    else:
        asked, more, output = turns_of(row.get("instruction")), as_text(row.get("input")), row.get("output")
        if more.strip() and asked:
            asked[-1] = {**asked[-1], "content": f"{asked[-1]['content']}\n{more}".strip()}
        # an answer may be JSON, and then it is no turn
        said: list[Turn] = [{"role": "assistant", "content": output}] if isinstance(output, str) else []
        turns = [*turns_of_history(row.get("history")), *asked, *(said or turns_of(output, "assistant"))]
    system = row.get("system")
    if isinstance(system, str) and system.strip() and not any(turn["role"] == "system" for turn in turns):
        return [{"role": "system", "content": system}, *turns]
    return turns


def _spoken(text: str) -> str:
    return _THOUGHTS.sub("", text).strip()
