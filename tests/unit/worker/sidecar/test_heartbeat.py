"""Signs of life of a sidecar: they go on while its threads work, and end with one that hangs."""

import os
import subprocess
import sys
from contextlib import closing
from typing import Final

from zlora_worker.sidecar.heartbeat import EXIT_HANGS

FULL: Final = 65_536  # bytes, the room of a pipe
HANGS: Final = """
import sys, time
from zlora_worker.sidecar.heartbeat import Heartbeat
heartbeat = Heartbeat(int(sys.argv[1]))
works, hangs = heartbeat.part("one", seconds=1), heartbeat.part("the other", seconds=1)
heartbeat.start()
while True:
    works()
    time.sleep(0.1)
"""
WORKS: Final = HANGS.replace("works()", "works(), hangs()")


def run(code: str) -> "tuple[subprocess.Popen[bytes], int]":
    """Run a process that has a heartbeat; return the process and the reading end of the pipe."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    os.write(writing, b"x" * FULL)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(writing)], pass_fds=[writing], stderr=subprocess.PIPE
    )
    os.close(writing)
    return process, reading


def test_a_process_with_a_thread_that_hangs_names_the_thread_and_ends() -> None:
    process, reading = run(HANGS)
    try:
        assert process.wait(60) == EXIT_HANGS
        assert process.stderr is not None
        with closing(process.stderr):
            assert b"the other hangs" in process.stderr.read()
    finally:
        os.close(reading)


def test_a_process_whose_threads_work_beats_each_second_after_a_full_pipe() -> None:
    """The pipe is full when the process starts, as after a parent that stood still for a day."""
    process, reading = run(WORKS)
    try:
        beats = -FULL
        while beats < 3:  # more seconds than a thread may be silent
            beats += len(os.read(reading, FULL))
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
        os.close(reading)
