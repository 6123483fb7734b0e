"""`voicetx send`: a file of updates goes to a service, many in a request, and every line of it is accounted for."""

import time
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import orjson
import typer

from voicetx.cli.output import AsJson, CommandError, complain, follow_progress, print_json
from voicetx.contract.refusals import Refusal

KEY_VARIABLE = "VOICETX_SEND_KEY"
"""Where a command that sends finds the key, so that it is in no list of processes."""

_PATH = "/api/v1/updates"
_TIMEOUT_SECONDS = 60
_LONGEST_PAUSE_SECONDS = 30
_TELLING_PAUSE_SECONDS = 5
_PASSING = frozenset({Refusal.THROTTLED.code, Refusal.INTERNAL.code, Refusal.BODY_TOO_SLOW.code})
_RECORDED = "recorded"


@dataclass(slots=True)
class _Journey:
    """How much of a file was sent. It is kept beside the file, so that sending resumes where it was stopped."""

    note: Path
    offset: int = 0
    lines: int = 0
    answers: Counter[str] = field(default_factory=Counter)

    def remember(self) -> None:
        """Write it to disk, all or nothing."""
        draft = self.note.with_name(self.note.name + ".new")
        draft.write_bytes(orjson.dumps({"offset": self.offset, "lines": self.lines, "answers": self.answers}))
        draft.replace(self.note)

    @classmethod
    def recall(cls, file: Path) -> "_Journey":
        """Return how much of the file was sent before; nothing of it, if that is not known."""
        note = file.with_name(file.name + ".sent")
        if not note.exists():
            return cls(note)
        try:
            kept = orjson.loads(note.read_bytes())
            journey = cls(note, kept["offset"], kept["lines"], Counter(kept["answers"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CommandError(f"{note} is damaged; delete it to send the file from its beginning.") from error
        if journey.offset > file.stat().st_size:
            raise CommandError(f"{file} is shorter than what was sent of it; delete {note} to send it anew.")
        return journey


def send(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="NDJSON: an update's body on each line.")],
    url: Annotated[str, typer.Option(help="The service, such as http://127.0.0.1:8000.")],
    key: Annotated[
        str,
        typer.Option(envvar=KEY_VARIABLE, help="A secret key or access token; better given in the environment."),
    ],
    lines_a_request: Annotated[int, typer.Option(min=1, max=100_000, help="How many lines go in a request.")] = 2_000,
    attempts: Annotated[int, typer.Option(min=1, help="How often to try while nothing gets through.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Send a file of updates; stopped and run again, it goes on where it was.

    Waits as Retry-After says and sends again what was not taken. Lines that are refused are named, and the exit status
    is then 1. Nothing is lost or doubled by sending a line twice.
    """
    # Imported here: the other commands start faster without it.
    import httpx  # noqa: PLC0415

    if not file.is_file():
        raise CommandError(f"{file}: there is no such file.")
    if not url.startswith(("http://", "https://")):
        raise CommandError("An address of a service begins with http:// or https://.")
    journey = _Journey.recall(file)
    if journey.lines:
        complain(f"Going on after line {journey.lines:,}.")
    try:
        client = httpx.Client(
            base_url=url, timeout=_TIMEOUT_SECONDS, headers={"authorization": f"Bearer {key}"}, follow_redirects=False
        )
    except (httpx.InvalidURL, UnicodeError) as error:
        raise CommandError(f"{url} is no address, or the key is none: {error}.") from error
    with file.open("rb") as source, client, follow_progress(file.stat().st_size, journey.offset) as advance:
        source.seek(journey.offset)
        for chunk in _cut(source, lines_a_request):
            _deliver(client, journey, chunk, attempts)
            size = sum(map(len, chunk))
            journey.offset += size
            journey.lines += len(chunk)
            journey.remember()
            advance(size)
    journey.note.unlink(missing_ok=True)
    refused = sum(count for answer, count in journey.answers.items() if answer != _RECORDED)
    if as_json:
        print_json({"lines": journey.lines, "answers": dict(journey.answers)})
    else:
        for answer, count in journey.answers.most_common():
            typer.echo(f"{count:>12,}  {answer}")
    if refused:
        raise typer.Exit(1)


def _cut(source: BinaryIO, lines: int) -> Iterator[list[bytes]]:
    while chunk := list(islice(source, lines)):
        yield chunk


def _deliver(client: Any, journey: _Journey, chunk: list[bytes], attempts: int) -> None:
    """Send a chunk until every line of it has an answer that stands; counts and names them."""
    left = {number: line for number, line in enumerate(chunk, start=journey.lines + 1) if not _is_blank(number, line)}
    failures = 0
    while left:
        numbers = list(left)
        # One line feed each, whatever a line ended with: the answers' numbers count these lines.
        content = b"".join(line.rstrip(b"\r\n") + b"\n" for line in left.values())
        answers, pause_seconds = _post(client, content)
        before = len(left)
        for answer in answers:
            if answer.get("code") in _PASSING:
                pause_seconds = max(pause_seconds, answer.get("retry-after", 1))
                continue
            number = numbers[answer["line"] - 1]
            del left[number]
            _account(journey, number, answer)
        failures = 0 if len(left) < before else failures + 1
        if failures >= attempts:
            raise CommandError(
                f"Nothing got through in {attempts} attempts; {journey.lines:,} lines are done. Run it again to go on."
            )
        if left:
            pause_seconds = max(pause_seconds, min(2.0**failures / 4, _LONGEST_PAUSE_SECONDS))
            if pause_seconds > _TELLING_PAUSE_SECONDS:
                complain(f"Waiting {pause_seconds:,.0f} s, as the service asks; Ctrl-C keeps what is done.")
            time.sleep(pause_seconds)


def _is_blank(number: int, line: bytes) -> bool:
    # The service takes a byte order mark for no part of the first line, too.
    return not (line.removeprefix(BOM_UTF8) if number == 1 else line).strip()


def _post(client: Any, content: bytes) -> tuple[list[dict[str, Any]], float]:
    """Send lines once; return the answers that came, and how long to wait before any that did not are sent again."""
    import httpx  # noqa: PLC0415 - see send

    try:
        response = client.post(_PATH, content=content, headers={"content-type": "application/x-ndjson"})
    except httpx.TransportError as error:
        complain(f"{client.base_url}: {type(error).__name__}; trying again.")
        return [], 0
    if response.status_code == 200 and response.headers.get("content-type", "").startswith("application/x-ndjson"):  # noqa: PLR2004
        return [orjson.loads(line) for line in response.content.splitlines()], 0
    try:
        refused = response.json()
        code, description = refused["code"], refused["description"]
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{client.base_url} answered {response.status_code}: is it voicetx?") from error
    if code not in _PASSING:
        raise CommandError(f"{client.base_url} answered {code}: {description}")
    return [], float(response.headers.get("retry-after", 1))


def _account(journey: _Journey, number: int, answer: dict[str, Any]) -> None:
    if "code" not in answer:
        journey.answers[_RECORDED] += 1
        return
    journey.answers[f"{answer['code']} {answer['description']}"] += 1
    faults = "; ".join(f"{fault['field'] or 'the line'} {fault['reason']}" for fault in answer.get("errors", []))
    complain(f"line {number}: {answer['code']} {answer['description']}" + (f" ({faults})" if faults else ""))
