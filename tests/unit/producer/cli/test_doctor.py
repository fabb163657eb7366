"""`zlora doctor`: what is wrong and what to do about it, the exit status, and no secrets."""

import json
import os
import pty
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import redis
import torch
import zlora.cli.doctor
import zlora_worker.cli.doctor
from celery import Celery
from celery.contrib.testing.worker import start_worker
from click.testing import CliRunner, Result
from ssrfguard import SSRFGuardError
from support.fakes import load_pipeline
from support.http_server import write_keys
from support.processes import free_port, wait_until
from support.tiny_folder import tiny_model, tiny_sd15, tiny_zimage
from support.tiny_zimage import write_original
from zlora import Client, config
from zlora.broker.celery_app import shared_config
from zlora.broker.job_store import JobStore
from zlora.broker.keys import dead_letters_key, refused_key, waiting_lists
from zlora.broker.message import SUBMITTED_AT
from zlora.broker.webhook_outbox import DeadLetter
from zlora.cli import main
from zlora.http.client import refusal
from zlora.queue_info import QueueInfo
from zlora.server.tenants import Tenant


@pytest.fixture
def broker(broker_url: str) -> Iterator[Any]:
    """Provide an empty Redis, whose configuration a test may change."""
    with redis.Redis.from_url(broker_url, decode_responses=True) as connection:
        connection.flushall()
        yield connection
        connection.config_set("appendonly", "yes")
        connection.config_set("maxmemory", 0)
        connection.config_set("maxmemory-policy", "noeviction")


@contextmanager
def silent_server() -> Iterator[str]:
    """Open a server that accepts connections and never answers; yield its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"redis://:s3cret@127.0.0.1:{listener.getsockname()[1]}/0"


def producer(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the producer's checks by name."""
    return {check.name: check for check in zlora.cli.doctor.checks(environ)}


def worker(environ: Mapping[str, str], **changed: str) -> dict[str, Any]:
    """Return the worker's checks by name."""
    found = zlora_worker.cli.doctor.checks({**environ, **changed})
    return {check.name.removeprefix("worker: "): check for check in found}


def doctor(environ: Mapping[str, str], *options: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *options], env=environ)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """Return the variables of a worker with an empty data folder."""
    return {
        "ZLORA_HOME": str(tmp_path / "home"),
        "ZLORA_MODEL": "demo",
        "ZLORA_DEVICE": "cpu",
        "ZLORA_STORE": (tmp_path / "store").as_uri(),
        "ZLORA_LORA_CACHE": str(tmp_path / "new" / "loras"),
    }


# --- the API keys


