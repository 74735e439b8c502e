"""Where the tokens of a padded batch lie in one packed row without padding.

Rows are sorted by length, so that rows of one length lie side by side: attention works on each such group as on a batch
that never had padding.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch


@dataclass(frozen=True)
class Group:
    """Rows of one length that lie side by side.

    Attributes:
        rows: numbers of these rows in the padded batch.
        length: of each, in tokens.
    """

    rows: tuple[int, ...]
    length: int

    @property
    def tokens(self) -> int:
        """Of all rows together."""
        return len(self.rows) * self.length


@dataclass(frozen=True)
class Layout:
    """The packing of one batch.

    Attributes:
        shape: rows and width of the padded batch.
        index: [tokens] for every place of the packed row the number of the place in the padded batch, row by row.
        groups: from the shortest rows to the longest.
    """

    shape: tuple[int, int]
    index: torch.Tensor
    groups: tuple[Group, ...]
    _packed: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, mask: torch.Tensor) -> Layout:
        """Of a batch's mask [rows, width], True where a token is; wherever the padding is.

        A row without a token keeps its first place, so that no row is lost.
        """
        mask = mask.clone()
        mask[:, 0] |= ~mask.any(1)
        lengths, order = mask.sum(1).sort(stable=True)
        found = mask[order].nonzero()
        index = order[found[:, 0]] * mask.shape[1] + found[:, 1]
        pairs = zip(lengths.tolist(), order.tolist(), strict=True)
        groups = (
            Group(tuple(row for _, row in same), length)
            for length, same in itertools.groupby(pairs, key=lambda pair: pair[0])
        )
        return cls((mask.shape[0], mask.shape[1]), index, tuple(groups))

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.groups[-1].length

    @cached_property
    def apart(self) -> Layout:
        """The same packing with a group for every row: in cross-attention two layouts have to go together."""
        groups = (Group((row,), group.length) for group in self.groups for row in group.rows)
        return replace(self, groups=tuple(groups))

    @cached_property
    def columns(self) -> tuple[torch.Tensor, ...]:
        """For every group, the columns of its rows' tokens in the padded batch, [rows, length]."""
        return tuple(self.split((self.index % self.shape[1])[None], dim=1))

    def split(self, packed: torch.Tensor, dim: int) -> list[torch.Tensor]:
        """Views of the groups: [1, ..., tokens, ...] as [rows, ..., length, ...] each."""
        pieces = torch.split(packed, [group.tokens for group in self.groups], dim)
        return [
            torch.unflatten(piece, dim, (len(group.rows), group.length)).transpose(0, dim).squeeze(dim)
            for piece, group in zip(pieces, self.groups, strict=True)
        ]

    def pack(self, value: Any) -> Any:
        """What of a layer's argument has a place for each token, [rows or 1, width, ...], as [1, tokens, ...].

        Args:
            value: anything; tuples and lists are looked into, and what has other shapes comes back as it is.
        """
        if isinstance(value, (tuple, list)):
            return type(value)(self.pack(inner) for inner in value)
        if not isinstance(value, torch.Tensor) or value.dim() not in (2, 3):
            return value
        rows, width = self.shape
        if value.shape[1] != width or value.shape[0] not in (1, rows):
            return value
        if id(value) not in self._packed:  # every layer is given the same
            whole = value.expand(rows, *value.shape[1:]).flatten(0, 1)
            self._packed[id(value)] = value, whole.index_select(0, self.index).unsqueeze(0)
        return self._packed[id(value)][1]

    def rows(self, packed: torch.Tensor) -> dict[int, torch.Tensor]:
        """[1, tokens, ...] as [length, ...] for each row of the batch, by its number."""
        pieces = zip(self.groups, self.split(packed, 1), strict=True)
        return {number: row for group, rows in pieces for number, row in zip(group.rows, rows, strict=True)}

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, tokens, ...] as [rows, width, ...], with zeros for padding."""
        rows, width = self.shape
        empty = packed.new_zeros(rows * width, *packed.shape[2:])
        return torch.unflatten(empty.index_copy(0, self.index, packed[0]), 0, (rows, width))
