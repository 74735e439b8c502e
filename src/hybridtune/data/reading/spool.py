"""Rows on their way into one Arrow table: batch by batch, and over the disk where they are many.

A file may be larger than memory. What has been read of it is written into a temporary file, which is mapped in the end
and whose name is then gone: nothing is left behind, however the process ends.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import ipc

from ...errors import DataError
from .tables import REFUSALS, ROW, Form, array

Batch: TypeAlias = tuple[Mapping[str, Any], Sequence[int]]
"""Columns (lists, or Arrow arrays), and the number of each row."""

BATCH_ROWS = 10_000
BATCH_CHARACTERS = 2**24
HELD_BYTES = 2**25  # what is not more than this stays in memory


class MixedTypes(Exception):
    """Columns are of several types in several batches: all has to be read again, and made what `forms` says.

    Nothing that is written already can be converted instead: 1 beside 2.5 is 1.0 there, and "1" beside a text.
    """

    def __init__(self, forms: dict[str, Form]) -> None:
        super().__init__(forms)
        self.forms = forms


class Spool:
    """Takes batches, gives one table.

    Args:
        folder: a temporary folder.
        forms: what columns have to be made that are not of one type.
    """

    def __init__(self, folder: Path, forms: Mapping[str, Form]) -> None:
        self.folder, self.forms = folder, forms
        self.types: dict[str, dict[pa.DataType, None]] = {}
        self.held: list[pa.Table] = []
        self.held_bytes = 0
        self.segments: list[Path] = []
        self.writer: ipc.RecordBatchStreamWriter | None = None
        self.schema: pa.Schema | None = None

    def add(self, batch: Batch) -> None:
        """Takes a batch; its columns need not be those of the batches before.

        Raises:
            DataError: the disk is full.
        """
        columns, numbers = batch
        made = {name: self._made(name, values) for name, values in columns.items()}
        table = pa.table(made | {ROW: pa.array(numbers, pa.int64())})
        for field in table.schema:
            self.types.setdefault(field.name, {})[field.type] = None
        self.held.append(table)
        self.held_bytes += table.nbytes
        if self.held_bytes > HELD_BYTES:
            self._write_held()

    def _made(self, name: str, values: Any) -> pa.Array:
        form = self.forms.get(name)
        if isinstance(values, (pa.Array, pa.ChunkedArray)):
            return values if form is None else array(values.to_pylist(), form)
        return array(values, form)

    def finish(self) -> pa.Table:
        """Returns all rows.

        Raises:
            MixedTypes: columns are of several types.
            DataError: the disk is full.
        """
        schema = self._common_schema()
        if not self.segments:
            tables = [_cast(table, schema) for table in self.held]
            return pa.concat_tables(tables) if tables else schema.empty_table()
        self._write_held()
        self._close()
        if len(self.segments) == 1 and self.schema == schema:
            return _map(self.segments[0])
        whole = self.folder / "whole.arrow"
        with _disk_errors(self.folder), ipc.new_stream(str(whole), schema) as writer:
            for segment in self.segments:
                with pa.memory_map(str(segment)) as source:
                    for batch in ipc.open_stream(source):
                        writer.write_table(_cast(pa.Table.from_batches([batch]), schema))
                segment.unlink()
        return _map(whole)

    def _write_held(self) -> None:
        with _disk_errors(self.folder):
            for table in self.held:
                if self.writer is None or self.schema != table.schema:
                    self._close()
                    self.segments.append(self.folder / f"{len(self.segments)}.arrow")
                    self.writer, self.schema = ipc.new_stream(str(self.segments[-1]), table.schema), table.schema
                self.writer.write_table(table)
        self.held, self.held_bytes = [], 0

    def _close(self) -> None:
        if self.writer is not None:
            with _disk_errors(self.folder):
                self.writer.close()
            self.writer = None

    def _common_schema(self) -> pa.Schema:
        fields, forms = [], dict(self.forms)
        for name, types in self.types.items():
            try:
                schemas = [pa.schema([pa.field(name, one)]) for one in types]
                fields.append(pa.unify_schemas(schemas, promote_options="permissive").field(0))
            except pa.ArrowException:
                forms[name] = _next_form(list(types))
        if forms != self.forms:
            raise MixedTypes(forms)
        names = [field.name for field in fields if field.name != ROW]
        return pa.schema([*(pa.schema(fields).field(name) for name in names), pa.field(ROW, pa.int64())])


def without_empty(table: pa.Table, prefix: str) -> pa.Table:
    """Returns a table without those columns that begin with `prefix` and are empty: a spreadsheet's last ones."""
    for name in [name for name in table.column_names if name.startswith(prefix)]:
        column = table[name]
        texts = pa.types.is_string(column.type)
        if pa.types.is_null(column.type) or (texts and not pc.max(pc.utf8_length(column)).as_py()):
            table = table.remove_column(table.column_names.index(name))
    return table


def _next_form(types: list[pa.DataType]) -> Form:
    lists = [pa.types.is_list(one) or pa.types.is_large_list(one) for one in types if not pa.types.is_null(one)]
    if not any(lists):
        return "text"
    return "texts" if all(lists) else "lists"


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Returns the table with all columns of a schema, in its types.

    Raises:
        MixedTypes: a value has no place in a type: an integer beyond what a fraction can tell from its neighbours.
    """
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(len(table), field.type))
            continue
        column = table[field.name]
        try:
            columns.append(column if column.type == field.type else _converted(column, field.type))
        except REFUSALS:
            raise MixedTypes({field.name: _next_form([column.type, field.type])}) from None
    return pa.table(columns, schema=schema)


def _converted(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.Array | pa.ChunkedArray:
    try:
        return column.cast(wanted)
    except pa.ArrowNotImplementedError:
        return pa.array(column.to_pylist(), wanted)


def _map(path: Path) -> pa.Table:
    """The table of a file, which is read where it is looked at; the file goes with the table."""
    table = ipc.open_stream(pa.memory_map(str(path))).read_all()
    path.unlink()
    return table


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"{folder.parent}: no space left on the disk for the rows that are read",
            found=f"{shutil.disk_usage(folder.parent).free / 2**20:.0f} MiB free",
            expected="about as much as the files have, uncompressed",
            mend="free some space, or name a folder on a larger disk in the environment variable TMPDIR",
        ) from None
