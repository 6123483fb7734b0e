"""The command line as tests call it: in this process, and what it printed."""

import io
import os
import subprocess
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from unittest import mock

from voicetx.cli import main


def invoke(database_url: str, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which is faster by seconds, and return what it printed and its exit status."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    patched = [
        mock.patch.dict(os.environ, {"VOICETX_DATABASE_URL": database_url}),
        mock.patch.object(sys, "argv", ["voicetx", *arguments]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(text.encode())))),
        redirect_stdout(out),
        redirect_stderr(err),
    ]
    status: object = 0
    with ExitStack() as stack:
        for patch in patched:
            stack.enter_context(patch)
        try:
            main()
        except SystemExit as end:
            status = end.code
    printed = []
    for stream in (out, err):
        stream.seek(0)
        printed.append(stream.read())
    return subprocess.CompletedProcess(arguments, status if isinstance(status, int) else 0, *printed)


def run(database_url: str, *arguments: str, text: str = "") -> str:
    """Run a command that must succeed and return what it printed."""
    done = invoke(database_url, *arguments, text=text)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fail(database_url: str, *arguments: str) -> str:
    """Run a command that must fail and return its complaint, which is never a traceback."""
    done = invoke(database_url, *arguments)
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.strip()
    return done.stderr
