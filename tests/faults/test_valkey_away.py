"""Valkey that hangs, is killed and comes back, under load."""

from collections.abc import Callable

import pytest

from bodies import encode, make_body
from dialer import Dialer, Evidence, ask, call, prepare_campaign
from platform_side import make_user
from servers import Service, Valkey, wait_until


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_updates_go_on_while_valkey_does_not(
    database_url: str, start_valkey: Callable[[], Valkey], evidence: Evidence, is_long: bool
) -> None:
    """While Valkey hangs or is dead everybody is answered and limits hold; when it is back, calls are counted there."""
    secret_key = prepare_campaign(database_url)
    valkey = start_valkey()
    settings = {"VOICETX_REDIS_URL": valkey.url, "VOICETX_REDIS_RETRY_SECONDS": "0.1"}
    with Service(database_url, environment=settings) as service, Dialer(service, secret_key) as dialer:
        for turn in range(10 if is_long else 1):
            for away, back in ((valkey.pause, valkey.resume), (valkey.kill, valkey.start)):
                dialer.wait_for_answers(50)
                away()
                evidence.faults += 1
                # A new window of a limit has to be asked for.
                wait_until(lambda: count(service, "away") == count(service, "back") + 1, "Valkey is not missed")
                dialer.wait_for_answers(50)
                assert ask(service, "/healthz") == 200
                _, limited = make_user(database_url, f"limited-{turn}-{away.__name__}", call_limit="5/day")
                codes = [call(service, limited, encode(make_body(message=str(number)))).code for number in range(8)]
                assert codes == [None] * 5 + [429] * 3
                back()
                wait_until(lambda: count(service, "away") == count(service, "back"), "Valkey is not used again")
        dialer.wait_for_answers(50)
    assert not dialer.failures()
    assert not dialer.cut_off
    assert max(answer.seconds for answer in dialer.answers) < 2
    evidence.check(database_url, [dialer])


def count(service: Service, what: str) -> int:
    """Return how often a service has noted that Valkey is away, or back."""
    return service.log_text().count(f"throttle.redis_{what}")
