"""The client's side of `tests/compat.py`: submits jobs to a worker of another version.

Runs with the Python of either version, so it imports only public names that both versions have.
`compat_client.py STEP FACTS LORA_HOST RECEIVER_PORT` prints a line for each check, and writes what
was seen to the file FACTS, for comparison with the other direction.
"""

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Final, NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec
import redis
from celery import Celery
from zlora import Cancellation, Client, GenerateResult, JobState, errors
from zlora.webhook import Event, Verifier

_PATIENCE: Final = 120.0  # seconds for a job, on a busy machine
_SMALL: Final = {"prompt": "a portrait in anime style", "num_inference_steps": 4, "seed": 7}
_LONG: Final = {**_SMALL, "num_inference_steps": 200, "num_images": 8}
_PHASES: Final = {
    *("queued", "fetching", "loading", "apply", "denoising", "restore", "tail"),
    *("encode", "uploading", "waiting"),
}
_ERRORS: Final = {
    "missing": ("lora_not_found", errors.LoraNotFound),
    "forbidden-host": ("lora_not_allowed", errors.LoraNotAllowed),
    "misspelt": ("invalid_request", errors.InvalidRequest),
    "queued": ("job_revoked", errors.JobRevoked),
    "running": ("job_revoked", errors.JobRevoked),
}
EXPIRED: Final = ("early", "png-lora", "webp-lora")  # jobs whose Celery result is deleted


class Checks:
    """Prints a line for each check, and counts those that fail."""

    def __init__(self, title: str) -> None:
        self.title, self.failed = title, 0

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Print whether the block ends without an error."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - any error is the check's answer
            self.failed += 1
            print(f"FAILED {self.title}: {name}: {type(error).__name__}: {error}", flush=True)  # noqa: T201
        else:
            print(f"ok     {self.title}: {name}", flush=True)  # noqa: T201


def expect(condition: object, *seen: object) -> None:
    """Raise `AssertionError` with what was seen unless the condition is true."""
    if not condition:
        raise AssertionError(" ".join(map(str, seen)))


def shape_of(value: Any) -> Any:
    """Replace each scalar in JSON data by its type, so that two documents can be compared."""
    if isinstance(value, dict):
        return {name: shape_of(item) for name, item in sorted(value.items())}
    if isinstance(value, list):
        return [shape_of(item) for item in value]
    if isinstance(value, str):
        with_json = value.startswith(("{", "[")) and _decoded(value)
        return {"json": shape_of(with_json)} if with_json else "text"
    if isinstance(value, bool) or value is None:
        return str(value)
    return "number"


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


class Hook(NamedTuple):
    """A verified webhook."""

    event: Event
    body: dict[str, Any]
    headers: list[str]