@pytest.mark.usefixtures("nothing_of_the_broker")
def test_the_file_of_api_keys_is_read_and_must_be_its_owners(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    environ = {"ZLORA_API_KEYS": str(file)}
    assert "api keys" not in producer({})
    missing = producer(environ)["api keys"]
    write_keys(file, shop=Tenant(), other=Tenant())
    private = producer(environ)["api keys"]
    file.chmod(0o664)
    public = producer(environ)["api keys"]

    assert (missing.status, missing.code) == ("fail", "invalid_setting")
    assert "zlora keys add" in missing.advice
    assert (private.status, private.told) == ("ok", f"{file} has 2 keys of 2 tenants")
    assert (public.status, public.advice) == ("warn", f"Run `chmod g-w,o-rwx {file}`.")


@pytest.fixture
def nothing_of_the_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the checks that need a broker."""
    monkeypatch.setattr(zlora.cli.doctor, "CHECKS", ())


# --- the broker


@pytest.fixture
def without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the last check, which waits for workers."""
    monkeypatch.setattr(zlora.cli.doctor, "CHECKS", zlora.cli.doctor.CHECKS[:-1])


def test_a_good_broker_is_ok_and_a_queue_without_workers_fails(
    broker_url: str, broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zlora.cli.doctor, "_REPLY_TIME", 0.1)
    with Client(broker_url) as client:
        client.submit({"prompt": "x"}, priority="high")
        client.submit({"prompt": "x"})
        client.submit({"prompt": "x"})
    broker.rpush("gpu", json.dumps({"headers": {SUBMITTED_AT: time.time() - 3600}}))
    broker.rpush(waiting_lists("gpu")[9], "not a message of Celery")

    found = producer({config.BROKER_URL: broker_url})

    statuses = {name: check.status for name, check in found.items()}
    assert statuses == {
        **dict.fromkeys(
            ("software", "broker", "broker: persistence", "broker: memory", "broker: clock"), "ok"
        ),
        "result backend": "ok",
        "rights": "ok",
        "keys": "ok",
        "clock": "ok",
        "queue": "ok",
        "serves": "skip",
        "workers": "fail",
    }
    assert "5 jobs wait (2 high, 2 normal, 1 low), the oldest for 36" in found["queue"].told
    assert "celery -A zlora_worker.app worker" in found["workers"].advice
    assert found["workers"].code == "model_unavailable"


@pytest.mark.usefixtures("without_workers")
def test_a_broker_that_may_lose_jobs_is_reported(broker_url: str, broker: Any) -> None:
    broker.config_set("appendonly", "no")
    broker.config_set("maxmemory-policy", "allkeys-lru")
    unbounded = producer({config.BROKER_URL: broker_url})
    broker.config_set("maxmemory", "100mb")
    bounded = producer({config.BROKER_URL: broker_url})
    broker.config_set("maxmemory-policy", "noeviction")
    broker.config_set("maxmemory", int(broker.info()["used_memory"] / 0.95))
    nearly = producer({config.BROKER_URL: broker_url})
    broker.config_set("maxmemory", 1)
    full = producer({config.BROKER_URL: broker_url})

    assert unbounded["broker: persistence"].status == "warn"
    assert "appendonly yes" in unbounded["broker: persistence"].advice
    assert [found["broker: memory"].status for found in (unbounded, bounded, nearly, full)] == [
        "warn",
        "fail",
        "warn",
        "fail",
    ]
    assert full["broker: memory"].code == "broker_unavailable"
    assert "noeviction" in bounded["broker: memory"].advice


@pytest.mark.usefixtures("without_workers")
def test_unreadable_messages_and_webhooks_that_were_given_up_are_reported(
    broker_url: str, broker: Any
) -> None:
    letter = DeadLetter(
        job_id="j",
        event="job.failed",
        url="https://x",
        tries=9,
        first=1,
        last=2,
        reason="it says 500",
    )
    broker.zadd(dead_letters_key("gpu"), {"not a dead letter": 1, msgspec.json.encode(letter): 2})
    given_up = producer({config.BROKER_URL: broker_url})["queue"]
    broker.set(refused_key("gpu"), 7)
    refused = producer({config.BROKER_URL: broker_url})["queue"]

    assert (given_up.status, refused.status) == ("warn", "warn")
    assert "2 given up, the latest because: it says 500" in given_up.told
    assert "`zlora webhooks`" in given_up.advice
    assert config.ALLOW_HOSTS not in given_up.advice
    assert "7 messages" in refused.told


@pytest.mark.usefixtures("without_workers")
def test_the_setting_that_allows_a_refused_receiver_is_named(broker_url: str, broker: Any) -> None:
    letter = DeadLetter(
        job_id="j",
        event="job.failed",
        url="https://x",
        tries=1,
        first=1,
        last=2,
        reason=refusal(SSRFGuardError()),
    )
    broker.zadd(dead_letters_key("gpu"), {msgspec.json.encode(letter): 1})

    assert (
        f"host in {config.ALLOW_HOSTS} of the workers"
        in producer({config.BROKER_URL: broker_url})["queue"].advice
    )


def test_a_worker_of_another_version_is_found_and_reported(
    broker_url: str, broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert broker.dbsize() == 0
    monkeypatch.setattr(zlora.cli.doctor, "_REPLY_TIME", 0.25)
    monkeypatch.setattr(zlora.cli.doctor, "version", lambda _: "2.0.0")
    app = Celery("served", set_as_current=False)
    app.conf.update(shared_config(broker_url=broker_url, result_backend=broker_url, queue="gpu"))
    app.conf.update(zlora_version="1.0.0")
    looks: list[Any] = []

    def is_found() -> bool:
        looks.append(producer({config.BROKER_URL: broker_url})["workers"])
        return bool(looks[-1].status != "fail")

    with start_worker(app, perform_ping_check=False, pool="solo"):
        wait_until(is_found, "the worker answers")
        elsewhere = producer({config.BROKER_URL: broker_url, config.QUEUE: "other"})["workers"]

    found = looks[-1]
    assert found.status == "warn"
    assert "1 serve the queue" in found.told
    assert "1.0.0" in found.told
    assert "here is 2.0.0" in found.advice
    assert elsewhere.status == "fail"


@pytest.mark.usefixtures("without_workers")
@pytest.mark.parametrize(
    ("changed", "check", "status"),
    [
        ({"role": "slave", "master_host": "primary", "master_port": 7}, "broker", "fail"),
        ({"aof_last_write_status": "err"}, "broker: persistence", "fail"),
        ({"rdb_last_bgsave_status": "err"}, "broker: persistence", "warn"),
    ],
)
def test_a_redis_that_takes_no_jobs_is_reported(
    broker_url: str,
    broker: Any,
    monkeypatch: pytest.MonkeyPatch,
    *,
    changed: dict[str, Any],
    check: str,
    status: str,
) -> None:
    info = broker.info() | changed
    monkeypatch.setattr(redis.Redis, "info", lambda _: info)
    found = producer({config.BROKER_URL: broker_url})[check]

    assert found.status == status
    assert "role" not in changed or "primary:7" in found.advice


@pytest.mark.usefixtures("without_workers")
def test_checks_that_the_user_has_no_right_to_are_skipped(broker_url: str, broker: Any) -> None:
    broker.execute_command(
        "ACL", "SETUSER", "limited", "on", ">pw", "~*", "&*", "+@all", "-info", "-time", "-llen"
    )
    found = producer({config.BROKER_URL: broker_url.replace("//", "//limited:pw@")})
    refused = producer({config.BROKER_URL: broker_url.replace("//", "//limited:s3cret@")})["broker"]
    absent = producer({config.BROKER_URL: broker_url.removesuffix("0") + "99"})["broker"]

    assert (found["broker"].status, found["broker: clock"].status) == ("skip", "skip")
    assert (found["queue"].status, "'llen'" in found["queue"].told) == ("skip", True)
    assert (found["rights"].code, "'llen'" in found["rights"].told) == ("invalid_setting", True)
    assert (refused.code, absent.code) == ("invalid_setting", "invalid_setting")
    assert "password" in refused.advice
    assert "database" in absent.advice
    assert "s3cret" not in repr(refused)


@pytest.mark.parametrize(
    "url", ["redis://:s3/cret@h:1/0", "redis://:s3#cret@h/0", "redis://:s3?cret@h/0"]
)
@pytest.mark.parametrize("variable", [config.BROKER_URL, config.RESULT_BACKEND])
def test_the_variable_with_a_password_that_is_not_escaped_is_named(url: str, variable: str) -> None:
    found = producer({config.BROKER_URL: "redis://127.0.0.1:1/0", variable: url})["broker"]

    assert found.code == "invalid_setting"
    assert found.told.startswith(variable)
    assert f"Set {variable} to" in found.advice
    assert "%2F" in found.advice
    assert "s3" not in repr(found)


@pytest.mark.parametrize("silent", [True, False])
def test_a_redis_that_is_down_or_silent_costs_a_bounded_time(
    silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks that need it are skipped, and its password is not printed."""
    monkeypatch.setattr(zlora.cli.doctor, "IMPATIENCE", 0.2)
    start = time.monotonic()
    with silent_server() as silent_url:
        url = silent_url if silent else f"redis://:s3cret@127.0.0.1:{free_port()}/0"
        found = producer({config.BROKER_URL: url, config.RESULT_BACKEND: url})

    assert time.monotonic() - start < 5
    assert found["broker"].code == "broker_unavailable"
    assert config.BROKER_URL in found["broker"].advice
    assert [found[name].status for name in ("result backend", "queue", "workers")] == ["skip"] * 3
    assert "s3cret" not in repr(found)


@pytest.mark.parametrize("key", ["gpu", "unacked", "zlora:ledger:gpu"])
def test_a_key_of_another_type_is_named(broker_url: str, broker: Any, key: str) -> None:
    broker.set(key, "x")

    found = producer({config.BROKER_URL: broker_url})

    assert (found["keys"].status, found["keys"].code) == ("fail", "broker_unavailable")
    assert f"{key} is a string" in found["keys"].told


@pytest.mark.parametrize("url", ["amqp://u:s3cret@h//", "redis://:s3cret@h/0?ssl=true"])
def test_a_url_that_is_not_one_redis_fails_and_is_not_printed(url: str) -> None:
    found = producer({config.BROKER_URL: url})

    assert (found["broker"].status, found["broker"].code) == ("fail", "invalid_setting")
    assert "s3cret" not in repr(found)


@pytest.mark.usefixtures("without_workers", "broker")
def test_the_url_may_be_in_a_file_which_must_exist(broker_url: str, tmp_path: Path) -> None:
    (tmp_path / "url").write_text(f"{broker_url}\n")
    there = producer({f"{config.BROKER_URL}_FILE": str(tmp_path / "url")})
    absent = {
        name: producer(
            {config.BROKER_URL: "redis://127.0.0.1:1/0"} | {name: "", f"{name}_FILE": "/nowhere"}
        )
        for name in (config.BROKER_URL, config.RESULT_BACKEND)
    }

    assert there["broker"].status == there["result backend"].status == "ok"
    for name, found in absent.items():
        assert list(found) == ["software", "broker"]
        assert (found["broker"].status, found["broker"].code) == ("fail", "invalid_setting")
        assert f"{name}_FILE=/nowhere: No such file" in found["broker"].told
        assert found["broker"].advice == f"Set {name} to the URL, or {name}_FILE to a file with it."


@pytest.mark.usefixtures("without_workers", "broker")
def test_all_base_models_of_a_queue_are_named(broker_url: str) -> None:
    info = QueueInfo(
        base="Z-Image",
        model="photo",
        models=("photo", "anime"),
        base_sha256="",
        width=1024,
        height=1024,
        scheduler="",
        num_inference_steps=9,
        guidance_scale=0.0,
        schedulers=(),
        timeout=600,
        url_policies=("key",),
        url_expires_in=60,
        versions={},
        loaded_at=0.0,
    )
    with redis.Redis.from_url(broker_url) as connection:
        JobStore(connection, "gpu").put_queue_info(msgspec.json.encode(info))

    found = producer({config.BROKER_URL: broker_url})["serves"]

    assert (found.status, "Z-Image: photo, anime, 1024x1024" in found.told) == ("ok", True)


# --- the worker's checks


def test_all_checks_of_a_worker_that_can_start_are_ok(environ: dict[str, str]) -> None:
    found = worker(environ)

    assert {name: check.status for name, check in found.items()} == dict.fromkeys(
        (
            *("software", "settings", "store", "device", "model", "host memory"),
            *("LoRA cache", "catalogue"),
        ),
        "ok",
    )
    assert "demo, which is part of the package" in found["model"].told
    for package in ("torch", "diffusers", "transformers"):
        assert package in found["software"].told
    assert not Path(environ["ZLORA_LORA_CACHE"]).parent.exists()
    Path(environ["ZLORA_HOME"]).mkdir(exist_ok=True)
    Path(environ["ZLORA_HOME"], "webhook.secret").write_text("the secret of `zlora up`")
    assert "sent by `zlora up` only" in next(
        check.told
        for check in zlora_worker.cli.doctor.checks(environ)
        if check.name == "worker: settings"
    )


def test_no_more_is_checked_after_a_wrong_setting(
    environ: dict[str, str],
) -> None:
    found = worker(environ, ZLORA_JOB_TIMEOUT="soon")

    assert list(found) == ["software", "settings"]
    assert (found["settings"].status, found["settings"].code) == ("fail", "invalid_setting")
    assert "ZLORA_JOB_TIMEOUT" in found["settings"].advice


def test_a_secret_in_a_missing_file_is_reported(environ: dict[str, str]) -> None:
    found = worker(environ, HF_TOKEN_FILE="/nowhere")

    assert list(found) == ["software", "settings"]
    assert found["settings"].code == "invalid_setting"
    assert "HF_TOKEN_FILE=/nowhere: No such file" in found["settings"].told
    assert "Correct HF_TOKEN_FILE" in found["settings"].advice


def test_settings_that_keep_a_worker_from_starting_fail(
    environ: dict[str, str], tmp_path: Path
) -> None:
    """Each check is made, whatever the others find."""
    file = tmp_path / "file"
    file.write_bytes(b"")

    found = worker(
        environ,
        ZLORA_STORE=file.as_uri(),
        ZLORA_MODEL="/no/such/model.safetensors",
        ZLORA_DEVICE="cuda:77",
        ZLORA_LORA_CACHE=str(file),
    )

    codes = {name: check.code for name, check in found.items() if check.status == "fail"}
    assert codes == {
        "store": "invalid_setting",
        "device": "model_unavailable",
        "model": "model_unavailable",
        "LoRA cache": "invalid_setting",
    }
    assert all(found[name].advice for name in codes)
    assert f"Make {file} writable" in found["LoRA cache"].advice


def test_a_disk_without_room_for_loras_fails(environ: dict[str, str]) -> None:
    found = worker(environ, ZLORA_LORA_FREE_BYTES=str(10**18))

    assert found["LoRA cache"].code == "cache_full"


def test_a_single_file_that_needs_a_configuration_is_refused_without(
    environ: dict[str, str], model_home: Path, tmp_path: Path
) -> None:
    home = tiny_zimage(model_home)
    file = str(write_original(home, tmp_path / "tiny.safetensors"))

    alone = worker(environ, ZLORA_MODEL=file)["model"]

    assert (alone.status, "ZLORA_MODEL_CONFIG" in alone.advice) == ("fail", True)
    whole = worker(environ, ZLORA_MODEL=file, ZLORA_MODEL_CONFIG=str(home))
    assert whole["model"].status == "ok"


def test_all_models_of_a_list_are_named(environ: dict[str, str]) -> None:
    found = worker(environ | {"ZLORA_MODEL": ""}, ZLORA_MODELS="first=demo,second=demo")

    assert "model first, second," in found["settings"].told


@pytest.mark.parametrize("model", ["owner/sd.xl-1.0", "owner", "owner/x.safetensors"])
def test_a_model_of_the_hub_must_be_cached_if_the_hub_is_offline(
    environ: dict[str, str], model: str
) -> None:
    """These tests set HF_HUB_OFFLINE, which is named only if the model is a hub id."""
    found = worker(environ, ZLORA_MODEL=model)["model"]

    assert found.status == "fail"
    assert ("HF_HUB_OFFLINE" in found.advice) == (model == "owner/sd.xl-1.0")


def test_a_real_model_on_a_cpu_is_a_warning(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")

    found = worker(environ, ZLORA_MODEL=str(tmp_path))

    assert (found["model"].status, found["device"].status) == ("ok", "warn")
    assert "GPU" in found["device"].advice


def gigabytes(environ: Mapping[str, str], **changed: str) -> float:
    """Return what the check of the host's memory says that base models take, on a CPU."""
    found = worker(environ, **changed)["host memory"]
    return float(found.told.partition(" ")[0])


@pytest.mark.parametrize("folder", [tiny_model, tiny_sd15, tiny_zimage])
def test_memory_is_counted_by_the_files_of_any_family(
    environ: dict[str, str],
    model_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: Callable[[Path], Path],
) -> None:
    """Twice the weights on a CPU, as many bytes as a worker has of them."""
    monkeypatch.setattr(zlora_worker.cli.doctor, "_GB", 10**6)  # these models have a few MB
    model = load_pipeline(model_home, ZLORA_MODEL=str(folder(model_home)))

    found = gigabytes(environ, ZLORA_MODEL=str(folder(model_home)))
    half = gigabytes(environ, ZLORA_MODEL=str(folder(model_home)), ZLORA_DTYPE="bfloat16")

    assert found == pytest.approx(2 * model.resident.nbytes / 10**6, rel=0.01, abs=0.1)
    assert half == pytest.approx(found / 2, abs=0.1)


def test_memory_is_counted_by_single_files(
    environ: dict[str, str],
    model_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file of Z-Image has the transformer alone, and the other components are in the folder."""
    monkeypatch.setattr(zlora_worker.cli.doctor, "_GB", 10**6)
    home = tiny_zimage(model_home)
    file = write_original(home, tmp_path / "tiny.safetensors")

    whole = gigabytes(environ, ZLORA_MODEL=str(home))

    assert whole > 1
    assert gigabytes(environ, ZLORA_MODEL=str(file), ZLORA_MODEL_CONFIG=str(home)) == pytest.approx(
        whole, rel=0.01
    )


@pytest.mark.parametrize(
    ("room", "status"),
    [(3, "ok"), (2, "warn"), (0, "warn")],
)
def test_the_memory_of_several_base_models_is_compared_with_their_bound(
    environ: dict[str, str],
    model_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    status: str,
) -> None:
    """A base without a copy is read beside the copies, and two are what draws on a CPU."""
    monkeypatch.setattr(zlora_worker.cli.doctor, "_GB", 10**6)
    nbytes = load_pipeline(model_home).resident.nbytes
    models = ",".join(f"{name}={tiny_model(model_home)}" for name in "abc")

    found = worker(
        environ | {"ZLORA_MODEL": ""},
        ZLORA_MODELS=models,
        ZLORA_MODELS_BYTES=str(int((room + 0.5) * nbytes)),
    )["host memory"]

    assert (found.status, f"copies of {room} of 3" in found.told) == (status, True)
    megabytes = (min(room + 1, 3) + 2) * nbytes / 10**6
    assert float(found.told.partition(" ")[0]) == pytest.approx(megabytes, rel=0.01, abs=0.1)
    if status == "warn":
        assert "Set ZLORA_MODELS_BYTES to" in found.advice


def test_base_models_that_are_larger_than_the_memory_are_reported(
    environ: dict[str, str], model_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", lambda _name: 1)

    found = worker(environ, ZLORA_MODEL=str(tiny_zimage(model_home)))["host memory"]

    assert found.status == "warn"
    assert "more memory" in found.advice
    assert "ZLORA_MODELS_BYTES" not in found.advice


def test_memory_is_not_guessed_for_files_that_are_not_here(environ: dict[str, str]) -> None:
    assert worker(environ, ZLORA_MODEL="owner/model")["host memory"].status == "skip"


@pytest.mark.parametrize(
    ("model", "needed"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", 9),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 4),
        ("Tongyi-MAI/Z-Image-Turbo", 23),
    ],
)
def test_a_gpu_without_room_for_the_base_model_is_reported(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, model: str, needed: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    free = [(needed - 1) * 10**9, (needed + 1) * 10**9]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free.pop(0), 80 * 10**9))

    little, enough = (
        worker(environ, ZLORA_MODEL=model, ZLORA_DEVICE="cuda")["device"] for _ in range(2)
    )

    assert (little.status, f"{needed} GB" in little.advice) == ("warn", True)
    assert enough.status == "ok"


@pytest.mark.parametrize(
    ("model", "needed"), [("Tongyi-MAI/Z-Image-Turbo", 21), ("owner/unknown", 2)]
)
def test_a_disk_without_room_for_the_base_model_fails(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, model: str, needed: int
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: SimpleNamespace(free=needed * 10**9 - 10**9)
    )
    full = worker(environ, ZLORA_MODEL=model)["model"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed * 2 * 10**9))
    free = worker(environ, ZLORA_MODEL=model)["model"]

    assert (full.code, f"Free {needed} GB" in full.advice) == ("model_unavailable", True)
    assert free.status == "warn"


# --- the command


def test_the_exit_status_is_that_of_the_first_failure(environ: dict[str, str]) -> None:
    """Each check is a line; with `--json` the checks are one document."""
    away = {**environ, config.BROKER_URL: f"redis://:s3cret@127.0.0.1:{free_port()}/0"}

    lines, document = doctor(away), doctor(away, "--json")

    assert lines.exit_code == document.exit_code == 75
    checks = json.loads(document.output)
    assert [check["name"] for check in checks if check["status"] == "fail"] == ["broker"]
    assert {"worker: settings", "worker: store", "worker: device"} <= {
        check["name"] for check in checks
    }
    for check in checks:
        assert f"{check['status']:<5} {check['name']}: " in lines.output
    assert "\x1b" not in lines.output
    assert "s3cret" not in lines.output + document.output


def test_a_terminal_gets_one_table_in_colours(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    away = {
        **environ,
        config.BROKER_URL: f"redis://127.0.0.1:{free_port()}/0",
        "TERM": "xterm",
        "COLUMNS": "100",
    }
    for name, value in away.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    ours, theirs = pty.openpty()
    written: list[bytes] = []
    reading = Thread(target=lambda: written.extend(iter(lambda: _read(ours), b"")))
    reading.start()
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert main(["doctor"], standalone_mode=False) == 75
        monkeypatch.undo()
    reading.join()
    os.close(ours)

    screen = b"".join(written).decode()
    assert "\x1b[1;31mfail" in screen
    assert "worker: store" in screen


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the terminal is closed
        return b""
