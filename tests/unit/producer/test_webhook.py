"""Webhooks: valid requests, signing and verifying, compared with the specification's package."""

import base64
import json
import stat
import threading
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st
from standardwebhooks import Webhook as Oracle
from standardwebhooks.webhooks import WebhookVerificationError
from support.servers import settings, untimed
from zlora import config, embedded, errors
from zlora.errors import (
    InvalidRequest,
    InvalidSetting,
    InvalidWebhook,
    JobExpired,
    JobRevoked,
    LoraMismatch,
    ZloraError,
)
from zlora.schema import GenerateResult
from zlora.webhook import (
    EVENTS,
    TOLERANCE,
    Verifier,
    Webhook,
    body_of,
    new_secret,
    read,
    sign,
    type_of,
)

SECRET: Final = "whsec_" + base64.b64encode(b"k" * 24).decode()
OTHER: Final = "whsec_" + base64.b64encode(b"o" * 64).decode()
RESULT: Final = GenerateResult(
    job_id="a",
    images=(),
    loras=(),
    seed=3,
    timings={"denoise": 1.5},
    base_intact=True,
    model="m",
    versions={},
)
BODY: Final = body_of("a", RESULT, at=1_700_000_000.75)
NOW: Final = 1_700_000_100.0  # seconds since the epoch


def verifier(secret: str = SECRET, *, now: float = NOW, **options: Any) -> Verifier:
    return Verifier(secret, clock=lambda: now, **options)


def signed(
    body: bytes = BODY, *, secret: str = SECRET, at: float = NOW, **changed: str
) -> dict[str, str]:
    """Return the headers of a message; `changed` replaces `webhook-<name>` after signing."""
    headers = sign(body, secret, message_id="msg_a", timestamp=at)
    return headers | {f"webhook-{name}": value for name, value in changed.items()}


def refusal(body: bytes | str, headers: dict[str, str], by: Verifier | None = None) -> str:
    with pytest.raises(InvalidWebhook) as raised:
        (by or verifier()).verify(body, headers)
    return str(raised.value.details["reason"])


# --- requests for webhooks


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/hook?token=t",
        "http://[::1]:8000/",
        "https://[::FFFF:1.2.3.4]/",
        "https://exämple.com/ä",
        "https://a" + "/" * 2038,
    ],
)
def test_an_http_url_is_valid(url: str) -> None:
    assert read(url) == Webhook(url=url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com/hook",
        "ftp://example.com",
        "https://",
        "https:///x",
        "http://a b/",
        "https://example.com/\n",
        "https://example.com/\x7f",
        "https://example.com/\ud800",
        "https://[",
        "https://example.com:99999/",
        "https://[::1]x/",
        "https://[v1.a]/",
        "https://[fe80::1%25eth0]/",
        "https://a[::1]/",
        "https://[::1]:/",
        "https://example.com:0/",
        "https://user:s3cret@example.com/",
        "https://a" + "/" * 2040,
        None,
        5,
        b"https://a/",
    ],
)
def test_any_other_url_is_refused_without_its_secrets(url: object) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read(url)

    assert raised.value.details["path"] == "webhook_url"
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://Example.COM.:8443/a", "example.com"),
        ("http://[::1]:8000/", "::1"),
        ("https://[/", ""),
        ("https://[v1.a]/", ""),
        ("https://a:b/", ""),
        ("no url", ""),
    ],
)
def test_the_host_of_a_url_is_normalized(url: str, host: str) -> None:
    """A URL in Redis may be invalid, and has no host then."""
    assert Webhook(url=url).host == host


def test_only_known_events_are_valid() -> None:
    assert read("https://a/", ["job.failed"]).events == ("job.failed",)
    assert read("https://a/", EVENTS).events == EVENTS
    assert read("https://a/", None).events == ()  # all of them
    unknown: Any
    for unknown in (["job.done"], "job.failed", [None], [["job.failed"]], 5, [], (), ""):
        with pytest.raises(InvalidRequest) as raised:
            read("https://a/", unknown)
        assert raised.value.details["path"] == "webhook_events"


# --- signatures, compared with the other implementation


def test_the_package_of_the_specification_verifies_our_signatures() -> None:
    headers = signed(at=time.time())

    assert Oracle(SECRET).verify(BODY, headers) == json.loads(BODY)
    for other in (signed(at=time.time(), id="msg_b"), signed(at=time.time(), secret=OTHER)):
        with pytest.raises(WebhookVerificationError):
            Oracle(SECRET).verify(BODY, other)