class Side:
    """A client of this version, with what it has seen."""

    def __init__(self, checks: Checks, host: str, port: int) -> None:
        self.checks, self.host, self.port = checks, host, port
        self.client = Client.from_env()
        self.redis: Any = redis.Redis.from_url(
            os.environ["ZLORA_BROKER_URL"], decode_responses=True
        )
        self.facts: dict[str, Any] = {"pixels": {}, "shapes": {}, "errors": {}, "results": {}}

    # steps

    def before(self) -> None:
        """Submit a job and cancel another one while no worker runs."""
        with self.checks.check("a job is queued while no worker runs"):
            handle = self.client.submit(
                self.lora("anime-style"), job_id="early", priority="high", expires_in=3600
            )
            expect(handle.status().state is JobState.PENDING, handle.status())
        with self.checks.check("cancel of a queued job: queued, JobRevoked"):
            handle = self.client.submit(_SMALL, job_id="queued")
            self.look("queued")
            expect(handle.cancel() is Cancellation.QUEUED)
            self.error_of("queued")
        queue = self.client.queue
        for place in (queue, *(f"{queue}\x06\x16{step}" for step in range(1, 10))):
            for message in self.redis.lrange(place, 0, -1):
                name = place.replace("\x06\x16", " priority ")
                self.facts["shapes"][f"message in {name}"] = shape_of(json.loads(message))

    def main(self) -> None:
        """Use each function of a client while the worker of the other side runs."""
        self.submit_and_result()
        self.events()
        self.errors()
        with self.receiving() as hooks:
            self.cancel_running()
            self.webhooks(hooks)

    def again(self) -> None:
        """Submit jobs of the other side's client again."""
        with self.checks.check("the same request under the same id is the same job"):
            handle = self.client.submit(self.lora("anime-style"), job_id="early")
            expect(handle.result(timeout=10).job_id == "early")
        with self.checks.check("another request under the same id is a Conflict"):
            try:
                self.client.submit(_SMALL, job_id="early")
            except errors.Conflict as error:
                expect(error.details == {"job_id": "early"}, error.details)
            else:
                raise AssertionError("accepted")
        with self.checks.check("the other side's jobs: results, errors and states"):
            for name in ("png-lora", "webp-lora"):
                expect(self.client.job(name).status().state is JobState.SUCCESS)
                self.client.job(name).result(timeout=10)
            for name in _ERRORS:
                self.error_of(name)

    def expired(self) -> None:
        """Read results that Celery has no longer, from the manifests, by the worker's sidecar."""
        for name in EXPIRED:
            with self.checks.check(f"the manifest of {name} after its result has expired"):
                found = self.client.job(name).result(timeout=30)
                (image,) = found.images
                expect(path_of(image.url).is_file(), image.url)
                self.facts["results"][name] = msgspec.to_builtins(found)
        with self.checks.check("an id that no job has: JobUnknown"):
            try:
                self.client.job("never-submitted").result(timeout=3)
            except errors.JobUnknown:
                pass
            else:
                raise AssertionError("a result")

    # parts of `main`

    def submit_and_result(self) -> None:
        """Draw images with LoRAs, in both lossless formats."""
        jobs = {
            "png-lora": self.lora("anime-style"),
            "webp-lora": {
                **self.lora("cyberpunk-style", "neon-lights"),
                "output_format": "webp",
                "lossless": True,
            },
        }
        for name, request in jobs.items():
            self.client.submit(request, job_id=name)
        for name in ("early", *jobs):
            with self.checks.check(f"result of {name}: image, sha256, receipt"):
                result = self.client.job(name).result(timeout=_PATIENCE)
                (image,) = result.images
                data = path_of(image.url).read_bytes()
                expect(hashlib.sha256(data).hexdigest() == image.sha256, "sha256 of the file")
                expect(len(data) == image.size, "size of the file")
                expect(re.fullmatch("[0-9a-f]{64}", image.pixels_sha256 or ""), image)
                expect(result.base_intact, "base_intact")
                expect(all(sum(lora.modules.values()) for lora in result.loras), result.loras)
                expect(len(result.loras) == (2 if name == "webp-lora" else 1), result.loras)
                self.facts["pixels"][name] = image.pixels_sha256
                document = msgspec.to_builtins(result)
                self.facts["results"][name] = document
                self.facts["shapes"][f"result {name}"] = shape_of(document)
                self.look(name)

    def events(self) -> None:
        """Follow a job by its events."""
        with self.checks.check("events: PROGRESS with phases and steps, then SUCCESS"):
            handle = self.client.submit(
                {**_SMALL, "num_inference_steps": 60, "seed": 11}, job_id="followed"
            )
            seen = list(handle.events(timeout=_PATIENCE))
            states = {status.state.value for status in seen}
            phases = {status.phase for status in seen if status.phase}
            expect(seen[-1].state is JobState.SUCCESS, seen[-1])
            expect("PROGRESS" in states and "denoising" in phases, states, phases)
            expect(phases <= _PHASES, phases)
            expect(any(status.steps == 60 and status.step for status in seen), seen)
            self.facts["events"] = [sorted(states), sorted(phases)]

    def cancel_running(self) -> None:
        """Cancel a job while it is drawn."""
        with self.checks.check("cancel of a running job: running, JobRevoked"):
            handle = self.client.submit(_LONG, job_id="running", webhook_url=self.receiver)
            self.wait_for(lambda: handle.status().phase == "denoising", "denoising")
            self.look("running")
            expect(handle.cancel() is Cancellation.RUNNING)
            self.error_of("running")
            expect(handle.status().state is JobState.REVOKED, handle.status())

    def errors(self) -> None:
        """Let jobs fail."""
        with self.checks.check("a LoRA that does not exist: LoraNotFound"):
            self.client.submit(self.lora("nowhere"), job_id="missing")
            self.error_of("missing")
        with self.checks.check("a host that is not allowed: LoraNotAllowed"):
            request = {**_SMALL, "loras": [{"file": {"url": "http://127.0.0.1:1/x.safetensors"}}]}
            self.client.submit(request, job_id="forbidden-host")
            self.error_of("forbidden-host")
        with self.checks.check("a misspelt field sent by plain Celery: InvalidRequest"):
            self.send("misspelt", {**_SMALL, "promt": "x"})
            self.error_of("misspelt")
        with self.checks.check("a request sent by plain Celery: the result"):
            sent = self.send("plain", _SMALL)
            document = sent.get(timeout=_PATIENCE)
            result = self.client.job("plain").result(timeout=10)
            expect(msgspec.convert(document, GenerateResult) == result)
            self.facts["pixels"]["plain"] = result.images[0].pixels_sha256

    def webhooks(self, hooks: dict[str, "Hook"]) -> None:
        """Let jobs end in three ways, and look at their webhooks."""
        with self.checks.check("webhook of a success, verified: the same result"):
            handle = self.client.submit(_SMALL, job_id="hook", webhook_url=self.receiver)
            result = handle.result(_PATIENCE)
            self.wait_for(lambda: "hook" in hooks, "the webhook")
            event = hooks["hook"].event
            expect(event.type == "job.succeeded", event)
            expect(event.result == result, event.result, result)
        with self.checks.check("webhook of a failure, verified: LoraNotFound"):
            self.client.submit(
                self.lora("nowhere"),
                job_id="hook-failed",
                webhook_url=self.receiver,
                webhook_events=["job.failed"],
            )
            self.wait_for(lambda: "hook-failed" in hooks, "the webhook")
            event = hooks["hook-failed"].event
            expect(event.type == "job.failed", event)
            expect(isinstance(event.error, errors.LoraNotFound), event)
            self.wait_for(lambda: self.state_of("hook-failed") == "FAILURE", "Celery's result")
        with self.checks.check("webhook of a cancellation, verified: JobRevoked"):
            self.wait_for(lambda: "running" in hooks, "the webhook")
            event = hooks["running"].event
            expect(event.type == "job.cancelled", event)
            expect(isinstance(event.error, errors.JobRevoked), event)
        for name, hook in hooks.items():
            self.facts["shapes"][f"webhook of {name}"] = shape_of(hook.body)
            self.facts["shapes"][f"headers of the webhook of {name}"] = hook.headers
            self.look(name)

    @contextmanager
    def receiving(self) -> Iterator[dict[str, "Hook"]]:
        """Run a receiver inside the block; yield the verified webhooks by job id."""
        hooks: dict[str, Hook] = {}
        verifier = Verifier.from_env()

        class Receiver(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                event = verifier.verify(body, dict(self.headers))
                names = sorted({name.lower() for name in self.headers})
                hooks[event.job_id] = Hook(event, json.loads(body), names)
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Log nothing."""

        with HTTPServer(("127.0.0.1", self.port), Receiver) as server:
            Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            yield hooks
            server.shutdown()

    # helpers

    @property
    def receiver(self) -> str:
        """URL of the receiver of webhooks."""
        return f"http://127.0.0.1:{self.port}/jobs"

    def lora(self, *names: str) -> dict[str, Any]:
        """Return a small request with LoRAs of the HTTP server."""
        files = [{"url": f"http://{self.host}/{name}.safetensors"} for name in names]
        return {**_SMALL, "loras": [{"file": file, "weight": 0.8} for file in files]}

    def send(self, job_id: str, request: dict[str, Any]) -> Any:
        """Send a request with Celery alone."""
        url = os.environ["ZLORA_BROKER_URL"]
        app = Celery("other", broker=url, backend=url)
        return app.send_task("zlora.generate", args=[request], queue="gpu", task_id=job_id)

    def error_of(self, job_id: str) -> None:
        """Check class, code and details of a job's error."""
        code, kind = _ERRORS[job_id]
        try:
            result = self.client.job(job_id).result(timeout=_PATIENCE)
        except errors.ZloraError as error:
            expect(type(error) is kind and error.code == code, repr(error))
            details = {name: shape_of(value) for name, value in sorted(error.details.items())}
            self.facts["errors"][job_id] = [type(error).__name__, error.code, details]
            self.look(job_id)
        else:
            raise AssertionError(result)

    def look(self, job_id: str) -> None:
        """Remember the shape of what Redis has of a job."""
        key, state = f"zlora:job:{job_id}", self.state_of(job_id)
        if state in ("SUCCESS", "FAILURE"):  # the worker removes its attempt a moment later
            self.wait_for(
                lambda: not any(name.startswith("attempt:") for name in self.redis.hkeys(key)),
                "the end of the attempt",
            )
        record = self.redis.hgetall(key)
        meta = self.redis.get(f"celery-task-meta-{job_id}")
        fields = {re.sub("^attempt:.*", "attempt:ID", name): record[name] for name in record}
        shapes = self.facts["shapes"]
        shapes[f"record of {job_id} ({state})"] = shape_of(fields)
        shapes[f"Celery's result of {job_id} ({state})"] = meta and shape_of(json.loads(meta))

    def state_of(self, job_id: str) -> str:
        """Return the state in Celery's result."""
        meta = self.redis.get(f"celery-task-meta-{job_id}")
        return str(json.loads(meta)["status"]) if meta else "no result"

    def wait_for(self, look: Callable[[], bool], what: str) -> None:
        """Wait until `look` returns True."""
        end = time.monotonic() + _PATIENCE
        while not look():
            if time.monotonic() > end:
                raise TimeoutError(what)
            time.sleep(0.02)


def path_of(url: str | None) -> Path:
    """Return the file of a `file://` URL."""
    return Path(unquote(urlsplit(url or "").path))


def main() -> int:
    """Run one step; return the exit status."""
    step, facts, host, port = sys.argv[1:]
    checks = Checks(os.environ["COMPAT_TITLE"])
    side = Side(checks, host, int(port))
    getattr(side, step)()
    side.client.close()
    Path(facts).write_text(json.dumps(side.facts))
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
