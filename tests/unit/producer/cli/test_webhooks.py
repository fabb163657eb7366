"""`zlora webhooks`: what waits, what was given up, and another try for it."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result
from zlora import Client
from zlora.broker.webhook_outbox import DeadLetter, Outbox
from zlora.cli import main
from zlora.errors import JobLost

URL = "https://receiver.invalid/hook"


@pytest.fixture
def client(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """Of the broker of this process's environment, which is empty."""
    monkeypatch.setenv("ZLORA_BROKER_URL", broker_url)
    with redis.Redis.from_url(broker_url) as connection:
        connection.flushall()
    with Client(broker_url) as opened:
        yield opened


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["webhooks", *arguments])


def give_up(client: Client, job_id: str) -> None:
    """As a companion whose receiver has refused the end of a job for two hours."""
    inside: Any = client._broker
    ledger = inside._jobs
    client.submit({"prompt": "a city"}, job_id=job_id, webhook_url=URL)
    ledger.mark_ended(job_id, JobLost())
    letter = DeadLetter(
        job_id=job_id,
        event="job.failed",
        url=URL,
        tries=9,
        first=1.0,
        last=time.time(),
        reason="it says\n500",
    )
    Outbox(ledger.redis, "gpu").bury(letter)


def test_what_was_given_up_is_told_and_sent_again(client: Client) -> None:
    give_up(client, "j")
    told, as_json = run(), run("--json")
    resent = run("--resend", "j", "--json")

    assert (told.exit_code, told.stdout) == (
        0,
        f"0 wait, 1 given up\nj  job.failed  {URL}  after 9 tries: it says?500\n",
    )
    assert json.loads(as_json.stdout)["dead"][0]["job_id"] == "j"
    assert resent.exit_code == 0
    assert json.loads(resent.stdout) == {"pending": 1, "dead": [], "resent": {"j": True}}


def test_what_is_not_known_any_more_is_told_beside_the_others(client: Client) -> None:
    give_up(client, "j")
    result = run("--resend", "stranger", "--resend", "j")

    assert result.exit_code == 66
    assert result.stdout.splitlines() == [
        "stranger  has no webhook, or is not known any more",
        "j  is sent again",
        "1 wait, 0 given up",
    ]


@pytest.mark.parametrize(
    "command", [["webhooks"], ["batch", "jobs.jsonl", "--out", "results.jsonl"]]
)
def test_a_url_that_nobody_can_open_is_a_typed_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str]
) -> None:
    monkeypatch.setenv("ZLORA_BROKER_URL", "redis://:s3cret@h/0?ssl=true")
    monkeypatch.chdir(tmp_path)
    Path("jobs.jsonl").write_text('{"prompt": "a city"}')
    result = CliRunner().invoke(main, [*command, "--json"])

    assert (result.exit_code, json.loads(result.stdout)["error"]["code"]) == (78, "invalid_setting")
    assert "s3cret" not in result.output


def test_a_broker_that_is_away_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZLORA_BROKER_URL", "redis://127.0.0.1:1/0")
    result = run("--json")

    assert (result.exit_code, json.loads(result.stdout)["error"]["code"]) == (
        75,
        "broker_unavailable",
    )