@settings_of(untimed, max_examples=30)
@given(
    st.text(st.characters(codec="utf-8")),
    st.binary(min_size=24, max_size=64),
    st.from_regex(r"\A[!-~]{1,64}\Z"),
)
def test_the_signatures_of_the_package_are_verified_here(
    text: str, key: bytes, message_id: str
) -> None:
    secret = "whsec_" + base64.b64encode(key).decode()
    body = msgspec.json.encode(
        {"type": text, "timestamp": "2026-01-01T00:00:00Z", "data": {"job_id": text}}
    )
    moment = datetime.fromtimestamp(NOW, UTC)
    headers = {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(NOW)),
        "webhook-signature": Oracle(secret).sign(message_id, moment, body.decode()),
    }

    event = verifier(secret).verify(body, headers)

    assert (event.id, event.type, event.job_id) == (message_id, text, text)
    assert sign(body, secret, message_id=message_id, timestamp=NOW) == headers


def test_a_secret_can_be_replaced_without_a_gap() -> None:
    """The workers may sign with both secrets, or the receivers accept both."""
    both = f"{OTHER} {SECRET}"

    for secret in (SECRET, OTHER):
        Oracle(secret).verify(BODY, signed(secret=both, at=time.time()))
        assert verifier(secret).verify(BODY, signed(secret=both)).job_id == "a"
        assert verifier(both).verify(BODY, signed(secret=secret)).job_id == "a"
    assert refusal(BODY, signed(secret=OTHER)) == "signature"


def test_a_new_secret_is_valid_and_new() -> None:
    made = new_secret()

    assert verifier(made).verify(BODY, signed(secret=made)).job_id == "a"
    assert made != new_secret()


@pytest.mark.parametrize(
    "secret",
    [
        "",
        " ",
        "k" * 32,
        "whsec_",
        "whsec_c2hvcnQ=",
        "whsec_" + "a" * 88,
        "whsec_!!!!",
        f"{SECRET} plain",
    ],
)
def test_an_invalid_secret_is_refused_and_not_shown(secret: str) -> None:
    with pytest.raises(InvalidSetting, match=config.WEBHOOK_SECRET) as raised:
        Verifier(secret)

    assert not [
        part for part in secret.split() if len(part) > len("whsec_") and part in str(raised.value)
    ]


# --- accepted messages


def test_a_success_arrives_as_its_result() -> None:
    event = verifier().verify(BODY, signed())

    assert (event.id, event.type, event.job_id) == ("msg_a", "job.succeeded", "a")
    assert event.timestamp == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    assert (event.result, event.error) == (RESULT, None)


@pytest.mark.parametrize("cls", errors.ERRORS)
def test_a_failure_arrives_as_its_own_class(cls: type[ZloraError]) -> None:
    body = body_of("a", cls("a sentence, é", {"names": ["ü"]}), at=NOW)

    event = verifier().verify(body, signed(body))

    assert (event.result, type(event.error)) == (None, cls)
    assert event.error is not None
    assert event.error.args == ("a sentence, é", {"names": ["ü"]})
    assert json.loads(body)["data"]["error"]["retryable"] is cls.retryable


def test_each_end_has_one_of_three_event_types() -> None:
    ends = (RESULT, LoraMismatch(), JobExpired(), JobRevoked())

    assert [type_of(end) for end in ends] == [
        "job.succeeded",
        "job.failed",
        "job.failed",
        "job.cancelled",
    ]


def test_details_that_are_not_json_can_be_sent() -> None:
    body = body_of("a", LoraMismatch("no", {"names": ["\ud800"], "norm": float("nan")}), at=NOW)

    error = verifier().verify(body, signed(body)).error

    assert error is not None
    assert error.details == {"names": ["?"], "norm": None}


def test_fields_of_a_later_version_are_ignored() -> None:
    document = json.loads(BODY)
    document["data"]["result"]["colour"] = document["data"]["more"] = document["more"] = 1
    document["type"] = "job.praised"
    body = json.dumps(document).encode()

    event = verifier().verify(body, signed(body))

    assert (event.type, event.result) == ("job.praised", RESULT)


def test_header_names_may_be_in_any_case() -> None:
    headers = {name.title(): value for name, value in signed().items()}

    assert verifier().verify(BODY, headers).id == "msg_a"


