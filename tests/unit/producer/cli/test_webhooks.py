"""`zlora webhooks`: webhooks that wait, webhooks that were given up, and how to resend them."""

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
    """Open a client of an empty broker, which this process's environment names."""
    monkeypatch.setenv("ZLORA_BROKER_URL", broker_url)
    with redis.Redis.from_url(broker_url) as connection:
        connection.flushall()
    with Client(broker_url) as opened:
        yield opened


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["webhooks", *arguments])


def give_up(client: Client, job_id: str) -> None:
    """Give up a webhook, as the sidecar does if a receiver refuses it for two hours."""
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
    Outbox(ledger.redis, "gpu").give_up(letter)


def test_a_webhook_that_was_given_up_is_printed_and_resent(client: Client) -> None:
    give_up(client, "j")
    as_lines, as_json = run(), run("--json")
    resent = run("--resend", "j", "--json")

    assert (as_lines.exit_code, as_lines.stdout) == (
        0,
        f"0 wait, 1 given up\nj  job.failed  {URL}  after 9 tries: it says?500\n",
    )
    assert json.loads(as_json.stdout)["dead"][0]["job_id"] == "j"
    assert resent.exit_code == 0
    assert json.loads(resent.stdout) == {"pending": 1, "dead": [], "resent": {"j": True}}


def test_an_unknown_job_is_printed_with_the_others(client: Client) -> None:
    give_up(client, "j")
    result = run("--resend", "unknown", "--resend", "j")

    assert result.exit_code == 66
    assert result.stdout.splitlines() == [
        "unknown  is unknown, or has no webhook",
        "j  is sent again",
        "1 wait, 0 given up",
    ]


@pytest.mark.parametrize(
    "command", [["webhooks"], ["batch", "jobs.jsonl", "--out", "results.jsonl"]]
)
def test_a_wrong_url_of_the_broker_is_a_typed_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str]
) -> None:
    monkeypatch.setenv("ZLORA_BROKER_URL", "redis://:s3cret@h/0?ssl=true")
    monkeypatch.chdir(tmp_path)
    Path("jobs.jsonl").write_text('{"prompt": "a city"}')
    result = CliRunner().invoke(main, [*command, "--json"])

    assert (result.exit_code, json.loads(result.stdout)["error"]["code"]) == (78, "invalid_setting")
    assert "s3cret" not in result.output


def test_a_broker_that_does_not_answer_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZLORA_BROKER_URL", "redis://127.0.0.1:1/0")
    result = run("--json")

    assert (result.exit_code, json.loads(result.stdout)["error"]["code"]) == (
        75,
        "broker_unavailable",
    )
