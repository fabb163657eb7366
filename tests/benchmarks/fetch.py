"""The time until a LoRA is a checked file on disk: downloaded, found in the cache, and prefetched.

- A download of 200 MB that is hashed, checked and kept, against `curl` and then `sha256sum`, from
  another process.
- A cached file, found by its checksum or by its address, against an open and a read of one byte.
- The wait for the LoRA in a stream of jobs of one second, each with another LoRA from a server that
  answers after 300 ms, with prefetch off and on.

`--thin` takes 3 downloads, 50 hits and 8 jobs instead of 15, 500 and 30.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks.report import Row, announce, compare, options_parser, progress, publish
from support.figures import Tally
from support.scene import Scene
from support.servers import lora_bytes, settings, tensor_file
from support.valkey import Valkey
from zlora.schema import Asset
from zlora_worker.fetch.cache import Cache

SIZE: Final = 200 * 10**6  # bytes
PIECE: Final = 10**6  # bytes written at once
RATE: Final = 0.8  # share of the throughput of curl and sha256sum
HIT: Final = 0.002  # seconds
DELAY: Final = 0.3  # seconds until the server answers in the stream
STEPS: Final = 10  # of a tenth of a second each
SHARE: Final = 0.1  # of the wait without prefetch


class Rounds(NamedTuple):
    """How often each action is repeated."""

    downloads: int
    hits: int
    jobs: int
    seconds: float  # that the benchmark takes, about


FULL: Final = Rounds(downloads=15, hits=500, jobs=30, seconds=180)
THIN: Final = Rounds(downloads=3, hits=50, jobs=8, seconds=50)


def main(rounds: Rounds) -> None:
    """Measure and publish."""
    announce("fetch", seconds=rounds.seconds)
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as name:
        folder = Path(name)
        served = folder / "served"
        served.mkdir()
        write_large(served / "large")
        for index in range(rounds.jobs):
            (served / f"small-{index}").write_bytes(lora_bytes(index, size=100_000))
        with serving_files(served) as host:
            rows = [
                download_row(folder, host, rounds.downloads),
                *hit_rows(folder, host, rounds.hits),
            ]
        with serving_files(served, delay=DELAY) as host:
            rows.append(stream_row(folder, host, rounds.jobs))
    publish("fetch", rows)


def write_large(path: Path) -> None:
    """Write a valid file of one tensor."""
    entry = {"dtype": "F16", "shape": [SIZE // 2], "data_offsets": [0, SIZE]}
    with path.open("wb") as file:
        file.write(tensor_file({"unet.to_q.lora_A.weight": entry}))
        for index in range(SIZE // PIECE):
            file.write(bytes([index % 256]) * PIECE)


@contextmanager
def serving_files(folder: Path, *, delay: float = 0.0) -> Iterator[str]:
    """Yield `host:port` of a server in another process."""
    command = [sys.executable, "-P", "-m", "benchmarks.file_server", str(folder), str(delay)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield f"127.0.0.1:{next(iter(server.stdout or ())).strip()}"
        finally:
            server.terminate()


# Downloads


def download_row(folder: Path, host: str, rounds: int) -> Row:
    """Alternate the two on the same file, each time into a new folder; ours twice for the noise."""
    by_curl(folder, host), by_cache(folder, host)
    theirs, ours, again = [], [], []
    for index in range(rounds):
        ours.append(by_cache(folder, host))
        theirs.append(by_curl(folder, host))
        again.append(by_cache(folder, host))
        progress(f"{index + 1}/{rounds} downloads")
    row = compare(
        f"seconds of {SIZE // 10**6} MB, fetched and hashed",
        "curl, then sha256sum",
        theirs,
        ours,
        again,
    )
    row.goal, row.met = f">= {RATE:g}", row.ratio >= RATE
    return row


def by_curl(folder: Path, host: str) -> float:
    """Return seconds of the two programs."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        file = Path(name, "file")
        start = time.perf_counter()
        subprocess.run(["curl", "-s", "-o", str(file), f"http://{host}/large"], check=True)
        subprocess.run(["sha256sum", str(file)], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


def by_cache(folder: Path, host: str) -> float:
    """Return seconds of the cache, which also checks the header and keeps the file."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        cache = cache_of(Path(name), host)
        start = time.perf_counter()
        with cache.files([Asset(url=f"http://{host}/large")]) as (file,):
            seconds = time.perf_counter() - start
            assert file.tier == "network"
        return seconds


def cache_of(folder: Path, host: str) -> Cache:
    """Open the cache as a worker does."""
    return Cache.open(settings(folder, ZLORA_ALLOW_HOSTS=host))


# Hits


def hit_rows(folder: Path, host: str, rounds: int) -> list[Row]:
    """Compare hits by address, revalidated since the job was submitted, and by checksum."""
    cache, since = cache_of(folder / "hits", host), time.time()
    asset = Asset(url=f"http://{host}/large")
    with cache.files([asset]) as (file,):
        path, pinned = file.path, Asset(url=asset.url, sha256=file.sha256)
    rows = []
    for name, wanted in (("its address", asset), ("its sha256", pinned)):
        bare, ours, again = [], [], []
        for _ in range(rounds):
            ours.append(hit(cache, wanted, since))
            bare.append(opened(path))
            again.append(hit(cache, wanted, since))
        rows.append(hit_row(f"ms of a cached file, by {name} (not a ratio)", bare, ours, again))
    return rows


def hit(cache: Cache, asset: Asset, since: float) -> float:
    """Return seconds until a cached file may be read."""
    start = time.perf_counter()
    with cache.files([asset], since=since) as (file,):
        seconds = time.perf_counter() - start
        assert file.tier == "disk"
    return seconds


def opened(path: Path) -> float:
    """Return seconds until a byte of a file is read."""
    start = time.perf_counter()
    with path.open("rb") as file:
        file.read(1)
    return time.perf_counter() - start


def hit_row(name: str, bare: Sequence[float], ours: Sequence[float], again: Sequence[float]) -> Row:
    """Return what the cache adds at the median; milliseconds instead of a ratio."""
    base, median, median_again = (statistics.median(times) for times in (bare, ours, again))
    added = median - base
    return Row(
        name=name,
        rival="open, and read a byte",
        rival_median=base,
        ours_median=median,
        ratio=1000 * added,
        noise=median_again / median,
        goal=f"<= {1000 * HIT:g}",
        met=added <= HIT,
    )


# The stream


def stream_row(folder: Path, host: str, jobs: int) -> Row:
    """Return the share of the wait that prefetch leaves; prefetch twice for the noise."""
    (folder / "valkey").mkdir()
    with Valkey(folder / "valkey", Tally()) as valkey:
        off, on, again = (
            waits(folder / f"stream-{name}", valkey.url, host, jobs, look_ahead=look_ahead)
            for name, look_ahead in (("off", "0"), ("on", "4"), ("again", "4"))
        )
    median_off, median_on, median_again = (statistics.median(times) for times in (off, on, again))
    return Row(
        name="share of the wait for a LoRA that prefetch leaves",
        rival="no prefetch",
        rival_median=median_off,
        ours_median=median_on,
        ratio=median_on / median_off,
        noise=median_again / median_on,
        goal=f"<= {SHARE:g}",
        met=median_on <= SHARE * median_off,
    )


def waits(folder: Path, broker_url: str, host: str, jobs: int, *, look_ahead: str) -> list[float]:
    """Return the seconds that each job waits for its LoRA, from the timings of its result.

    The fake model takes one second per job, which paces the stream; all jobs are queued at the
    start, so that there is always a next one. The first job always waits.
    """
    variables = {"ZLORA_ALLOW_HOSTS": host, "ZLORA_LOOK_AHEAD": look_ahead}
    scene = Scene(folder, Tally(), broker_url=broker_url, queue=folder.name, **variables)
    try:
        with scene.worker():
            loras = [
                {"loras": [{"file": {"url": f"http://{host}/small-{index}"}}]}
                for index in range(jobs)
            ]
            handles = [scene.submit(steps=STEPS, step=1 / STEPS, fields=fields) for fields in loras]
            found = []
            for index, handle in enumerate(handles):
                found.append(handle.result(timeout=60 + 2 * jobs).timings["fetch"])
                progress(f"{index + 1}/{jobs} jobs, ZLORA_LOOK_AHEAD={look_ahead}")
            return found
    finally:
        scene.close()


if __name__ == "__main__":
    main(THIN if options_parser(__doc__).parse_args().thin else FULL)
