"""Select documents by the fields beside their text: `--filter` and `--ids`.

The same conditions hold for JSON lines and for columns of a table. Must not know files or how documents are split.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinytrain_dist.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_COMPARISONS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {  # with the function of pyarrow.compute
    "==": ("equal", operator.eq),
    "!=": ("not_equal", operator.ne),
    "<=": ("less_equal", operator.le),
    ">=": ("greater_equal", operator.ge),
    "<": ("less", operator.lt),
    ">": ("greater", operator.gt),
}
_CONDITION = re.compile(
    r"\s*(?P<field>[^\s=!<>]+)\s*(?:(?P<null>is\s+(?:not\s+)?null)|(?P<comparison>==|!=|<=|>=|<|>|in\s)\s*(?P<value>.*\S))\s*",
    re.DOTALL,
)
FORMS = "FIELD == VALUE, !=, <, <=, >, >=, FIELD in A, B, C, FIELD is null, FIELD is not null"
_BOOLEANS = {"true": True, "false": False}
_MISSING = object()


class UnfitValueError(Exception):
    """A value of a condition does not fit the type of the field: the end of a sentence."""


@dataclass(frozen=True)
class Condition:
    """One condition on a field. values: as written; one for a comparison, several for `in`, none for a test of null."""

    text: str
    field: str
    comparison: str  # a key of _COMPARISONS, "in", "is null" or "is not null"
    values: tuple[str, ...]


def parse_condition(text: str) -> Condition:
    """Return the condition that a `--filter` states. Errors: ValueError with the end of a sentence."""
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no condition; write one of {FORMS}")
    if match["null"]:
        return Condition(text, match["field"], " ".join(match["null"].split()), ())
    comparison = match["comparison"].strip()
    parts = match["value"].split(",") if comparison == "in" else [match["value"]]
    return Condition(text, match["field"], comparison, tuple(_unquoted(text, part.strip()) for part in parts))


def _unquoted(condition: str, value: str) -> str:
    """Return a value without the quotes around it. Errors: ValueError with the end of a sentence."""
    if not value or value[0] not in "'\"":
        return value
    if len(value) > 1 and value[-1] == value[0]:
        return value[1:-1]
    other = "'" if value[0] == '"' else '"'
    raise ValueError(
        f"{condition!r} has a quote {value[0]} before {value[1:]!r} that is not closed; close it (a value of `in` "
        f"cannot contain a comma), or, if it belongs to the value, write {other}{value}{other}"
    )


def read_ids(place: str) -> frozenset[str]:
    """Return the IDs in a file, one on each line. Errors: DataError."""
    try:
        lines = Path(place).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(
            f"--ids {place}: cannot be read ({reason}); give a text file with one ID on each line"
        ) from None
    ids = frozenset(line.strip() for line in lines if line.strip())
    if not ids:
        raise DataError(f"--ids {place}: contains no ID; give a text file with one ID on each line")
    return ids


@dataclass
class Tally:
    """What a selection has met: records, that is JSON lines and rows, and those kept; fields of conditions; names."""

    records: int = 0
    kept: int = 0
    fields: set[str] = field(default_factory=set)
    names: list[str] = field(default_factory=list)  # of all fields of the first record


@dataclass(frozen=True)
class Selection:
    """Which documents are kept: those that meet all conditions and whose ID is in `ids`. found: IDs that were met."""

    conditions: tuple[Condition, ...] = ()
    id_field: str | None = None
    ids: frozenset[str] = frozenset()
    found: set[str] = field(default_factory=set, compare=False)
    tally: Tally = field(default_factory=Tally, compare=False)

    def __bool__(self) -> bool:
        return bool(self.conditions) or self.id_field is not None

    @property
    def fields(self) -> list[str]:
        """The fields that it needs."""
        return [condition.field for condition in self.conditions] + ([self.id_field] if self.id_field else [])

    @property
    def options(self) -> str:
        """The options that it comes from, for messages."""
        given = [*(["--filter"] if self.conditions else []), *(["--ids"] if self.id_field else [])]
        return " and ".join(given)

    def unknown_fields(self) -> list[str]:
        """Return clauses about conditions on fields that no record had."""
        clauses = []
        for condition in self.conditions:
            if condition.field in self.tally.fields:
                continue
            close = [] if "." in condition.field else difflib.get_close_matches(condition.field, self.tally.names, n=1)
            names = ", ".join(map(repr, self.tally.names[:9])) or "none"
            hint = f"did you mean {close[0]!r}?" if close else f"the first one has {names}"
            clauses.append(
                f"no document has the field {condition.field!r}, which --filter {condition.text!r} names; {hint}"
            )
        return clauses

    def keeps(self, where: str, record: Any) -> bool:
        """Return whether a JSON value is kept, and count it. Errors: DataError that begins with `where`."""
        tally = self.tally
        tally.records += 1
        if not isinstance(record, dict):
            return False
        if not tally.names:
            tally.names += record
        for condition in self.conditions:
            if condition.field not in tally.fields and field_of(record, condition.field) is not _MISSING:
                tally.fields.add(condition.field)
        is_kept = self._keeps(where, record)
        tally.kept += is_kept
        return is_kept

    def _keeps(self, where: str, record: dict[str, Any]) -> bool:
        for condition in self.conditions:
            try:
                if not _meets(condition, field_of(record, condition.field)):
                    return False
            except UnfitValueError as error:
                raise _unfit_error(where, condition, error) from None
        if self.id_field is None:
            return True
        found = field_of(record, self.id_field)
        if not isinstance(found, str | int) or isinstance(found, bool):
            kind = "is missing" if found is _MISSING else f"is of type {type(found).__name__}"
            raise DataError(
                f"{where}: the ID in the field {self.id_field!r} {kind}; set --id-field to a text or integer"
            )
        if str(found) not in self.ids:
            return False
        self.found.add(str(found))
        return True

    def mask(self, where: str, batch: pa.RecordBatch) -> pa.BooleanArray | None:
        """Return which rows of a batch are kept, and count them; None for all.

        Errors: DataError that begins with `where`.
        """
        import pyarrow.compute as pc

        mask = None
        for condition in self.conditions:
            try:
                meets = _mask(condition, column_of(batch, condition.field))
            except UnfitValueError as error:
                raise _unfit_error(where, condition, error) from None
            mask = meets if mask is None else pc.and_(mask, meets)
        if self.id_field is not None:
            names = pc.cast(column_of(batch, self.id_field), "string")
            known = pc.is_in(names, value_set=self._id_array)
            mask = known if mask is None else pc.and_(mask, known)
            self.found.update(names.filter(mask).to_pylist())
        self.tally.records += len(batch)
        self.tally.kept += len(batch) if mask is None else mask.true_count
        self.tally.fields.update(condition.field for condition in self.conditions)  # by check_schema
        return mask

    @cached_property
    def _id_array(self) -> pa.Array:
        import pyarrow as pa

        return pa.array(sorted(self.ids), "string")

    def check_schema(self, schema: pa.Schema) -> list[str]:
        """Return what is wrong with the columns of a table: the ends of sentences."""
        problems = []
        for condition in self.conditions:
            kind = type_of(schema, condition.field)
            if kind is None:
                problems.append(f"has no column {condition.field!r}, which --filter {condition.text!r} needs")
                continue
            try:
                _literals(condition, kind)
            except UnfitValueError as error:
                problems.append(f"--filter {condition.text!r}: {error}")
        if self.id_field is not None:
            problems += self._problem_of_ids(type_of(schema, self.id_field))
        return problems

    def _problem_of_ids(self, kind: pa.DataType | None) -> list[str]:
        import pyarrow.types as types

        if kind is None:
            return [f"has no column {self.id_field!r}, which --id-field names"]
        value = kind.value_type if types.is_dictionary(kind) else kind
        if _is_text(value) or types.is_integer(value):
            return []
        return [f"has IDs of type {kind} in the column {self.id_field!r}; set --id-field to one with text or integers"]


def _unfit_error(where: str, condition: Condition, error: UnfitValueError) -> DataError:
    return DataError(f"{where}: --filter {condition.text!r}: {error}")


# --- JSON ------------------------------------------------------------------------------------------------------------


def field_of(record: dict[str, Any], name: str) -> Any:
    """Return a field of a JSON object, or a field of a field for a name with dots; `_MISSING` if there is none."""
    if name in record:
        return record[name]
    head, _, rest = name.partition(".")
    inner = record.get(head)
    return field_of(inner, rest) if rest and isinstance(inner, dict) else _MISSING


def _meets(condition: Condition, value: Any) -> bool:
    """Return whether a value of a JSON object meets a condition. Errors: UnfitValueError."""
    is_null = value is None or value is _MISSING
    if condition.comparison in ("is null", "is not null"):
        return is_null == (condition.comparison == "is null")
    if is_null:
        return False
    if isinstance(value, bool):
        literals: list[Any] = [_boolean(text, condition.comparison) for text in condition.values]
    elif isinstance(value, int | float):
        literals = [_number(text) for text in condition.values]
    elif isinstance(value, str):
        literals = list(condition.values)
    else:
        raise UnfitValueError(f"the field is a {type(value).__name__}; only text, numbers, true and false are compared")
    if condition.comparison == "in":
        return value in literals
    return _COMPARISONS[condition.comparison][1](value, literals[0])


def _boolean(text: str, comparison: str) -> bool:
    if text.lower() not in _BOOLEANS or comparison not in ("==", "!=", "in"):
        raise UnfitValueError("the field is true or false; write FIELD == true or FIELD == false")
    return _BOOLEANS[text.lower()]


def _number(text: str) -> float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise UnfitValueError(f"the field is a number, and {text!r} is none; write a number")


# --- tables ----------------------------------------------------------------------------------------------------------


def type_of(schema: Any, name: str) -> Any:
    """Return the type of a column, or of a field of a structure for a name with dots; None if there is none."""
    import pyarrow.types as types

    index = schema.get_field_index(name)
    if index >= 0:
        return schema.field(index).type
    head, _, rest = name.partition(".")
    outer = schema.field(head).type if rest and schema.get_field_index(head) >= 0 else None
    return type_of(outer, rest) if outer is not None and types.is_struct(outer) else None


def top_columns(schema: pa.Schema, names: Iterable[str]) -> list[str]:
    """Return the columns of a table that hold these fields."""
    return list(dict.fromkeys(name if schema.get_field_index(name) >= 0 else name.partition(".")[0] for name in names))


def column_of(batch: pa.RecordBatch, name: str) -> pa.Array:
    """Return a column that `type_of` finds, with the values of a dictionary in place of their numbers."""
    import pyarrow.compute as pc
    import pyarrow.types as types

    if batch.schema.get_field_index(name) >= 0:
        column = batch.column(name)
    else:
        head, _, rest = name.partition(".")
        column, parts = batch.column(head), rest.split(".")
        while parts:  # the longest name first, as field_of does
            size = next(n for n in range(len(parts), 0, -1) if column.type.get_field_index(".".join(parts[:n])) >= 0)
            column, parts = pc.struct_field(column, [".".join(parts[:size])]), parts[size:]
    return column.dictionary_decode() if types.is_dictionary(column.type) else column


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _literals(condition: Condition, kind: Any) -> list[Any]:
    """Return the values of a condition as values of a column's type. Errors: UnfitValueError."""
    import pyarrow as pa
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_null(kind) or not condition.values:
        return []
    if types.is_boolean(kind):
        return [_boolean(text, condition.comparison) for text in condition.values]
    if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return [_number(text) for text in condition.values]
    if _is_text(kind):
        return [pa.scalar(text, kind) for text in condition.values]
    try:
        return [pa.scalar(text).cast(kind) for text in condition.values]
    except (pa.ArrowException, NotImplementedError):
        raise UnfitValueError(f"the column is of type {kind}, which is not compared with such a value") from None


def _mask(condition: Condition, column: pa.Array) -> pa.BooleanArray:
    """Return which values meet a condition, without nulls in the answer. Errors: UnfitValueError."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.types as types

    if condition.comparison in ("is null", "is not null"):
        return column.is_null() if condition.comparison == "is null" else column.is_valid()
    if types.is_null(column.type):
        return pa.array([False] * len(column))
    literals = _literals(condition, column.type)
    name = "equal" if condition.comparison == "in" else _COMPARISONS[condition.comparison][0]
    meets = pc.call_function(name, [column, literals[0]])
    for literal in literals[1:]:
        meets = pc.or_(meets, pc.call_function(name, [column, literal]))
    return pc.fill_null(meets, False)
