"""Files of rows: where their bytes are, by which suffix they go, and how they are opened, compressed or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import pyarrow as pa

from ...errors import DataError

READ_AS = ", read as "  # what `describe` puts between a path and its encoding

_PACKED = ("", ".gz", ".zst", ".bz2")
_TABLES = (".csv", ".tsv")
_LINES = (".jsonl", ".ndjson")
CONLL_SUFFIXES = (".conll", ".bio", ".iob", ".iob2")
SHEET_SUFFIXES = (".xlsx", ".xls", ".ods")
PLAIN_TEXT_SUFFIXES = (*_TABLES, ".json", *_LINES, *CONLL_SUFFIXES)
SUFFIXES = (*PLAIN_TEXT_SUFFIXES, ".parquet", *SHEET_SUFFIXES)
TEXT_SUFFIXES = tuple(suffix + packed for suffix in PLAIN_TEXT_SUFFIXES for packed in _PACKED)
# Where a row is found by its line; elsewhere by its number.
LINED_SUFFIXES = tuple(suffix + packed for suffix in (*_TABLES, *_LINES, *CONLL_SUFFIXES) for packed in _PACKED)

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}


@dataclass(frozen=True)
class File:
    """One file of rows.

    Attributes:
        name: as the user has it, for messages.
        path: where its bytes are on this machine.
    """

    name: str
    path: Path

    @property
    def suffix(self) -> str:
        """Its suffix in lower case, without that of a compression: ".csv" of "a.CSV.gz"."""
        named = Path(urlsplit(self.name).path if "://" in self.name else self.name)
        return Path(named.stem).suffix.lower() if named.suffix.lower() in _PACKED[1:] else named.suffix.lower()

    @property
    def lined(self) -> bool:
        """Whether its rows are found by their lines."""
        return self.name.lower().endswith(LINED_SUFFIXES)

    def compression(self) -> str | None:
        """Returns how the bytes are compressed, whatever the name says.

        Raises:
            DataError: the file cannot be opened.
        """
        try:
            with self.path.open("rb") as stream:
                start = stream.read(4)
        except OSError as error:
            raise DataError(f"{self.name}: cannot be opened", found=error.strerror or str(error)) from error
        return next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Opens the file; what is read of it is no longer compressed.

        Raises:
            DataError: the file cannot be opened, or not be read to its end.
        """
        compression = self.compression()
        try:
            if compression is None:
                with self.path.open("rb") as plain:
                    yield plain
            else:
                with pa.input_stream(str(self.path), compression=compression) as packed:
                    yield packed
        except OSError as error:
            if compression is None:
                raise DataError(f"{self.name}: cannot be read", found=error.strerror or str(error)) from error
            raise DataError(
                f"{self.name}: the compressed file is cut off or damaged",
                found=f"{compression}: {error}",
                mend="copy or download it once more",
            ) from error

    def head(self, size: int) -> bytes:
        """Returns its first bytes."""
        with self.open() as stream:
            return stream.read(size)
