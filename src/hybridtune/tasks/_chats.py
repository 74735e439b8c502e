"""Conversations as the tokens of a decoder: which of them are the assistant's, and what the model is asked with.

What is learnt is exactly what the model has to write when it is asked: a conversation is cut at the ends of the prompts
that the chat template makes of its beginnings, and at the ends of the answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from ..data.checking.turns import Turn, without_oldest
from ..errors import ModelError, first_line
from ._prompts import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SHOWN = 40

Piece: TypeAlias = tuple[str, bool]  # a text, and whether it is the assistant's


@dataclass(frozen=True)
class Item:
    """A conversation, or its beginning up to one answer, as tokens.

    Attributes:
        ids: of all of it, to the end of the last answer.
        labels: the ids of the assistant's tokens, each answer's end among them; `IGNORED` elsewhere.
        question: what the model is asked with for the last answer.
    """

    ids: list[int]
    labels: list[int]
    question: list[int]


@dataclass
class Chats:
    """Puts conversations before a decoder, by the tokenizer's chat template, or by a text with a place for a turn.

    Where a chat template writes an earlier answer otherwise than the last one (Qwen3's leaves out what a model has
    thought), each answer is an item of its own, behind the prompt that it is asked with.

    Attributes:
        prompts: the template, and the token that ends an answer.
    """

    prompts: Prompts

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""
        return self.prompts.tokenizer

    @cached_property
    def _end(self) -> int:
        return self.prompts.end

    @cached_property
    def _end_text(self) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(self._end))

    @property
    def _marked(self) -> bool:
        """Whether the template itself says what the assistant's words are."""
        return bool(_MARKED.search(str(self.tokenizer.chat_template))) and self.tokenizer.is_fast

    def learnt(self, conversations: Sequence[Sequence[Turn]]) -> list[list[Item]]:
        """Items of conversations that end with an answer: one each, or one for every answer, the last answer's first.

        Raises:
            ModelError: the chat template cannot be learnt: it writes what comes before an answer otherwise once the
                answer is there, or cannot take a conversation.
        """
        if not self.prompts.chat:
            return [[self._by_text(turns)] for turns in conversations]
        if self._marked:
            return [[self._by_marks(turns)] for turns in conversations]
        pieces = [self._pieces(self._filled(turns)) for turns in conversations]
        flat = [item for items in pieces for item in items]
        made = iter(self._tokens(flat))
        return [[next(made) for _ in items] for items in pieces]

    def asked(self, turns: Sequence[Turn]) -> list[int]:
        """Tokens of what a model is given that is to answer the last turn."""
        if self.prompts.chat:
            return self._asked(self._filled(turns))
        answer: Turn = {"role": "assistant", "content": ""}
        return self._by_text([*turns, answer]).question

    def shortened(self, turns: Sequence[Turn], room: int) -> list[int]:
        """The same in no more than so many tokens: older turns are left out, then the last one's end is cut off.

        The system's turn stays, and so does the template; what is longer even so loses its beginning.
        """
        kept = list(turns)
        ids = self.asked(kept)
        while len(ids) > room and (fewer := without_oldest(kept)):
            kept, ids = fewer, self.asked(fewer)
        if len(ids) <= room or not kept:
            return ids[-room:]

        def tokens(some: Sequence[int], texts: Sequence[str]) -> list[list[int]]:
            return [self.asked([*kept[:-1], {**kept[-1], "content": text}]) for text in texts]

        return self.prompts.beginnings([kept[-1]["content"]], room, tokens)[0]

    def _filled(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns with the user's in the template, where one is given beside the tokenizer's."""
        prompts = self.prompts
        return [
            {**turn, "content": prompts.filled({prompts.cut: turn["content"]})} if turn["role"] == "user" else turn
            for turn in turns
        ]

    def _rendered(self, turns: Sequence[Turn], asks: bool = False) -> str:
        try:
            text: Any = self.tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=asks
            )
        except Exception as error:  # Jinja's, and whatever a template raises itself
            raise ModelError(
                "the chat template does not take a conversation",
                found=f"{first_line(error)}; the roles {', '.join(turn['role'] for turn in turns)}",
                expected="a template that takes system, user and assistant by turns",
                mend="take these turns out of the rows, or give a template of your own: chat_template: FILE",
            ) from None
        return str(text)

    def _pieces(self, turns: list[Turn]) -> list[list[Piece]]:
        """The texts of a conversation; of several items where an earlier answer is written otherwise than a last one.

        Raises:
            ModelError: a prompt is not what the conversation begins with.
        """
        whole = self._rendered(turns)
        found: list[Piece] = []
        apart: list[list[Piece]] = []
        at, last = 0, len(turns) - 1
        for number in (number for number, turn in enumerate(turns) if turn["role"] == "assistant"):
            asked, upto = self._rendered(turns[:number], True), self._rendered(turns[: number + 1])
            if not upto.startswith(asked):
                raise self._no_prefix(asked, upto)
            end = self._end_of(upto, len(asked))
            apart.insert(0, [(upto[: len(asked)], False), (upto[len(asked) : end], True)])
            ended = number == last or upto[:end].endswith(self._end_text)
            if ended and whole.startswith(upto[:end]) and at <= len(asked):
                found += [(whole[at : len(asked)], False), (whole[len(asked) : end], True)]
                at = end
        return [found] if len(found) == 2 * len(apart) else apart

    def _end_of(self, text: str, start: int) -> int:
        """Where an answer ends that is the last of a text: behind its end token, where the template writes one."""
        at = text.rfind(self._end_text, start)
        return at + len(self._end_text) if at >= 0 else max(len(text.rstrip()), start)

    def _no_prefix(self, asked: str, upto: str) -> ModelError:
        at = next(
            (n for n, pair in enumerate(zip(asked, upto, strict=False)) if pair[0] != pair[1]),
            min(len(asked), len(upto)),
        )
        before = max(at - _SHOWN // 2, 0)
        return ModelError(
            "the chat template cannot be learnt: what it asks with is not what the answered conversation begins with",
            found=f"asked {asked[before : at + _SHOWN]!r}, answered {upto[before : at + _SHOWN]!r}",
            expected="a template whose generation prompt stands in front of the answer, letter by letter",
            mend="give one that does, or one with {% generation %} around answers: chat_template: FILE",
        )

    def _tokens(self, items: Sequence[Sequence[Piece]]) -> list[Item]:
        """Tokens of all items: of the whole text, where they part at the ends of the pieces; else piece by piece."""
        texts = ["".join(text for text, _ in pieces) for pieces in items]
        asked = self._ids(["".join(text for text, _ in pieces[:-1]) for pieces in items])
        offsets: list[Any] = [None] * len(items)
        if self.tokenizer.is_fast and texts:
            encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        else:
            ids = self._ids(texts)
        return [self._item(pieces, *whole) for pieces, *whole in zip(items, ids, offsets, asked, strict=True)]

    def _item(self, pieces: Sequence[Piece], ids: list[int], offsets: Any, asked: list[int]) -> Item:
        cuts = None if offsets is None else _cuts(pieces, offsets)
        parts = [] if cuts is None else [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=False)]
        whole = _joined(parts[: len(pieces) - 1])
        if whole != asked:  # tokens that lie across an end: the model is never asked with a half of one
            parts = self._ids([text for text, _ in pieces])
        learnt = [of for _, of in pieces]
        if parts[-1][-1:] != [self._end]:
            parts[-1] = [*parts[-1], self._end]
        labels = [[*part] if of else [IGNORED] * len(part) for part, of in zip(parts, learnt, strict=True)]
        return Item(_joined(parts), _joined(labels), asked)

    def _by_marks(self, turns: Sequence[Turn]) -> Item:
        """What the template marks as the assistant's, and the end of each answer.

        Raises:
            ModelError: it marks no answer, or does not begin with what the model is asked with.
        """
        turns = self._filled(turns)
        self._rendered(turns)  # says in words what it cannot take
        made: Any = self.tokenizer.apply_chat_template(
            turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask, end = list(made["input_ids"]), list(made["assistant_masks"]), self._end
        for at in range(1, len(ids)):
            if mask[at - 1] and not mask[at] and ids[at] == end and ids[at - 1] != end:
                mask[at] = 1
        spans = sum(bool(one) and not (at and mask[at - 1]) for at, one in enumerate(mask))
        answers = sum(turn["role"] == "assistant" for turn in turns)
        asked = self._asked(turns[:-1])
        last = len(mask) - 1 - mask[::-1].index(1) if 1 in mask else -1
        if spans != answers or ids[: len(asked)] != asked or last < len(asked):
            raise ModelError(
                "the chat template cannot be learnt: its {% generation %} does not mark the answers",
                found=f"{spans} marked for {answers} answers"
                if spans != answers
                else f"{self.tokenizer.decode(asked[-8:])!r} is not what stands before the last one",
                expected="a mark around every answer, behind the generation prompt",
                mend="correct the template, or give another: chat_template: FILE",
            )
        ids, mask = ids[: last + 1], mask[: last + 1]
        labels = [one if of else IGNORED for one, of in zip(ids, mask, strict=True)]
        if ids[-1] != end:
            ids, labels = [*ids, end], [*labels, end]
        return Item(ids, labels, asked)

    def _asked(self, turns: Sequence[Turn]) -> list[int]:
        return self._ids([self._rendered(turns, True)])[0]

    def _by_text(self, turns: Sequence[Turn]) -> Item:
        """A turn in its template, its answer, the end, and so on; what the system says stands in front of the first."""
        prompts, system = self.prompts, ""
        ids: list[int] = []
        labels: list[int] = []
        question: list[int] = []
        for turn in turns:
            if turn["role"] == "system":
                system = f"{turn['content']}\n\n"
            elif turn["role"] == "user":
                told = prompts.continued(system + turn["content"], first=not ids)
                system = ""
                ids, labels = [*ids, *told], [*labels, *[IGNORED] * len(told)]
            else:
                question = list(ids)
                (answer,) = prompts.whole([turn["content"]])
                ids, labels = [*ids, *answer], [*labels, *answer]
        return Item(ids, labels, question)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts that have all special tokens in them."""
        if not texts:
            return []
        found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return found


def _joined(parts: Sequence[list[int]]) -> list[int]:
    return [one for part in parts for one in part]


def _cuts(pieces: Sequence[Piece], offsets: Sequence[tuple[int, int]]) -> list[int] | None:
    """The number of the token that each piece but the first begins with; None where a token lies across an end."""
    cuts, at, place = [], 0, 0
    for text, _ in pieces[:-1]:
        place += len(text)
        while at < len(offsets) and offsets[at][1] <= place:
            at += 1
        if at < len(offsets) and offsets[at][0] < place:
            return None
        cuts.append(at)
    return cuts
