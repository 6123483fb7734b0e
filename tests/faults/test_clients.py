"""Dialers that vanish, dawdle or talk without listening: their neighbours are unharmed, and nothing of them is left."""

import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from bodies import encode, make_body
from dialer import Dialer, Evidence, prepare_campaign
from servers import Service, wait_until
from voicetx.contract.update import UPDATE_PATH

BODY_TIMEOUT_SECONDS = 1


def count_sockets(service: Service) -> int:
    """Return how many sockets the service has open."""
    return sum(str(entry.readlink()).startswith("socket:") for entry in Path(f"/proc/{service.pid}/fd").iterdir())


def render(secret_key: str, message: str) -> tuple[bytes, bytes]:
    """Return the head and the body of a request."""
    body = encode(make_body("tx-1", message=message))
    head = f"PUT {UPDATE_PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {secret_key}\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode(), body


def vanish(service: Service, pieces: Sequence[bytes]) -> None:
    """Send something and hang up."""
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        for piece in pieces:
            connection.sendall(piece)


def dawdle(connections: Sequence[socket.socket], requests: Sequence[bytes]) -> None:
    """Send a request a byte at a time on each connection until the service has ended all of them."""
    left = dict(zip(connections, requests, strict=True))
    sent = 0
    while left and sent < min(map(len, requests)):
        for connection, request in list(left.items()):
            try:
                connection.send(request[sent : sent + 1])
            except OSError:
                del left[connection]
        sent += 1
        time.sleep(0.1)
    assert not left


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_clients_that_vanish_or_dawdle_harm_nobody(database_url: str, evidence: Evidence, is_long: bool) -> None:
    """Clients that hang up at any point, send a byte at a time or pipeline leave their neighbours and no socket."""
    secret_key = prepare_campaign(database_url)
    settings = {"VOICETX_BODY_TIMEOUT_SECONDS": str(BODY_TIMEOUT_SECONDS)}
    with Service(database_url, environment=settings) as service:
        with Dialer(service, secret_key) as first:
            first.wait_for_answers(50)
        wait_until(lambda: count_connections(service) == 0, "The dialers' sockets are still open")
        sockets = count_sockets(service)
        with Dialer(service, secret_key, clients=8) as dialer:
            for turn in range(200 if is_long else 20):
                head, body = render(secret_key, f"vanished {turn}")
                for pieces in ([], [head[:20]], [head], [head, body[:50]], [head, body], [head + body]):
                    vanish(service, pieces)
                    evidence.faults += 1
            for _ in range(5 if is_long else 1):
                with ExitStack() as stack:
                    slow = [
                        stack.enter_context(socket.create_connection(("127.0.0.1", service.port))) for _ in range(20)
                    ]
                    for connection in slow[:10]:
                        connection.sendall(head)
                    dawdle(slow, [body] * 10 + [head] * 10)
                    evidence.faults += len(slow)
            pipeline(service, secret_key)
            dialer.wait_for_answers(50)
        assert not dialer.failures()
        assert not dialer.cut_off
        wait_until(lambda: count_connections(service) == 0, "Sockets are left of clients that have gone")
        assert count_sockets(service) <= sockets
    evidence.check(database_url, [first, dialer])


def count_connections(service: Service) -> int:
    """Return how many connections to its port a service has not closed."""
    port = f":{service.port:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    # 01: established, 08: closed by the client only.
    return sum(fields[1].endswith(port) and fields[3] in {"01", "08"} for fields in lines)


def pipeline(service: Service, secret_key: str) -> None:
    """Send many requests before reading an answer; each gets its own, in order."""
    requests = [b"".join(render(secret_key, f"pipelined {number}")) for number in range(50)]
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        connection.sendall(b"".join(requests))
        answers = b""
        while answers.count(b'{"transaction-id":"tx-1"}') < len(requests):
            received = connection.recv(65536)
            assert received, answers
            answers += received
