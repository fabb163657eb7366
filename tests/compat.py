"""Check that this version and another one understand each other, with real parts of both.

`PYTHONPATH=tests .venv/bin/python -P tests/compat.py OLD` compares this checkout with the checkout
OLD, which has a `.venv` of its own. Each version is once the client and once the worker: jobs,
progress, cancellation, errors, webhooks, manifests, images drawn again, jobs of a killed worker,
and the HTTP server if the client's version has one. Then the data in Redis, the metrics, the images
of `zlora demo`, the environment variables and the command lines of both versions are compared: the
new version must have all that the old one has, and may have more.

Prints a line for each check; the exit status is 1 if one has failed. Takes about ten minutes.
"""

import base64
import html
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families
from support.compat_client import EXPIRED, Checks, expect, path_of, shape_of
from support.figures import Tally
from support.http_server import running
from support.processes import Worker, clean_environ, free_port, wait_until, worker
from support.valkey import Valkey
from zlora_worker.demo.server import serving
from zlora_worker.settings import DEMO_LORAS

_ROOT: Final = Path(__file__).parents[1]
_CLIENT: Final = _ROOT / "tests" / "support" / "compat_client.py"
_SECRET: Final = "whsec_" + base64.b64encode(b"k" * 32).decode()
# What differs between two runs of the same version.
_VOLATILE: Final = {"timings", "milliseconds", "started_at", "finished_at", "tier", "url"}
_CHOICES: Final = {"enum", "examples"}  # fields of JSON Schemas whose lists may become longer
_SENTENCES: Final = {"message", "expected", "description", "title", "told", "advice", "help"}
_CODE: Final = re.compile(r"\b(?:ZLORA|COZY|FILE_API|HF|AWS)_[A-Z0-9_]+")


@dataclass(frozen=True)
class Version:
    """A checkout with a virtual environment."""

    name: str
    root: Path

    @property
    def python(self) -> str:
        """Path of its interpreter."""
        return str(self.root / ".venv" / "bin" / "python")

    def zlora(self, *arguments: str, environ: Mapping[str, str], cwd: Path) -> "Ended":
        """Run its `zlora` until the end."""
        command = [str(self.root / ".venv" / "bin" / "zlora"), *arguments]
        ended = subprocess.run(
            command,
            env=clean_environ(environ),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    @cached_property
    def commands(self) -> list[str]:
        """Names of the commands of its `zlora`."""
        return lines_of(self.zlora("--help", environ={}, cwd=self.root).out)["commands"]


@dataclass(frozen=True)
class Ended:
    """The end of a command."""

    status: int
    out: str
    err: str


def main() -> int:
    """Run all checks; return the exit status."""
    old, new = Version("old", Path(sys.argv[1]).resolve()), Version("new", _ROOT)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="zc-") as folder, serving(DEMO_LORAS) as host:
        scene = Scene(Path(folder), host)
        facts = {}
        for client, server in ((new, old), (old, new)):  # the new worker gets the old one's cache
            direction = Direction(scene, client, server, old=old)
            failed += direction.run()
            facts[client.name] = direction.facts
        checks = Checks("old and new")
        compare(checks, facts["old"], facts["new"])
        draw_demos(checks, scene, old, new)
        compare_variables(checks, old, new)
        compare_help(checks, scene, old, new)
        failed += checks.failed
    print(f"{failed} checks have failed" if failed else "all checks are ok")  # noqa: T201
    return 1 if failed else 0


class Scene:
    """A folder for everything, and the server of LoRAs."""

    def __init__(self, folder: Path, host: str) -> None:
        self.folder, self.host = folder, host

    def environ(self, broker_url: str, name: str, port: int) -> dict[str, str]:
        """Variables of client and worker of one direction; the LoRA cache is shared by all."""
        return {
            "ZLORA_BROKER_URL": broker_url,
            "ZLORA_HOME": str(self.folder / "home"),
            "ZLORA_STORE": (self.folder / name / "store").as_uri(),
            "ZLORA_MODEL": "demo",
            "ZLORA_DEVICE": "cpu",
            "ZLORA_LORA_FREE_BYTES": "0",
            "ZLORA_ALLOW_HOSTS": f"{self.host},127.0.0.1:{port}",
            "ZLORA_WEBHOOK_SECRET": _SECRET,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }


