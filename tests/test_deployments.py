"""Files of transaction ids: read line by line as a whole reader would, and in bounded memory whatever they hold."""

import codecs
import csv
import gzip
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voicetx.campaigns.id_files import FileFormat, IdFileError, IdLine, Loading, guess_encoding, read_lines

UNCLOSED = "not CSV: a quote on this line is not closed"
SWALLOWS = "not CSV: a quote on this line is closed on a later one, after lines with ids of their own"
CELLS = st.text('ab,"\r\n \u00e9', max_size=6)


@given(st.lists(st.tuples(CELLS, st.integers(0, 99), CELLS), max_size=8))
def test_a_csv_is_read_as_any_reader_would(rows: list[tuple[str, int, str]]) -> None:
    """Whatever stands in the other columns, quotes and line breaks too, each id is found at the end of its row.

    There are so many columns that no line within quotes has as many cells as a row.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerows(
        [
            ("a", "transaction-id", *"bcdefg"),
            *((before, f"tx-{number}", *[""] * 5, after) for before, number, after in rows),
        ]
    )
    lines = text.getvalue().split("\n")[:-1]
    reader = csv.reader((line + "\n" for line in lines), strict=True)
    expected = [IdLine(reader.line_num, row[1]) for row in reader]
    assert list(read_lines((line + "\n" for line in lines), FileFormat.CSV)) == expected[1:]


def test_a_quote_that_is_not_closed_costs_its_line_only() -> None:
    """Quotes that nobody closes are given up after a hundred lines, or 128 KiB, or the file; what follows is read."""
    for line in ("b\n", "b" * 128 + "\n", "b" * 70_000 + "\n"):
        found = list(read_lines(["transaction-id\n", '"a\n', *[line] * 200, "end\n"], FileFormat.CSV))
        assert found[0] == IdLine(2, None, UNCLOSED)
        assert [row.number for row in found[1:]] == [*range(3, 204)]
        assert found[-1] == IdLine(203, "end")
    found = list(read_lines(["transaction-id\n", "a\n", '"b\n', "c\n"], FileFormat.CSV))
    assert found == [IdLine(2, "a"), IdLine(3, None, UNCLOSED), IdLine(4, "c")]


def test_two_quotes_that_nobody_closes_swallow_no_id() -> None:
    """Quotes that a later line happens to end are refused where the lines between have ids of their own."""
    for after in ("5 inch", "5 inch,"):  # as many cells as the header has, and more
        rows = [f"id-{number},{after}\n" for number in range(200)]
        rows[50], rows[100] = 'id-50,"5 inch\n', 'id-100,5 inch"\n'
        found = list(read_lines(["transaction-id,size\n", *rows], FileFormat.CSV))
        expected = [IdLine(number, f"id-{number - 2}") for number in range(2, 202)]
        expected[50] = IdLine(52, None, SWALLOWS)
        assert found == expected


def test_rows_with_fewer_cells_than_the_header_are_not_swallowed() -> None:
    """A line within quotes is also compared with the rows before it: some files leave out empty cells."""
    lines = ["transaction-id,size\n", "a\n", 'b,"5 inch\n', "c\n", 'd,5 inch"\n']
    ids = [(row.number, row.transaction_id) for row in read_lines(lines, FileFormat.CSV)]
    assert ids == [(2, "a"), (3, None), (4, "c"), (5, "d")]


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        ("transaction-id\n".encode("utf-16-le"), "is UTF-16 without a byte order mark; save it as UTF-8"),
        ("transaction-id\n".encode("utf-16-be"), "is UTF-16 without a byte order mark; save it as UTF-8"),
        ("transaction-id\n".encode("utf-32"), "is UTF-32; save it as UTF-8"),
        (codecs.BOM_UTF32_BE + "t".encode("utf-32-be"), "is UTF-32; save it as UTF-8"),
        ("transaction-id\n".encode("utf-32-le"), "is UTF-32; save it as UTF-8"),
        (gzip.compress(b"transaction-id\n"), "is compressed with gzip; unpack it first"),
        (b"PK\x03\x04\x14\x00", "is a ZIP archive, as Excel's .xlsx files are; save it as CSV"),
    ],
)
def test_a_file_that_is_no_text_we_read_is_refused_with_the_reason(start: bytes, reason: str) -> None:
    """What a file is, is told by its first bytes; ids are not sought in what cannot hold any."""
    with pytest.raises(IdFileError) as caught:
        guess_encoding(start)
    assert (caught.value.reason, str(caught.value)) == (reason, f"The file {reason}.")


@pytest.mark.parametrize("lines", [[], ["\n", "\r\n"]])
def test_an_empty_csv_is_called_empty(lines: list[str]) -> None:
    """It has no first line of which one could say what is wrong with it."""
    with pytest.raises(IdFileError, match=r"^The file is empty\.$"):
        list(read_lines(lines, FileFormat.CSV))


@given(
    st.lists(st.sampled_from(["x", '"x', 'x"', '"x"', '"', '""', 'x"y', "x,y", ""]), min_size=1, max_size=12),
    st.sampled_from([",", ";", "\t"]),
)
def test_whatever_quotes_do_no_line_is_lost(cells: list[str], delimiter: str) -> None:
    """Each line of a CSV has its id loaded, or is named as at fault."""
    table = [("transaction-id", "note"), *((f"tx-{place}", cell) for place, cell in enumerate(cells)), ("last", "")]
    lines = [delimiter.join(row) + "\n" for row in table]
    found = list(read_lines(lines, FileFormat.CSV))
    numbers = [row.number for row in found]
    assert numbers == [*range(2, len(lines) + 1)]
    rows = iter(lines[1:])
    number = 1
    for row in found:
        text = "".join(next(rows) for _ in range(row.number - number))
        number = row.number
        if row.transaction_id is None:
            assert text.count("\n") == 1
            assert text.count('"')
        else:
            (read,) = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            assert read[0] == row.transaction_id
    assert number == len(lines)


@given(
    st.lists(st.sampled_from([f"tx-{number}" for number in range(8)] + [None]), max_size=40),
    st.sets(st.sampled_from([f"tx-{number}" for number in range(8)])),
    st.integers(1, 9),
)
def test_each_line_comes_to_one_thing(names: list[str | None], elsewhere: set[str], at_once: int) -> None:
    """In whatever portions lines are registered, each is the first of its id, one more of it, or at fault."""
    loading, faults = Loading(), []
    lines = [IdLine(number, name, None if name else "bad") for number, name in enumerate(names, start=1)]
    for start in range(0, len(lines), at_once):
        loading.add(lines[start : start + at_once])
        faults += loading.settle(elsewhere & set(loading.ids))
    loaded = {name for name in names if name is not None} - elsewhere
    bad = [line.number for line in lines if line.transaction_id is None or line.transaction_id in elsewhere]
    assert (loading.loaded, loading.faulty) == (len(loaded), len(bad))
    assert [line.number for line in faults] == bad
    assert loading.loaded + loading.repeated + loading.faulty == len(lines)
