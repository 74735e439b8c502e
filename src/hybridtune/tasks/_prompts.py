"""What a model that writes is given of a row, and what it is to write, as tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ModelError
from ._texts import count_unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "hybridtune"  # stands for an answer where it is looked what a chat template puts behind one
_PLACE = re.compile(r"\{(\w+)\}")

Row = dict[str, str]


@dataclass(frozen=True)
class Prompts:
    """Puts rows before a model.

    Args:
        tokenizer: the model's.
        template: what is said, with places for the row's texts, such as {source}.
        cut: which of these texts is made shorter where all is too long.
        encoder_decoder: whether what is said and what is written are two texts; else the one continues the other.
        chat: whether what is said is a user's message, in the tokenizer's own format.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    cut: str
    encoder_decoder: bool
    chat: bool

    def refuse(self) -> None:
        """Refuses a decoder that could not tell where its answer begins.

        Raises:
            ModelError: it has no chat template, and no template says so.
        """
        if self.encoder_decoder or self.chat:
            return
        *_, last = _PLACE.finditer(self.template)
        if not self.template[last.end() :]:
            raise ModelError(
                "template: a decoder without a chat template has to be told where its answer begins",
                found=f"nothing behind {last.group()}",
                expected=f"words behind {last.group()}",
                mend=f"such as template: '{self.template}\\nAnswer: '",
            )

    @property
    def end(self) -> int:
        """The token that ends what is written.

        Raises:
            ModelError: the tokenizer has none.
        """
        end = self.tokenizer.eos_token_id
        end = self.tokenizer.sep_token_id if end is None else end
        if self.chat:
            talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
            behind = self.tokenizer.apply_chat_template(talk, tokenize=False).rpartition(_MARK)[2].strip()
            ids = self.tokenizer(behind, add_special_tokens=False)["input_ids"]
            end = ids[0] if ids and ids[0] in self.tokenizer.added_tokens_decoder else end
        if end is None:
            raise ModelError(
                "the tokenizer has no token that ends a text: what the model writes would never end",
                expected="an eos_token",
                mend="give one: tokenizer.add_special_tokens({'eos_token': ...}), and save it beside the model",
            )
        return int(end)

    def said(self, rows: Sequence[Row], room: int) -> tuple[list[list[int]], list[int], list[int]]:
        """Tokens of what is said; where it is too long the end of the text `cut` is cut off, and never the template.

        Returns:
            For each row its tokens, their number before it was cut, and how many of them are unknown.
        """
        return self._fitted(self._tokens(rows), room, lambda long: self._shorter([rows[at] for at in long], room))

    def length(self, row: Row) -> int:
        """How many tokens are said."""
        return len(self._tokens([row])[0])

    def written(self, texts: Sequence[str], room: int) -> tuple[list[list[int]], list[int], list[int]]:
        """Tokens of what is to be written. It ends with `end`, but for a text that is cut: that does not end there.

        Returns:
            For each text its tokens, their number before it was cut, and how many of them are unknown.
        """
        end = self.end

        def cut(long: Sequence[int]) -> list[list[int]]:
            found = self._plain([texts[at] for at in long], room)
            return [ids[:-1] if ids[-1] == end else ids for ids in found]

        return self._fitted(self.whole(texts), room, cut)

    def _fitted(
        self, found: list[list[int]], room: int, shorter: Callable[[Sequence[int]], list[list[int]]]
    ) -> tuple[list[list[int]], list[int], list[int]]:
        lengths, unknown = [len(ids) for ids in found], count_unknown(found, self.tokenizer)
        long = [at for at, length in enumerate(lengths) if length > room]
        for at, ids in zip(long, shorter(long) if long else [], strict=True):
            found[at] = ids
        return found, lengths, unknown

    def whole(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of what is to be written, with their end."""
        end = self.end
        return [ids if end in ids else [*ids, end] for ids in self._plain(texts, None)]

    def filled(self, row: Row) -> str:
        """The template with a row's texts in it."""
        return _PLACE.sub(lambda place: row.get(place[1], place[0]), self.template)

    def continued(self, text: str, first: bool) -> list[int]:
        """Tokens of a text in the template, to a decoder without a chat template.

        Args:
            text: what is said.
            first: whether nothing stands before it; else it has no token that begins a text.
        """
        if first:
            return self._tokens([{self.cut: text}])[0]
        words = self.filled({self.cut: text}).rstrip(" ")
        ids: list[int] = self.tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _plain(self, texts: Sequence[str], room: int | None) -> list[list[int]]:
        """Tokens of what is to be written, as the tokenizer gives them; cut where they are more than there is room."""
        how = {"verbose": False} if room is None else {"truncation": True, "max_length": room}
        if self.encoder_decoder:
            ids: list[list[int]] = self.tokenizer(text_target=list(texts), **how)["input_ids"]
            return ids
        words = [f"{self._space}{text}" for text in texts]
        continued: list[list[int]] = self.tokenizer(words, add_special_tokens=False, **how)["input_ids"]
        return continued

    @property
    def _space(self) -> str:
        """The space at the end of a template belongs to the answer: tokens of words begin with it."""
        return " " if self.template.endswith(" ") and not self.chat else ""

    def _tokens(self, rows: Sequence[Row]) -> list[list[int]]:
        said = list(map(self.filled, rows))
        if self.chat:
            talks = [[{"role": "user", "content": words}] for words in said]
            ids: list[list[int]] = self.tokenizer.apply_chat_template(
                talks, add_generation_prompt=True, return_dict=False
            )
            return ids
        said = said if self.encoder_decoder else [words.rstrip(" ") for words in said]
        found = self.tokenizer(said, verbose=False)["input_ids"]
        if self.encoder_decoder:
            return [ids or [self.end] for ids in found]
        # Some tokenizers end every text; what is to be continued has no end.
        return [(ids[:-1] if ids and ids[-1] == self.end else ids) or [self.end] for ids in found]

    def _shorter(self, rows: Sequence[Row], room: int) -> list[list[int]]:
        """As the tokenizer cuts, where the text stands last; else as `beginnings`."""
        if self.encoder_decoder and self.tokenizer.truncation_side == "right" and self._stands_last:
            words = [self.filled(row) for row in rows]
            cut: list[list[int]] = self.tokenizer(words, truncation=True, max_length=room)["input_ids"]
            return cut

        def tokens(some: Sequence[int], texts: Sequence[str]) -> list[list[int]]:
            return self._tokens([{**rows[at], self.cut: text} for at, text in zip(some, texts, strict=True)])

        return self.beginnings([row[self.cut] for row in rows], room, tokens)

    def beginnings(
        self, texts: Sequence[str], room: int, tokens: Callable[[Sequence[int], Sequence[str]], list[list[int]]]
    ) -> list[list[int]]:
        """What stands around texts, with as much of their beginnings as fits, cut where one of their tokens ends.

        Args:
            texts: too long ones.
            room: how many tokens may be.
            tokens: of some of the texts, told by their numbers, those of them and of what stands around, for other
                texts in their places.
        """
        places = self._places(texts)
        best = tokens(range(len(texts)), [""] * len(texts))
        fits = [0] * len(texts)  # how many places are left, few enough
        over = list(map(len, places))  # and too many
        guesses = {at: room - len(ids) for at, ids in enumerate(best)}
        while guesses := {
            at: guess for at, guess in guesses.items() if over[at] - fits[at] > 1 and len(best[at]) < room
        }:
            tried = {at: min(max(guess, fits[at] + 1), over[at] - 1) for at, guess in guesses.items()}
            cut = [texts[at][: places[at][count - 1]] for at, count in tried.items()]
            for (at, count), ids in zip(tried.items(), tokens(list(tried), cut), strict=True):
                if len(ids) > room:
                    over[at] = count
                else:
                    fits[at], best[at] = count, ids
                guesses[at] = count + room - len(ids)
        return [ids[-room:] for ids in best]  # what stands around may be too long itself

    def _places(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Where the tokens of texts end, in characters; every character, where the tokenizer does not tell."""
        if not self.tokenizer.is_fast:
            return [range(1, len(text) + 1) for text in texts]
        found = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [sorted({end for _, end in offsets if end}) for offsets in found["offset_mapping"]]

    @property
    def _stands_last(self) -> bool:
        return self.template.endswith(f"{{{self.cut}}}") and self.template.count(f"{{{self.cut}}}") == 1
