"""`voicetx config`: every setting in force and where it comes from, and variables that have no effect.

A misspelt variable changes nothing, and without this command nobody would notice.
"""

import os
import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, NamedTuple
from urllib.parse import unquote

from pydantic import SecretStr
from pydantic_settings import DotEnvSettingsSource, EnvSettingsSource

from voicetx.cli.output import AsJson, complain, print_json, print_table
from voicetx.cli.send import KEY_VARIABLE
from voicetx.settings import Settings

_PREFIX = "VOICETX_"
_SETTINGS = [name.upper() for name in Settings.model_fields]
_ENVIRONMENT = "environment"
_FILE = ".env"
_DEFAULT = "default"
_HIDDEN = "***"
_CREDENTIALS = re.compile(r"(?P<user>//[^:]*):(?P<password>.*)(?=@)", re.DOTALL)

_LONE_USER = re.compile(r"(?<=redis://)[^:]*:?(?=@)|(?<=rediss://)[^:]*:?(?=@)")


class _Unknown(NamedTuple):
    name: str
    source: str


def show_config(as_json: AsJson = False) -> None:
    """Show every setting in force and where it comes from: the environment, the file .env, or by default.

    Passwords are hidden. Names variables VOICETX_... that nobody knows.
    """
    unknown = list(_find_unknown())
    if not as_json:
        for name, source in unknown:
            meant = get_close_matches(name.removeprefix(_PREFIX), _SETTINGS, n=1)
            complain(f"{name} ({source}) is not known" + (f"; is {_PREFIX}{meant[0]} meant?" if meant else "."))
    settings = Settings()
    given = [(_ENVIRONMENT, EnvSettingsSource(Settings)()), (_FILE, DotEnvSettingsSource(Settings)())]
    rows = [
        {
            "setting": _PREFIX + name.upper(),
            "value": _reveal(getattr(settings, name)),
            "source": next((source for source, values in given if name in values), _DEFAULT),
        }
        for name in Settings.model_fields
    ]
    if as_json:
        print_json({"settings": rows, "unknown": [stranger._asdict() for stranger in unknown]})
    else:
        print_table(("setting", "value", "source"), rows)


def _find_unknown() -> Iterator[_Unknown]:
    known = {KEY_VARIABLE, *(_PREFIX + name for name in _SETTINGS)}
    # However they are written: settings are read so, too.
    for source, variables in (
        (_ENVIRONMENT, dict(os.environ)),
        (_FILE, DotEnvSettingsSource(Settings).env_vars),
    ):
        for name in sorted(map(str.upper, variables)):
            if name.startswith(_PREFIX) and name not in known:
                yield _Unknown(name, source)


def _reveal(value: Any) -> Any:
    return hide_passwords(value.get_secret_value()) if isinstance(value, SecretStr) else value


def hide_passwords(url: str) -> str:
    """Return a URL without the passwords in it, before its host and among its options.

    The user of a Redis URL that has no password is hidden too: it often is the password, without the colon before it.
    """
    without_user = _LONE_USER.sub(_HIDDEN, url)
    address, mark, query = _CREDENTIALS.sub(rf"\g<user>:{_HIDDEN}", without_user).partition("?")
    return address + mark + "&".join(map(_hide_option, query.split("&")))


def _hide_option(option: str) -> str:
    name, mark, _ = option.partition("=")
    return name + mark + _HIDDEN if mark and "pass" in unquote(name).lower() else option
