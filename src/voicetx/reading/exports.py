"""Write listed transactions as JSON, as NDJSON, or as CSV that is safe to open in a spreadsheet.

Where a spreadsheet would read a cell of the CSV as a formula, or drop its plus sign, an apostrophe is put before that
sign. docs/reports.md says how a program removes it again. Pure functions on pages of `voicetx.reading.listings`.
"""

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Any

import orjson

from voicetx.contract import privacy
from voicetx.contract.fields import WIRE_NAMES
from voicetx.reading.listings import ListedTransaction, Receipt
from voicetx.times import format_time

_COLUMNS = (*WIRE_NAMES.values(), "inconsistent", "finished", "updates", "registered_at", "updated_at")

# The places that get an apostrophe: before any sign that begins a formula (OWASP, CSV Injection), full-width ones too,
# at the start of a cell and after any character at which a spreadsheet of some country splits cells. Also before an
# apostrophe in these places, so that the original can be restored.
_BEGINS_FORMULA = re.compile(r"(?:^|(?<=[,;|\t\r\n\"]))(?=[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20'])")


class ExportFormat(StrEnum):
    """The format of an export."""

    CSV = "csv"
    NDJSON = "ndjson"


def mask_listed(row: ListedTransaction) -> ListedTransaction:
    """Return a row with everything personal hidden, for users without the grant to read it."""
    return replace(row, fields={name: privacy.mask_field(name, value) for name, value in row.fields.items()})


def describe_listed(row: ListedTransaction) -> dict[str, Any]:
    """Return a row as JSON shows it: the fields by their wire names, and what else is known of the transaction."""
    return {
        "transaction-id": row.transaction_id,
        **row.fields,
        "inconsistent": row.is_inconsistent,
        "finished": row.is_finished,
        "updates": row.updates,
        "registered_at": format_time(row.registered_at_ms),
        "updated_at": format_time(row.updated_at_ms) if row.updated_at_ms is not None else None,
    }


def describe_receipt(receipt: Receipt) -> dict[str, Any]:
    """Return a receipt as JSON shows it."""
    return {
        "transaction-id": receipt.transaction_id,
        "registered": receipt.is_registered,
        "updates": receipt.updates,
        "held": receipt.is_held,
    }


def begin_export(export_format: ExportFormat) -> bytes:
    """Return the beginning of an export: the header of a CSV, nothing for other formats."""
    return _write_csv([dict(zip(_COLUMNS, _COLUMNS, strict=True))]) if export_format is ExportFormat.CSV else b""


def render_rows(rows: Iterable[ListedTransaction], export_format: ExportFormat) -> bytes:
    """Return rows as lines of an export."""
    return _RENDER[export_format](map(describe_listed, rows))


def defuse(value: str) -> str:
    """Return a cell's value with an apostrophe wherever a spreadsheet might not take what follows for plain text."""
    return _BEGINS_FORMULA.sub("'", value)


def _write_ndjson(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)


def _write_csv(rows: Iterable[Mapping[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([_to_cell(row.get(name)) for name in _COLUMNS] for row in rows)  # RFC 4180
    return text.getvalue().encode()


def _to_cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case _:
            return defuse(str(value))


_RENDER: Mapping[ExportFormat, Callable[[Iterable[Mapping[str, Any]]], bytes]] = {
    ExportFormat.CSV: _write_csv,
    ExportFormat.NDJSON: _write_ndjson,
}
