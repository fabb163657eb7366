"""`zlora up` whose broker dies in the middle of a job."""

import subprocess
import sys
from pathlib import Path

import msgspec
from support.processes import clean_environ, wait_until
from support.scene import Scene, request
from zlora import Client, config


def test_a_stack_without_its_broker_ends_soon(scene: Scene) -> None:
    """The worker could wait for the broker for ever, and has a minute if the broker lives."""
    environ = clean_environ(scene.environ)
    del environ["ZLORA_BROKER_URL"]
    home = Path(environ["ZLORA_HOME"])
    command = [str(Path(sys.executable).with_name("zlora")), "up"]
    screen = scene.folder / "screen"
    with screen.open("wb") as output:
        stack = subprocess.Popen(command, env=environ, stdout=output, stderr=output)
    try:
        wait_until(lambda: config.recorded_broker(home), "the broker is recorded")
        with Client.from_env(environ) as client:
            job = client.submit(request("j", steps=200, step=0.5), job_id="j")
            scene.wait_begun(job)
        record = msgspec.json.decode(config.broker_record(home).read_bytes())
        scene.kill(record["pid"])
        assert stack.wait(30) == 69
    finally:
        stack.kill()
        stack.wait()

    assert "the broker has ended" in screen.read_text()
