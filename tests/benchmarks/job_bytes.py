"""Bytes of a job in Redis, by its LoRAs and its prompt: a part of `make bench-scale`."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import redis
from benchmarks.fetch import serving_files
from support.figures import Tally
from support.processes import wait_until
from support.scene import Scene, request
from support.servers import lora_bytes
from support.valkey import Valkey
from zlora import JobHandle
from zlora.broker.keys import job_key

RESULT: Final = "celery-task-meta-"
LORAS: Final = 8
SIGNED: Final = 500  # characters of a signed URL
LONG_PROMPT: Final = 10_000  # characters
ACCOUNTED: Final = 1.5  # seconds until the server has counted its clients' buffers again
WAITED: Final = 300.0  # seconds for a result

Found = dict[str, float]


@contextmanager
def scene(folder: Path, valkey: Valkey, **variables: str) -> Iterator[Scene]:
    """Yield a queue on an empty Redis, without the witness of the fault tests."""
    with valkey.client() as broker:
        broker.flushall()
    made = Scene(folder, Tally(), broker_url=valkey.url, queue="gpu", **variables)
    made.witness.close()
    try:
        yield made
    finally:
        made.close()


def shapes(folder: Path, valkey: Valkey, broker: "redis.Redis", jobs: int) -> Found:
    """Measure jobs of each shape while queued, and then drawn."""
    served = folder / "served"
    served.mkdir(parents=True)
    for index in range(LORAS):
        (served / f"style-{index}").write_bytes(lora_bytes(index))
    found: Found = {}
    with (
        serving_files(served) as host,
        scene(folder / "scene", valkey, ZLORA_ALLOW_HOSTS=host) as made,
    ):
        made.client.submit(request("first"))  # leaves scripts and connections out
        queued: dict[str, list[JobHandle]] = {}
        for shape, document in documents(host).items():
            queued[shape], sizes = queue(made, broker, document, jobs)
            found |= {f"bytes, {shape}: {what}": value for what, value in sizes.items()}
        with made.worker():
            for handles in queued.values():
                for handle in handles:
                    handle.result(timeout=WAITED)
            made.wait_settled()
        for shape, handles in queued.items():
            found |= {
                f"bytes, {shape}: {what}": value
                for what, value in ended(made, broker, handles).items()
            }
    return found


def documents(host: str) -> dict[str, dict[str, Any]]:
    """Return requests by shape.

    The file server takes what follows the last slash of an address for the name of a file.
    """
    plain = {"prompt": "a portrait in anime style, soft light", "num_inference_steps": 1}

    def loras(count: int, characters: int) -> list[dict[str, Any]]:
        addresses = [f"http://{host}/loras?signature={{}}/style-{index}" for index in range(count)]
        filled = [address.format("x" * (characters - len(address) + 2)) for address in addresses]
        return [
            {"file": {"url": url}, "weight": 0.8, "adapter_name": f"style-{at}"}
            for at, url in enumerate(filled)
        ]

    return {
        "no LoRA": plain,
        "2 LoRAs": plain | {"loras": loras(2, 80)},
        f"{LORAS} LoRAs, signed": plain | {"loras": loras(LORAS, SIGNED)},
        "a prompt of 10,000": plain | {"prompt": "a house " * (LONG_PROMPT // 8)},
    }


def queue(
    made: Scene, broker: "redis.Redis", document: dict[str, Any], jobs: int
) -> tuple[list[JobHandle], dict[str, float]]:
    """Queue jobs, and return them with the bytes of one."""
    before, logged = memory(broker), log_bytes(broker)
    handles = [made.client.submit(document) for _ in range(jobs)]
    took, wrote = memory(broker) - before, log_bytes(broker) - logged
    (name,) = made.queue_lists()
    messages: Any = broker.lrange(name, 0, jobs - 1)  # the newest are the first
    return handles, {
        "its message": statistics.mean(len(message.encode()) for message in messages),
        "its record, queued": statistics.mean(
            usage(broker, job_key(handle.id)) for handle in handles
        ),
        "all memory, queued": took / jobs,
        "append-only file, submitted": wrote / jobs,
    }


def ended(made: Scene, broker: "redis.Redis", handles: list[JobHandle]) -> dict[str, float]:
    """Return bytes of an ended job, as memory that its deletion frees, and their time to live."""
    answers = [f"{RESULT}{handle.id}" for handle in handles]
    records = [job_key(handle.id) for handle in handles]
    document = statistics.mean(int(broker.strlen(name)) for name in answers)
    manifest = statistics.mean(
        (made.run_folder(handle) / "manifest.json").stat().st_size for handle in handles
    )
    hours = [max(int(broker.ttl(name)) for name in names) / 3600 for names in (answers, records)]
    return {
        "its answer": document,
        "its manifest, in the store": manifest,
        "memory of the answer": freed(broker, answers),
        "memory of the record, ended": freed(broker, records),
        "hours that these stay": max(hours),
    }


def memory(broker: "redis.Redis") -> int:
    """Return bytes of the server's data, without buffers of clients."""
    time.sleep(ACCOUNTED)
    info: Any = broker.info("memory")
    return int(info["used_memory"]) - int(info["mem_clients_normal"]) - int(info["mem_aof_buffer"])


def log_bytes(broker: "redis.Redis") -> int:
    """Return bytes of the append-only file."""
    info: Any = broker.info("persistence")
    return int(info["aof_current_size"])


def usage(broker: "redis.Redis", name: str) -> int:
    """Return bytes of one key's memory."""
    size: Any = broker.memory_usage(name, samples=0)
    return int(size)


def freed(broker: "redis.Redis", names: list[str]) -> float:
    """Return bytes of memory that the deletion of a key frees."""
    before = memory(broker)
    broker.delete(*names)
    info: Any = broker.info
    wait_until(lambda: not info("memory")["lazyfree_pending_objects"], "the memory is freed")
    return (before - memory(broker)) / len(names)
