"""Where the tokens of a padded batch lie in one packed row without padding.

Rows are sorted by length, so that rows of about one length lie side by side: attention works on each such group as on a
batch. Rows of one length need no padding for it; others are padded, in attention alone, where that costs less than
another call.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

STEP = 16  # tokens between the lengths that rows are padded to where none may depend on the others
LEAST = 16  # tokens between two sizes of a packed row that is filled up
SIZES = 16  # from one length to its double

# What a call of attention costs beside its work, in scores (queries times keys) of one row.
CALL = {"cpu": 2**13, "cuda": 2**16}


@dataclass(frozen=True)
class Group:
    """Rows that lie side by side and that attention takes together.

    Attributes:
        rows: numbers of these rows in the padded batch.
        lengths: of each, in tokens.
        least: tokens that they are padded to at least.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    least: int = 0

    @cached_property
    def length(self) -> int:
        """Tokens that rows are padded to."""
        return max(*self.lengths, self.least)

    @cached_property
    def tokens(self) -> int:
        """Of all rows together."""
        return sum(self.lengths)

    @cached_property
    def even(self) -> bool:
        """Whether no row is padded."""
        return min(self.lengths) == self.length

    @cached_property
    def mask(self) -> torch.Tensor:
        """[rows, length], True where a token is."""
        return torch.arange(self.length) < torch.tensor(self.lengths)[:, None]

    @cached_property
    def _places(self) -> torch.Tensor:
        """[rows * length] for each place of the padded group its token's; for padding that of some token."""
        starts = torch.tensor([0, *itertools.accumulate(self.lengths)][:-1])[:, None]
        return torch.where(self.mask, starts + torch.arange(self.length), 0).flatten()

    def padded(self, piece: torch.Tensor, dim: int) -> torch.Tensor:
        """The group's piece of the packed row, [1, ..., tokens, ...], as [rows, ..., length, ...]."""
        if not self.even:
            piece = piece.index_select(dim, self._places.to(piece.device))
        return torch.unflatten(piece, dim, (len(self.rows), self.length)).transpose(0, dim).squeeze(dim)

    def packed(self, padded: torch.Tensor) -> torch.Tensor:
        """[rows, length, ...] as [1, tokens, ...]."""
        if not self.even:
            kept = self.mask.flatten().nonzero()[:, 0].to(padded.device)
            return padded.flatten(0, 1).index_select(0, kept).unsqueeze(0)
        return padded.reshape(1, -1, *padded.shape[2:])