# --- refused messages


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"id": "msg_b"}, "signature"),
        ({"timestamp": str(int(NOW) + 1)}, "signature"),
        ({"signature": "v1,"}, "signature"),
        ({"signature": "v2," + signed()["webhook-signature"][3:]}, "signature"),
        ({"signature": signed()["webhook-signature"][:-2] + "A="}, "signature"),
        ({"signature": "v1,\xe9 ,, v1"}, "signature"),
        ({"id": "\ud800"}, "signature"),
        ({"id": ""}, "header"),
        ({"timestamp": ""}, "header"),
        ({"signature": ""}, "header"),
        ({"timestamp": "now"}, "header"),
        ({"timestamp": "-1"}, "header"),
        ({"timestamp": "1" * 400}, "header"),
        ({"timestamp": "\u0661"}, "header"),
    ],
)
def test_changed_headers_are_refused(changed: dict[str, Any], reason: str) -> None:
    assert refusal(BODY, signed(**changed)) == reason


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_a_missing_header_is_refused(name: str) -> None:
    headers = signed()
    del headers[name]

    assert refusal(BODY, headers) == "header"


@settings_of(untimed, max_examples=50)
@given(st.integers(0, len(BODY) * 8 - 1))
def test_a_body_with_a_changed_bit_is_refused(bit: int) -> None:
    body = bytearray(BODY)
    body[bit // 8] ^= 1 << bit % 8

    assert refusal(bytes(body), signed()) == "signature"


def test_a_message_outside_the_tolerance_is_refused() -> None:
    for delay in (-TOLERANCE, 0, TOLERANCE):
        assert verifier(now=NOW + delay).verify(BODY, signed()).job_id == "a"
    assert refusal(BODY, signed(), verifier(now=NOW + TOLERANCE + 1)) == "stale"
    assert refusal(BODY, signed(), verifier(now=NOW - TOLERANCE - 1)) == "future"
    assert refusal(BODY, signed(), verifier(now=NOW + 6, tolerance=5)) == "stale"


@pytest.mark.parametrize(
    "body", [b"", b"no json", b"[]", b'{"type":"job.failed"}', b"\xff", BODY.replace(b'"m"', b"5")]
)
def test_a_signed_body_that_is_not_an_event_is_refused(body: bytes) -> None:
    assert refusal(body, signed(body)) == "unreadable"


def test_a_message_is_accepted_once_and_so_is_its_retry() -> None:
    receiver = verifier()
    receiver.verify(BODY, signed())

    assert refusal(BODY, signed(), receiver) == "replayed"
    assert receiver.verify(BODY, signed(at=NOW + 5)).id == "msg_a"
    assert refusal(BODY, signed(at=NOW + 5), receiver) == "replayed"


def test_a_message_with_a_wrong_signature_is_not_remembered() -> None:
    """Otherwise anyone could make the receiver refuse the true message."""
    receiver = verifier()
    refusal(b"{}", signed(), receiver)

    assert receiver.verify(BODY, signed()).id == "msg_a"


def test_one_of_many_threads_accepts_a_message() -> None:
    receiver, outcomes, start = verifier(), list[str](), threading.Barrier(8)

    def receive() -> None:
        start.wait()
        try:
            outcomes.append(receiver.verify(BODY, signed()).id)
        except InvalidWebhook as error:
            outcomes.append(error.details["reason"])

    threads = [threading.Thread(target=receive) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(outcomes) == ["msg_a", *["replayed"] * 7]


def test_a_receiver_that_names_its_url_accepts_no_event_for_another() -> None:
    """All receivers of a pool have one secret, so any of them could send what it has received."""
    url = "https://Shop.example/jobs?token=t"
    by = partial(verifier, url=url)
    body = body_of("a", RESULT, at=NOW, url=url)

    assert b"token" not in body
    assert by().verify(body, signed(body)).receiver == "https://shop.example/jobs"
    assert verifier().verify(body, signed(body)).result == RESULT
    others = [body_of("a", RESULT, at=NOW, url=f"{url[:20]}{end}") for end in ("/", ":1/jobs")]
    for other in [*others, body_of("a", RESULT, at=NOW)]:  # the last is an older worker's
        assert refusal(other, signed(other), by()) == "receiver"
        assert verifier().verify(other, signed(other)).job_id == "a"


def test_a_body_may_be_text() -> None:
    body = body_of("ä", RESULT, at=NOW)

    assert verifier().verify(body.decode(), signed(body)).job_id == "ä"
    assert refusal("\ud800", signed(body)) == "signature"


@pytest.mark.parametrize("name", ["id", "timestamp", "signature"])
@pytest.mark.parametrize("value", [None, b"bytes", 5, ["v1,"]])
def test_a_header_that_is_not_text_counts_as_missing(name: str, value: Any) -> None:
    assert refusal(BODY, signed(**{name: value})) == "header"


def test_the_remembered_messages_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By number, and by age: messages too old to be accepted are forgotten."""
    monkeypatch.setattr("zlora.webhook._MAX_SEEN", 3)
    now = [NOW]
    receiver = Verifier(SECRET, clock=lambda: now[0])
    for late in range(5):
        receiver.verify(BODY, signed(at=NOW + late))

    assert list(receiver._seen._until) == [f"msg_a.{int(NOW) + late}" for late in (2, 3, 4)]  # type: ignore[attr-defined]
    now[0] += 2 * TOLERANCE + 2
    receiver.verify(BODY, signed(at=now[0]))
    assert list(receiver._seen._until) == [f"msg_a.{int(now[0])}"]  # type: ignore[attr-defined]


def test_several_processes_can_share_the_seen_messages() -> None:
    shared: dict[str, float] = {}

    def seen(key: str, seconds: float) -> bool:
        known = key in shared
        shared[key] = seconds
        return known

    verifier(seen=seen).verify(BODY, signed())

    assert refusal(BODY, signed(), verifier(seen=seen)) == "replayed"
    ((key, seconds),) = shared.items()
    assert (key, seconds > 2 * TOLERANCE) == (f"msg_a.{int(NOW)}", True)


# --- the embedded stack's secret


def test_zlora_up_makes_one_secret_that_receivers_find(tmp_path: Path) -> None:
    """Also if several start at once. Only their user may read the file."""
    made: list[str] = []
    threads = [
        threading.Thread(target=lambda: made.append(embedded._webhook_secret(tmp_path)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    (secret,) = set(made)
    (kept,) = tmp_path.iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == stat.S_IRUSR | stat.S_IWUSR
    found = Verifier.from_env({"ZLORA_HOME": str(tmp_path)})
    assert found.verify(BODY, sign(BODY, secret, message_id="msg_a")).job_id == "a"


def test_zlora_up_replaces_an_empty_secret_file(tmp_path: Path) -> None:
    """A machine that loses power may leave an empty file."""
    config.webhook_secret(tmp_path).touch()
    with pytest.raises(InvalidSetting, match=config.WEBHOOK_SECRET):
        Verifier.from_env({"ZLORA_HOME": str(tmp_path)})

    secret = embedded._webhook_secret(tmp_path)

    assert verifier(secret).verify(BODY, signed(secret=secret)).job_id == "a"
    assert embedded._webhook_secret(tmp_path) == secret


def test_an_unreadable_secret_file_is_refused_by_its_name(tmp_path: Path) -> None:
    kept = config.webhook_secret(tmp_path)
    kept.write_bytes(b"whsec_\xff\xfes3cret")
    with pytest.raises(InvalidSetting, match=kept.name) as raised:
        Verifier.from_env({"ZLORA_HOME": str(tmp_path)})
    assert "s3cret" not in str(raised.value)

    kept.unlink()
    kept.mkdir()
    with pytest.raises(InvalidSetting, match=kept.name):
        Verifier.from_env({"ZLORA_HOME": str(tmp_path)})


def test_the_variable_wins_over_the_secret_file(tmp_path: Path) -> None:
    environ = {"ZLORA_HOME": str(tmp_path)}
    with pytest.raises(InvalidSetting, match=config.WEBHOOK_SECRET):
        Verifier.from_env(environ)
    embedded._webhook_secret(tmp_path)

    named = Verifier.from_env({**environ, config.WEBHOOK_SECRET: OTHER})

    assert named.verify(BODY, sign(BODY, OTHER, message_id="msg_a")).job_id == "a"


def test_a_worker_refuses_an_invalid_secret_and_does_not_show_it(tmp_path: Path) -> None:
    assert SECRET not in repr(settings(tmp_path, ZLORA_WEBHOOK_SECRET=f"{SECRET} {OTHER}"))

    with pytest.raises(InvalidSetting, match=config.WEBHOOK_SECRET) as raised:
        settings(tmp_path, ZLORA_WEBHOOK_SECRET=f"{SECRET} plain-s3cret")
    assert not [part for part in ("plain", SECRET) if part in str(raised.value)]
