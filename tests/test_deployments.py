"""Files of transaction ids: read line by line as a whole reader would, and in bounded memory whatever they hold."""

import csv
import io

from hypothesis import given
from hypothesis import strategies as st

from voicetx.deployments import FileFormat, Line, read_lines

CELLS = st.text('ab,"\r\n \u00e9', max_size=6)


@given(st.lists(st.tuples(CELLS, st.integers(0, 99), CELLS), max_size=8))
def test_a_csv_is_read_as_any_reader_would(rows: list[tuple[str, int, str]]) -> None:
    """Whatever stands in the other columns, quotes and line breaks too, each id is found at the end of its row."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerows(
        [("a", "transaction-id", "b"), *((before, f"tx-{number}", after) for before, number, after in rows)]
    )
    lines = text.getvalue().split("\n")[:-1]
    reader = csv.reader((line + "\n" for line in lines), strict=True)
    expected = [Line(reader.line_num, row[1]) for row in reader]
    assert list(read_lines((line + "\n" for line in lines), FileFormat.CSV)) == expected[1:]


def test_a_row_that_does_not_end_costs_itself_only() -> None:
    """Quotes that nobody closes are given up after a hundred lines, or 128 KiB, and what follows is read."""
    for line, last in (("b\n", 102), ("b" * 70_000 + "\n", 4)):
        found = list(read_lines(["transaction-id\n", '"a\n', *[line] * 200, "end\n"], FileFormat.CSV))
        assert found[0] == Line(last, None, "not CSV: a row in quotes does not end")
        assert found[-1] == Line(203, "end")
    found = list(read_lines(["transaction-id\n", "a\n", '"b\n', "c\n"], FileFormat.CSV))
    assert found == [Line(2, "a"), Line(4, None, "not CSV: unexpected end of data")]
