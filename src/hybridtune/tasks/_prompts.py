"""What a model that writes is given of a row, and what it is to write, as tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
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
                found=self.template,
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
        found = self._tokens(rows)
        lengths, unknown = [len(ids) for ids in found], count_unknown(found, self.tokenizer)
        long = [at for at, length in enumerate(lengths) if length > room]
        if long:
            shorter = self._shorter([rows[at] for at in long], [lengths[at] for at in long], room)
            for at, ids in zip(long, shorter, strict=True):
                found[at] = ids
        return found, lengths, unknown

    def written(self, texts: Sequence[str], room: int) -> tuple[list[list[int]], list[int], list[int]]:
        """Tokens of what is to be written. It ends with `end`, but for a text that is cut: that does not end there.

        Returns:
            For each text its tokens, their number before it was cut, and how many of them are unknown.
        """
        found = self.whole(texts)
        end = self.end
        lengths, unknown = [len(ids) for ids in found], count_unknown(found, self.tokenizer)
        long = [at for at, length in enumerate(lengths) if length > room]
        if long:
            for at, ids in zip(long, self._plain([texts[at] for at in long], room), strict=True):
                found[at] = ids[:-1] if ids[-1] == end else ids
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

    def _shorter(self, rows: Sequence[Row], counts: Sequence[int], room: int) -> list[list[int]]:
        """As the tokenizer cuts, where the text stands last; else with the longest beginning of it that fits.

        Args:
            rows: with too many tokens.
            counts: how many they have.
            room: how many they may have.
        """
        if self.encoder_decoder and self.tokenizer.truncation_side == "right" and self._stands_last:
            cut: list[list[int]] = self.tokenizer([self.filled(row) for row in rows], truncation=True, max_length=room)[
                "input_ids"
            ]
            return cut
        texts = [row[self.cut] for row in rows]
        best = self._tokens([{**row, self.cut: ""} for row in rows])
        fits = [(0, len(ids)) for ids in best]  # characters and their tokens, which are few enough
        over = [(len(text), many) for text, many in zip(texts, counts, strict=True)]  # and too many
        for turn in count(1):
            left = [at for at, (kept, tokens) in enumerate(fits) if tokens < room and over[at][0] - kept > 1]
            if not left:
                break
            # Tokens grow with characters, but for stretches that have none: then halves are surer.
            guesses = [_between(fits[at], over[at], room if turn % 3 else None) for at in left]
            tried = self._tokens(
                [{**rows[at], self.cut: texts[at][:kept]} for at, kept in zip(left, guesses, strict=True)]
            )
            for at, kept, ids in zip(left, guesses, tried, strict=True):
                if len(ids) > room:
                    over[at] = kept, len(ids)
                else:
                    fits[at], best[at] = (kept, len(ids)), ids
        return [ids[-room:] for ids in best]  # a template longer than there is room

    @property
    def _stands_last(self) -> bool:
        return self.template.endswith(f"{{{self.cut}}}") and self.template.count(f"{{{self.cut}}}") == 1


def _between(fits: tuple[int, int], over: tuple[int, int], room: int | None) -> int:
    """A number of characters between two whose tokens are known: where there should be `room` of them, or half way."""
    (low, few), (high, many) = fits, over
    share = 0.5 if room is None else (room - few) / (many - few)
    return min(max(low + int((high - low) * share), low + 1), high - 1)
