"""Connections to a served application, on which tests write bytes of their own and read what comes back."""

import asyncio
import json
import re
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from voicetx.contract.update import UPDATE_PATH
from voicetx.server.protocol import ContractProtocol

HEALTHY = {"status": "ok"}
HEALTH = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"


@asynccontextmanager
async def connection(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Connect to an address."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], Any]:
    """Read one answer and return its status, headers and JSON."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    headers = {name.lower(): value for name, value in re.findall(r"^([\w-]+): (.*)\r$", head, re.MULTILINE)}
    content = json.loads(await reader.readexactly(int(headers["content-length"])))
    assert headers.get("x-voicetx-code", "") == str(content.get("code", ""))
    return int(head.split()[1]), headers, content


def put(key: str, body: bytes, *headers: str, framing: str | None = None) -> bytes:
    """Return an update as it goes over the wire."""
    lines = [f"PUT {UPDATE_PATH} HTTP/1.1", "host: x", f"authorization: Bearer {key}", *headers]
    return "\r\n".join([*lines, framing or f"content-length: {len(body)}", "", ""]).encode() + body


async def read_until_closed(reader: asyncio.StreamReader) -> bytes:
    """Read to the end, by whatever it comes."""
    received = b""
    try:
        while data := await reader.read(65_536):
            received += data
    except ConnectionResetError:
        pass
    return received


async def find_protocol(app: Any, writer: asyncio.StreamWriter) -> ContractProtocol:
    """Return the service's end of a connection."""
    address = writer.get_extra_info("sockname")
    while True:
        for protocol in app.state.connections:
            if protocol.client == address:
                return cast("ContractProtocol", protocol)
        await asyncio.sleep(0)


def hang_up(writer: asyncio.StreamWriter) -> None:
    """End a connection as a client that is killed does: what was sent arrives, and then word that nobody is there."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