class Direction:
    """One version as the client of the other version's worker."""

    def __init__(self, scene: Scene, client: Version, server: Version, *, old: Version) -> None:
        self.scene, self.client, self.server, self.old = scene, client, server, old
        self.title = f"{client.name} client, {server.name} worker"
        self.folder = scene.folder / client.name
        self.folder.mkdir()
        self.checks, self.failed = Checks(self.title), 0
        self.facts: dict[str, Any] = {}
        self.port = free_port()

    def run(self) -> int:
        """Run all checks of this direction; return how many have failed."""
        with Valkey(self.folder, Tally()) as broker:
            environ = self.scene.environ(broker.url, self.client.name, self.port)
            self.step("before", self.client, environ)
            metrics = f"127.0.0.1:{free_port()}"
            with self.serving(self.server, {**environ, "ZLORA_METRICS": metrics}):
                self.step("main", self.client, environ)
                self.step("again", self.server, environ)
                self.facts["metrics"] = metrics_at(f"http://{metrics}/metrics")
                self.command_lines(environ)
                self.facts["keys"] = self.keys(broker)
                self.http(broker, environ)
                with broker.client() as connection:
                    for job_id in EXPIRED:
                        connection.delete(f"celery-task-meta-{job_id}")
                    connection.delete(f"zlora:job:{EXPIRED[0]}")
                self.step("expired", self.client, environ)
            self.facts["queue metrics"] = self.queue_metrics(environ)
            self.take_over({**environ, "ZLORA_VISIBILITY": "5"})
        self.replay(environ)
        return self.failed + self.checks.failed

    def step(self, name: str, version: Version, environ: Mapping[str, str]) -> None:
        """Run a step of the client with the Python of a version."""
        facts = self.folder / f"{name}.json"
        title = self.title if version is self.client else f"{self.title}, {version.name} client"
        ended = subprocess.run(
            [version.python, "-P", _CLIENT, name, facts, self.scene.host, str(self.port)],
            env=clean_environ(environ) | {"COMPAT_TITLE": title},
            cwd=self.folder,
            check=False,
        )
        with self.checks.check(f"step {name} of the {version.name} client"):
            expect(ended.returncode == 0, "exit status", ended.returncode)
        if facts.exists():
            self.facts[name] = json.loads(facts.read_text())

    @contextmanager
    def serving(self, version: Version, environ: Mapping[str, str]) -> Iterator[Worker]:
        """Run a worker of a version until the end of the block."""
        log = self.folder / f"{version.name}-worker.log"
        options = ("-n", f"{version.name}@%h", "--without-gossip", "--without-mingle")
        with worker(environ, log, *options, python=version.python) as running:
            running.wait_ready()
            yield running

    def take_over(self, environ: Mapping[str, str]) -> None:
        """Kill the worker between two images of a job; a worker of the other version goes on."""
        first, second = self.server, self.client
        title = f"a job of a killed {first.name} worker is ended by the {second.name} worker"
        with self.checks.check(f"{title}: second attempt, first image kept"):
            job = ["taken-over", "--json"]
            order = ["x", "-n", "2", "--steps", "100", "--seed", "5", "--job-id", *job]
            with self.serving(first, environ) as running:
                submitted = second.zlora("submit", *order, environ=environ, cwd=self.folder)
                expect(submitted.status == 0, submitted)
                outputs = self.folder / "store" / "runs" / "taken-over" / "outputs"
                image = outputs / "0.png"
                wait_until(image.exists, "the first image is stored")
                os.killpg(running.process.pid, signal.SIGKILL)
            before = image.stat().st_mtime_ns
            left = sorted(path.name for path in outputs.glob("[0-9]*"))  # a kill can leave a draft
            with self.serving(second, environ):
                command = ["result", *job, "--wait", "120"]
                ended = second.zlora(*command, environ=environ, cwd=self.folder)
            expect(ended.status == 0, ended)
            result = json.loads(ended.out)["result"]
            expect(left == ["0.png"], "images of the first worker:", left)
            expect(result["attempt"] == 2 and len(result["images"]) == 2, result)
            expect(image.stat().st_mtime_ns == before, "the first image was stored again")
            self.facts["taken over"] = [one["pixels_sha256"] for one in result["images"]]

    def keys(self, broker: Valkey) -> dict[str, str]:
        """Return the names and types of all keys of this project and of Celery's results."""
        with broker.client() as connection:
            names = [*connection.scan_iter("zlora:*"), *connection.scan_iter("celery-task-meta-*")]
            volatile = ("zlora:lease:", "zlora:sweep:", "zlora:recall:", "zlora:cancel:")
            return {
                name: str(connection.type(name))
                for name in sorted(names)
                if not name.startswith(volatile)
            }

    def queue_metrics(self, environ: Mapping[str, str]) -> dict[str, Any]:
        """Return what `zlora metrics` of the worker's version serves."""
        address = f"127.0.0.1:{free_port()}"
        command = [str(self.server.root / ".venv" / "bin" / "zlora"), "metrics"]
        process = subprocess.Popen(
            command,
            env=clean_environ({**environ, "ZLORA_METRICS": address}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            return wait_until(lambda: metrics_at(f"http://{address}/metrics"), "zlora metrics")
        finally:
            process.terminate()
            process.wait()

    def http(self, broker: Valkey, environ: Mapping[str, str]) -> None:
        """Draw an image again by the client's HTTP server, if its version has one."""
        if "serve" not in self.client.commands:
            return
        log, python = self.folder / "server.log", self.client.python
        with (
            self.checks.check("zlora serve: what the queue serves, and the same image again"),
            running(broker.url, log=log, python=python, **environ) as server,
            server.client() as http,
        ):
            if "info" in self.server.commands:  # its workers write what they serve
                queue = http.get("/v1/queue").raise_for_status().json()
                expect((queue["base"], queue["model"]) == ("SDXL", "demo"), queue)
            request = self.facts["main"]["results"]["png-lora"]["request"]
            answer = http.post("/v1/jobs", params={"wait": 60}, json=request).raise_for_status()
            (image,) = answer.json()["result"]["images"]
            expect(image["pixels_sha256"] == self.facts["main"]["pixels"]["png-lora"], image)

    def command_lines(self, environ: Mapping[str, str]) -> None:
        """Run the commands that read jobs with both versions; print what differs."""
        host = self.scene.host
        commands: list[list[str]] = [
            ["status", "png-lora", "missing", "running", "nowhere", "--json"],
            *(["result", name, "--json"] for name in ("png-lora", "missing", "running")),
            ["result", "nowhere", "--wait", "0.2", "--json"],
            ["cancel", "png-lora", "running", "--json"],
            ["webhooks", "--json"],
            ["inspect", f"http://{host}/anime-style.safetensors", "--json"],
            ["inspect", f"http://{host}/nowhere.safetensors", "--json"],
            ["inspect", "http://127.0.0.1:1/x.safetensors", "--json"],
            ["submit", "--json"],
            ["submit", "x", "--steps", "0", "--json"],
            ["submit", "x", "--steps", "many", "--json"],
            ["submit", "x", "--webhook-url", "ftp://x", "--json"],
            [
                "submit",
                "x",
                "--lora",
                f"http://{host}/nowhere.safetensors",
                "--preflight",
                "--json",
            ],
            ["submit", "x", "--job-id", "png-lora", "--json"],
            ["submit", "x", "--job-id", "../x", "--json"],
            ["generate", "x", "--steps", "2", "--seed", "3", "--job-id", "by-command", "--json"],
            [
                "generate",
                "x",
                "--job-id",
                "bad-lora",
                "--lora",
                f"http://{host}/nowhere.safetensors",
                "--json",
            ],
            ["replay", "/etc/hostname", "--json"],
            ["batch", "/nowhere", "--json"],
            ["metrics"],
            ["doctor", "--json"],
            ["info", "--json"],
            ["cache", "ls", "--json"],
            ["cache", "verify", "--json"],
            ["nothing"],
            *(["schema", name] for name in ("request", "result", "event", "error", "webhook")),
        ]
        for command in commands:
            if command[0] not in ("nothing", *self.old.commands):
                continue  # there is nothing to keep
            shown = " ".join(command).replace(host, "HOST")
            with self.checks.check(f"zlora {shown}: the old version's status and JSON, by both"):
                seen = {}
                for version in (self.client, self.server):
                    variables = {**environ, "COLUMNS": "100"}
                    ended = version.zlora(*command, environ=variables, cwd=self.folder)
                    document = decoded(ended.out)
                    if command[0] == "cache":  # times and counts
                        document = shape_of(document)
                    if command[0] == "doctor":
                        document = {one.pop("name"): one for one in document}
                    seen[version.name] = [ended.status, facts_of(document)]
                require_kept(seen["old"], seen["new"])

    def replay(self, environ: Mapping[str, str]) -> None:
        """Draw the worker's images again with the client's version."""
        outputs = sorted((self.folder / "store" / "runs").glob("*-lora/outputs/*"))
        manifest = self.folder / "store" / "runs" / "early" / "manifest.json"
        shown = ", ".join([*(path.name for path in outputs), manifest.name])
        names = f"{self.client.name} `zlora replay` of the {self.server.name} worker's {shown}"
        with self.checks.check(f"{names}: identical"):
            arguments = ["replay", "--json", *map(str, outputs), str(manifest)]
            ended = self.client.zlora(*arguments, environ=environ, cwd=self.folder)
            verdicts = [one["verdict"] for one in json.loads(ended.out)]
            expect((ended.status, verdicts) == (0, ["identical"] * 3), ended)
        for name in EXPIRED:
            image, *_ = self.facts["main"]["results"][name]["images"]
            self.facts[f"metadata of {name}"] = metadata_of(path_of(image["url"]))


# comparing


def compare(checks: Checks, one: dict[str, Any], other: dict[str, Any]) -> None:
    """Compare what the old client with the new worker saw, and the new client with the old one."""
    parts = [("main", "pixels", "pixels_sha256 of the same jobs by both workers")]
    parts += [("main", "errors", "classes, codes and details of errors")]
    for step, name, title in parts:
        with checks.check(title):
            expect(one[step][name] == other[step][name], one[step][name], other[step][name])
    with checks.check("pixels_sha256 of the job that was taken over, in both directions"):
        expect(one["taken over"] == other["taken over"], one["taken over"], other["taken over"])
    with checks.check("the new worker finds a LoRA in the cache of the old worker"):
        (lora,) = one["main"]["results"][EXPIRED[0]]["loras"]
        expect(lora["tier"] == "disk", lora)
    for step in ("before", "main"):
        shapes = [facts[step]["shapes"] for facts in (one, other)]
        for name in sorted(shapes[0] | shapes[1]):
            with checks.check(f"JSON of {name}"):
                seen = [facts_of(shape.get(name)) for shape in shapes]
                if name.startswith("record"):  # of client and worker
                    expect(seen[0] == seen[1], first_difference(*seen))
                elif name.startswith(("message", "result")):  # the old client's, in `one`
                    require_kept(*seen)
                else:  # the old worker's, in `other`
                    require_kept(seen[1], seen[0])
    for name in EXPIRED:
        for step in ("main", "expired"):
            with checks.check(f"values of the result of {name}, step {step}"):
                results = [facts[step]["results"][name] for facts in (one, other)]
                require_kept(*(facts_of(without_file(result)) for result in results))
        with checks.check(f"metadata in the image of {name}"):
            require_kept(*(facts[f"metadata of {name}"] for facts in (other, one)))
    for name in ("keys", "metrics", "queue metrics"):
        with checks.check(f"{name}: names, types and labels"):
            expect(one[name], "nothing was seen")
            require_kept(other[name], one[name])


def without_file(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result without hashes and sizes of files, whose metadata differ between versions."""
    images = [{**image, "sha256": None, "size": None} for image in result["images"]]
    return {**result, "images": images}


def draw_demos(checks: Checks, scene: Scene, old: Version, new: Version) -> None:
    """Run `zlora demo` of both versions; draw each one's images again with the other version.

    A document without a seed gets one from its job id, which is random: two demos have no seed in
    common.
    """
    requests = scene.folder / "requests"
    requests.mkdir()
    jobs: dict[str, Any] = {}
    for version in (old, new):
        environ = {"ZLORA_HOME": str(scene.folder / f"demo-{version.name}"), "COLUMNS": "120"}
        with checks.check(f"{version.name} `zlora demo`"):
            ended = version.zlora("demo", "--json", environ=environ, cwd=scene.folder)
            expect(ended.status == 0, ended.err)
            jobs[version.name] = json.loads(ended.out)["jobs"]
    with checks.check("demo: documents and JSON of both versions"):
        seen = [[[job["document"], shape_of(job["result"])] for job in jobs[name]] for name in jobs]
        require_kept(*(facts_of(found) for found in seen))
    with Valkey(requests, Tally()) as broker:
        environ = scene.environ(broker.url, "requests", free_port())
        for version, other in ((old, new), (new, old)):
            log = requests / f"{other.name}.log"
            with worker(environ, log, "--without-gossip", python=other.python) as running:
                running.wait_ready()
                for index, job in enumerate(jobs[version.name]):
                    (image,) = job["result"]["images"]
                    shown = f"{job['document']}, {job['caption']}, seed {image['seed']}"
                    title = f"pixels of {shown}: {version.name} demo, {other.name} worker"
                    path = requests / f"{index}.json"
                    request = with_host(job["result"]["request"], scene.host)
                    path.write_text(json.dumps({**request, "seed": image["seed"]}))
                    with checks.check(title):
                        name = f"{other.name}-{index}"
                        command = ["generate", "--request", str(path), "--job-id", name, "--json"]
                        ended = other.zlora(*command, environ=environ, cwd=requests)
                        expect(ended.status == 0, ended)
                        (drawn,) = json.loads(ended.out)["result"]["images"]
                        expect(drawn["pixels_sha256"] == image["pixels_sha256"], drawn, image)


def with_host(request: dict[str, Any], host: str) -> dict[str, Any]:
    """Return a request of a demo with its LoRAs at another server, by URL."""
    loras = []
    for lora in request.get("loras", []):
        address = lora["file"].get("url") or lora["file"]["cozy_ref"]
        name = address.rpartition("/")[2].removesuffix(".safetensors")
        file = {**lora["file"], "url": f"http://{host}/{name}.safetensors"}
        file.pop("cozy_ref", None)
        loras.append({**lora, "file": file})
    return {**request, "loras": loras}


def compare_variables(checks: Checks, old: Version, new: Version) -> None:
    """Require the old environment variables in the new code."""
    with checks.check("environment variables in the code"):
        seen = [
            sorted(
                {
                    name
                    for folder in ("producer", "worker")
                    for path in (version.root / folder).rglob("*.py")
                    for name in _CODE.findall(path.read_text())
                }
            )
            for version in (old, new)
        ]
        expect(set(seen[0]) <= set(seen[1]), set(seen[0]) - set(seen[1]))


def compare_help(checks: Checks, scene: Scene, old: Version, new: Version) -> None:
    """Require the old commands, options, arguments and choices in the new help texts."""
    waiting: list[list[str]] = [[]]
    while waiting:
        command = waiting.pop(0)
        texts = [
            version.zlora(*command, "--help", environ={"COLUMNS": "200"}, cwd=scene.folder).out
            for version in (old, new)
        ]
        with checks.check(f"zlora {' '.join(command)} --help: usage, options and commands"):
            seen = [lines_of(text) for text in texts]
            for part, lines in seen[0].items():
                found = [words_in(line) for line in seen[1][part]]
                missing = [line for line in lines if not any(map(words_in(line).issubset, found))]
                expect(not missing, missing)
        waiting += [[*command, name] for name in lines_of(texts[0])["commands"]]


def words_in(line: str) -> set[str]:
    """Return the words of a line of a help text, such as the choices of `[a|b]`."""
    return set(re.findall(r"[^\s|\[\]]+", line))


def lines_of(text: str) -> dict[str, list[str]]:
    """Return the usage, the options and the commands of a help text, without its sentences."""
    _, _, commands = text.partition("\nCommands:\n")
    options = text.partition("\nOptions:\n")[2].partition("\nCommands:\n")[0]
    usage = [line for line in text.splitlines() if line.startswith("Usage:")]
    first_words = r"^  (-.*?)(?:  .*)?$"
    return {
        "usage": usage,
        "options": re.findall(first_words, options, re.MULTILINE),
        "commands": re.findall(r"^  ([a-z]+) ", commands, re.MULTILINE),
    }


def metrics_at(url: str) -> dict[str, Any]:
    """Return types and label names of the metrics at a URL; empty if nothing answers."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - a server of ours
            text = answer.read().decode()
    except OSError:
        return {}
    return {
        sample.name: [family.type, sorted(sample.labels)]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def metadata_of(path: Path) -> dict[str, Any]:
    """Return the metadata in an image file."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        exif = {str(tag): str(value) for tag, value in image.getexif().items()}
        texts = {
            str(name): value.decode() if isinstance(value, bytes) else str(value)
            for name, value in image.info.items()
            if name != "exif"
        }
    # The order of the fields in a JSON document does not matter; XMP has one between two tags.
    documents = {
        name: [decoded(html.unescape(part)) or part for part in re.split("</?zlora:recipe>", text)]
        for name, text in texts.items()
    }
    return {"exif": exif, "texts": documents}


def decoded(text: str) -> Any:
    """Return the JSON in a command's output, or None."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def facts_of(value: Any) -> Any:
    """Return JSON data without sentences, times, and URLs, which differ between directions."""
    if isinstance(value, dict):
        return {
            name: facts_of(item)
            for name, item in sorted(value.items())
            if name not in _VOLATILE and not (name in _SENTENCES and isinstance(item, str))
        }
    if isinstance(value, list):
        return [facts_of(item) for item in value]
    return value


def require_kept(old: Any, new: Any) -> None:
    """Raise `AssertionError` unless the new document has all of the old one."""
    kept = kept_of(old, new)
    expect(kept == old, first_difference(old, kept))


def kept_of(old: Any, new: Any) -> Any:
    """Return the new document without the fields, and the choices, that the old one lacks."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {
            name: [choice for choice in new[name] if choice in item]
            if name in _CHOICES
            else kept_of(item, new[name])
            for name, item in old.items()
            if name in new
        }
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [kept_of(*pair) for pair in zip(old, new, strict=True)]
    return new


def first_difference(one: Any, other: Any, place: str = "$") -> str:
    """Return the place of the first difference between two documents, and both values there."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name):
                return first_difference(one.get(name), other.get(name), f"{place}.{name}")
    if isinstance(one, Sequence) and isinstance(other, Sequence) and not isinstance(one, str):
        for index, pair in enumerate(zip(one, other, strict=False)):
            if pair[0] != pair[1]:
                return first_difference(*pair, f"{place}[{index}]")
    return f"{place}: {one!r} and {other!r}"


if __name__ == "__main__":
    sys.exit(main())
