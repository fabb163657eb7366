"""A worker whose catalogue of LoRAs cannot be kept does not start, and says why."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from support.scene import Scene
from support.servers import lora_bytes
from zlora.errors import LoraNotAllowed

Variables = dict[str, str]


@pytest.fixture
def catalogue(tmp_path: Path) -> Callable[[str], Variables]:
    """Return a function that writes a catalogue of two pinned LoRAs, and more."""
    text = ""
    for number, name in enumerate(("one", "two")):
        data = lora_bytes(number + 1)
        source = tmp_path / f"{name}.safetensors"
        source.write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        text += f"[loras.{name}]\nsource = '{source.as_uri()}'\nsha256 = '{sha256}'\n"
        text += "weight = 0.5\npinned = true\n"

    def write(more: str) -> Variables:
        file = tmp_path / "loras.toml"
        file.write_text(text + more)
        return {"ZLORA_CATALOGUE": str(file), "ZLORA_LORA_ROOTS": str(tmp_path)}

    return write


def test_a_closed_catalogue_serves_its_loras_from_memory_and_no_others(
    scene: Scene, catalogue: Callable[[str], Variables], tmp_path: Path
) -> None:
    other = (tmp_path / "other.safetensors").as_uri()
    with scene.worker(**catalogue(""), ZLORA_LORAS="catalogue"):
        named = scene.submit(fields={"loras": [{"file": {"ref": "two"}}]})
        refused = scene.submit(fields={"loras": [{"file": {"url": other}}]})

        (receipt,) = named.result(timeout=60).loras
        with pytest.raises(LoraNotAllowed, match="serves the LoRAs of its catalogue only"):
            refused.result(timeout=60)
    assert (receipt.catalogue, receipt.tier, receipt.unet_weight) == ("two", "memory", 0.5)
    assert len(scene.events("parsed")) == 2


def test_a_worker_with_a_wrong_catalogue_ends_before_it_loads_a_model(
    scene: Scene, catalogue: Callable[[str], Variables]
) -> None:
    circle = catalogue("[loras.a]\nsource = 'lora://a'\n")
    with scene.starting_worker(**circle) as failing:
        assert failing.process.wait(60) == 1

    assert len(failing.lines("loras.toml: a: its source leads back to itself: a -> a")) == 1
    assert not failing.lines("Traceback")
    assert not scene.events("loading")


def test_a_worker_without_memory_for_its_pinned_loras_ends_and_says_which(
    scene: Scene, catalogue: Callable[[str], Variables]
) -> None:
    with scene.starting_worker(**catalogue(""), ZLORA_LORA_MEMORY_BYTES="1") as failing:
        assert failing.process.wait(60) == 70

    (line,) = failing.lines("CRITICAL")
    assert "ZLORA_CATALOGUE: the pinned LoRA two has 1 bytes, and" in line
    assert not failing.lines("Traceback")