@dataclass(frozen=True)
class Layout:
    """The packing of one batch.

    Attributes:
        shape: rows and width of the padded batch.
        index: [places] for every place of the packed row the number of the place in the padded batch, row by row;
            behind the tokens, where the row is filled up, that of the first one.
        lengths: tokens of every row, by its number in the batch, as they lie: from the shortest to the longest.
        groups: of all rows, as attention takes them.
        order: [tokens] places of the packed row as the groups have them; None: as they lie.
    """

    shape: tuple[int, int]
    index: torch.Tensor
    lengths: dict[int, int]
    groups: tuple[Group, ...]
    order: torch.Tensor | None = None
    _packed: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, mask: torch.Tensor, merge: bool = True, fill: bool = False) -> Layout:
        """Of a batch's mask [rows, width], True where a token is; wherever the padding is.

        A row without a token keeps its first place, so that no row is lost.

        Args:
            mask: of the batch.
            merge: whether a group may have rows of several lengths.
            fill: whether the packed row is filled up to one of a few sizes (see `filled`); what stands in the places
                behind the tokens is never seen, and gives no gradient.
        """
        mask = mask.clone()
        mask[:, 0] |= ~mask.any(1)
        lengths, order = mask.sum(1).sort(stable=True)
        found = mask[order].nonzero()
        index = order[found[:, 0]] * mask.shape[1] + found[:, 1]
        if fill:
            index = torch.cat([index, index[:1].expand(filled(len(index)) - len(index))])
        rows = dict(zip(order.tolist(), lengths.tolist(), strict=True))
        groups, _ = _grouped(rows, rows, _call(mask, merge))
        return cls((mask.shape[0], mask.shape[1]), index, rows, groups)

    def together(self, other: Layout, merge: bool = True) -> tuple[Layout, Layout]:
        """Both packings with groups of the same rows, as cross-attention takes them: in the order of this one.

        Args:
            other: of other tokens for the same rows.
            merge: whether a group may have rows of several lengths.
        """
        own, others = _grouped(self.lengths, other.lengths, _call(self.index, merge))
        places = other.rows(torch.arange(other.tokens, device=other.index.device)[None])
        order = torch.cat([places[row] for row in self.lengths])
        return replace(self, groups=own), replace(other, groups=others, order=order)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return next(reversed(self.lengths.values()))

    @cached_property
    def tokens(self) -> int:
        """Of all rows."""
        return sum(self.lengths.values())

    @cached_property
    def bounds(self) -> torch.Tensor:
        """[rows + 1] where each row of the packed row begins, and where the last one ends; 32-bit."""
        ends = itertools.accumulate(self.lengths.values(), initial=0)
        return torch.tensor([*ends], dtype=torch.int32, device=self.index.device)

    @property
    def widest(self) -> int:
        """Tokens that no group's rows are padded beyond, `apart` or not."""
        return _up_to(self.longest, STEP)

    def apart(self, merge: bool) -> Layout:
        """The same packing with groups in which a row is computed as its own length says, whatever the others are.

        What it is padded to follows from that alone; rows that need no padding have a group of their own, since
        attention without a mask may round in another way.

        Args:
            merge: whether rows may be padded.
        """

        def computed(row: int) -> tuple[int, bool]:
            length = self.lengths[row]
            padded = _up_to(length, STEP) if merge else length
            return padded, length == padded

        groups = []
        for (least, _), together in itertools.groupby(self.lengths, key=computed):
            rows = tuple(together)
            groups.append(Group(rows, tuple(self.lengths[row] for row in rows), least))
        return replace(self, groups=tuple(groups))

    @cached_property
    def columns(self) -> tuple[torch.Tensor, ...]:
        """For every group, the columns of its rows' tokens in the padded batch, [rows, length]."""
        return tuple(self.split((self.index % self.shape[1])[None], dim=1))

    def split(self, packed: torch.Tensor, dim: int) -> list[torch.Tensor]:
        """The groups: [1, ..., tokens, ...] as [rows, ..., length, ...] each."""
        if self.order is not None:
            packed = packed.index_select(dim, self.order)
        behind = packed.shape[dim] - self.tokens
        *pieces, _ = torch.split(packed, [*(group.tokens for group in self.groups), behind], dim)
        return [group.padded(piece, dim) for piece, group in zip(pieces, self.groups, strict=True)]

    def join(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """The groups' [rows, length, ...] as [1, places, ...]."""
        return self.fill([group.packed(piece) for piece, group in zip(pieces, self.groups, strict=True)])

    def fill(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """What lies side by side, [1, some tokens, ...] each, as [1, places, ...], with zeros behind the last token."""
        behind = pieces[0].new_zeros(1, len(self.index) - self.tokens, *pieces[0].shape[2:])
        return torch.cat([*pieces, behind], dim=1)

    def pack(self, value: Any) -> Any:
        """What of a layer's argument has a place for each token, [rows or 1, width, ...], as [1, places, ...].

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
        """[1, places, ...] as [length, ...] for each row of the batch, by its number."""
        pieces = torch.split(packed[0, : self.tokens], list(self.lengths.values()))
        return dict(zip(self.lengths, pieces, strict=True))

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, places, ...] as [rows, width, ...], with zeros for padding."""
        rows, width = self.shape
        empty = packed.new_zeros(rows * width, *packed.shape[2:])
        return torch.unflatten(
            empty.index_copy(0, self.index[: self.tokens], packed[0, : self.tokens]), 0, (rows, width)
        )


def _up_to(tokens: int, step: int) -> int:
    """The next multiple of a step."""
    return -(-tokens // step) * step


def filled(tokens: int) -> int:
    """To how many places a packed row is filled up, so that lengths have few sizes.

    They are at most a sixteenth more, or the next multiple of 16.

    On a CPU oneDNN makes code for every size of a product in half precision, in milliseconds and some 600 KiB of memory
    each, and keeps up to 1,024 of them.
    """
    return _up_to(tokens, max(LEAST, 2 ** (tokens.bit_length() - 1) // SIZES))


def _call(tensor: torch.Tensor, merge: bool) -> int:
    """What a call costs where a tensor is; nothing where each length is to have a call of its own."""
    return CALL.get(tensor.device.type, 0) if merge else 0


def _grouped(
    queries: Mapping[int, int], keys: Mapping[int, int], call: int
) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
    """Puts rows into groups: those beside each other together where padding costs less than a call.

    Args:
        queries: of each row, by its number, in order.
        keys: of each row, by its number.
        call: what a call costs, in scores.

    Returns:
        Groups of queries, and of the same rows' keys.
    """
    found: list[list[int]] = []
    long = wide = cost = 0  # of the last group: queries and keys of a padded row, and scores
    for row, length in queries.items():
        longer, wider, alone = max(long, length), max(wide, keys[row]), length * keys[row]
        together = (len(found[-1]) + 1) * longer * wider if found else 0
        if found and together - cost - alone <= call:
            found[-1].append(row)
            long, wide, cost = longer, wider, together
        else:
            found.append([row])
            long, wide, cost = length, keys[row], alone

    def groups(lengths: Mapping[int, int]) -> tuple[Group, ...]:
        return tuple(Group(tuple(rows), tuple(lengths[row] for row in rows)) for rows in found)

    return groups(queries), groups(keys)
