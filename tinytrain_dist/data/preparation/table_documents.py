"""Read documents from tables: Parquet row group by row group, and Arrow files batch by batch.

Only the columns that are needed are read, and never a whole file. Must not know where files are or who needs the
documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from tinytrain_dist.data.preparation.compressed_files import Meter
from tinytrain_dist.data.preparation.content_type import Format
from tinytrain_dist.data.preparation.conversations import TOOLS_FIELD, conversation_of_row
from tinytrain_dist.data.preparation.selection import column_of, top_columns, type_of
from tinytrain_dist.data.preparation.text_documents import Document, Reading, documents_of_text, to_valid_utf8
from tinytrain_dist.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

# Of a row group this much text is in memory at once, as far as its sizes say it. Row groups can have gigabytes.
_BATCH_BYTES = 8 << 20
_MAX_BATCH_ROWS = 4096
_READ_BYTES = 1 << 20  # parts in which a column of a row group is read


@dataclass(frozen=True)
class Table:
    """An open table. block: a row group of Parquet, or a record batch of Arrow."""

    path: str
    form: Literal["parquet", "arrow", "arrow-stream"]
    file: Any  # of pyarrow
    schema: Any
    blocks: int | None  # None: known at the end of the stream


def open_table(path: str, file: BinaryIO, form: Format) -> Table:
    """Open a table. Errors: DataError if it is damaged, or if pyarrow is missing."""
    try:
        import pyarrow as pa
        import pyarrow.ipc as ipc
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(
            f"{path}: is a table, which needs a library that is not installed; pip install 'tinytrain_dist[parquet]'"
        ) from error
    with _damage_named(path, "the file"):
        source = pa.PythonFile(file, mode="r")
        if form == "parquet":
            table = parquet.ParquetFile(source, buffer_size=_READ_BYTES, pre_buffer=False)
            return Table(path, "parquet", table, table.schema_arrow, table.num_row_groups)
        if form == "arrow":
            reader = ipc.open_file(source)
            return Table(path, "arrow", reader, reader.schema, reader.num_record_batches)
        stream = ipc.open_stream(source)
        return Table(path, "arrow-stream", stream, stream.schema, None)


def table_problems(table: Table, reading: Reading) -> list[str]:
    """Return why documents cannot be read from a table: the ends of sentences."""
    import pyarrow.types as types

    kind = type_of(table.schema, reading.text_field)
    columns = ", ".join(f"{column.name}: {column.type}" for column in list(table.schema)[:9])
    if kind is None:
        problem = f"has no column {reading.text_field!r} ({columns}); set --text-field to the one with the text"
        return [problem, *reading.selection.check_schema(table.schema)]
    value = kind.value_type if types.is_dictionary(kind) else kind
    problems = []
    if reading.chat:
        if not (types.is_list(value) or types.is_large_list(value)):
            problems = [f"has {kind} and not messages in the column {reading.text_field!r}; set --text-field"]
    elif not (types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)):
        problems = [f"has {kind} and not text in the column {reading.text_field!r} ({columns}); set --text-field"]
    return problems + reading.selection.check_schema(table.schema)


def table_documents(
    table: Table, reading: Reading, meter: Meter, size: int, start_block: int = 0
) -> Iterator[Document]:
    """Yield the documents of a table from a block on.

    meter: gets the share of the file that was read. size: of the file in bytes.
    Errors: DataError that names the row group or batch, and the row.
    """
    for block, first_row, batch in _batches(table, reading, start_block):
        meter.bytes = int(size * _share_before(table, block, first_row))
        where = f"{table.path}: {_name(table, block)}"
        mask = reading.selection.mask(where, batch) if reading.selection else None
        texts = column_of(batch, reading.text_field)
        kept = mask.to_pylist() if mask is not None else None
        if reading.chat:
            has_tools = batch.schema.get_field_index(TOOLS_FIELD) >= 0
            tools = column_of(batch, TOOLS_FIELD).to_pylist() if has_tools else [None] * len(texts)
            for row, messages in enumerate(texts.to_pylist()):
                if kept is None or kept[row]:
                    place = f"{where}, row {first_row + row + 1}"
                    yield Document(block, conversation_of_row(place, messages, tools[row], reading.text_field))
            continue
        binary = "large_binary" if str(texts.type) == "large_string" else "binary"
        for row, text in enumerate(texts.cast(binary).to_pylist()):
            if kept is not None and not kept[row]:
                continue
            place = f"{where}, row {first_row + row + 1}"
            if text is None:
                raise DataError(
                    f"{place} has no text in the column {reading.text_field!r} (it is null); leave such rows out with "
                    f"--filter '{reading.text_field} is not null', or set --text-field"
                )
            for document in documents_of_text(to_valid_utf8(place, text, 0, reading), reading):
                yield Document(block, document)


def _share_before(table: Table, block: int, row: int) -> float:
    """Return the share of a table that lies before a row of a block; 0 where the number of blocks is not known."""
    if table.blocks is None:
        return 0.0
    rows = table.file.metadata.row_group(block).num_rows if table.form == "parquet" else 1
    return (block + row / max(rows, 1)) / table.blocks


def _name(table: Table, block: int) -> str:
    return f"{'row group' if table.form == 'parquet' else 'batch'} {block + 1}"


def _batches(table: Table, reading: Reading, start_block: int) -> Iterator[tuple[int, int, pa.RecordBatch]]:
    """Yield (block, number of the first row in it, rows) with the columns that are needed."""
    tools = [TOOLS_FIELD] if reading.chat and table.schema.get_field_index(TOOLS_FIELD) >= 0 else []
    columns = top_columns(table.schema, [reading.text_field, *reading.selection.fields, *tools])
    if table.form == "arrow-stream":
        yield from _stream_batches(table, columns, start_block)
        return
    for block in range(start_block, table.blocks or 0):
        with _damage_named(table.path, _name(table, block)):
            first_row = 0
            if table.form == "arrow":
                batch = table.file.get_batch(block).select(columns)
                yield block, 0, batch
                continue
            rows = _rows_at_once(table.file.metadata.row_group(block), columns)
            for batch in table.file.iter_batches(rows, [block], columns, use_threads=False):
                yield block, first_row, batch
                first_row += len(batch)


def _stream_batches(table: Table, columns: list[str], start_block: int) -> Iterator[tuple[int, int, pa.RecordBatch]]:
    block = 0
    while True:
        with _damage_named(table.path, _name(table, block)):
            try:
                batch = table.file.read_next_batch()
            except StopIteration:
                return
        if block >= start_block:
            yield block, 0, batch.select(columns)
        block += 1


def _rows_at_once(row_group: Any, columns: list[str]) -> int:
    """Return how many rows of a row group have about _BATCH_BYTES in the columns that are read."""
    found = [row_group.column(index) for index in range(row_group.num_columns)]
    size = sum(int(part.total_uncompressed_size) for part in found if part.path_in_schema.split(".")[0] in columns)
    return max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * int(row_group.num_rows) // max(size, 1)))


@contextmanager
def _damage_named(path: str, part: str) -> Iterator[None]:
    """Raise DataError for what pyarrow says about a damaged file. part: of the file that is being read."""
    import pyarrow as pa

    try:
        yield
    except DataError:
        raise
    except (pa.ArrowException, OSError, EOFError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(
            f"{path}: {part} cannot be read, because the file is damaged or cut short ({reason}); get or create the "
            "file again"
        ) from error
