"""Jobs with LoRAs of a catalogue: the same images as by address, and LoRAs that stay in memory."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.fakes import MemoryStore, a_request, kohya_lora, settings, write
from support.jobs import lora_cache, make_child, run_job
from zlora.errors import InvalidSetting, LoraNotFound
from zlora.lora.catalogue import Catalogue, CatalogueRow
from zlora.schema import Asset, GenerateResult, LoraSpec
from zlora_worker.child import Child
from zlora_worker.lora_in_use import hold_pinned
from zlora_worker.model.pipeline import Pipeline

Worker = Callable[..., Child]


@pytest.fixture
def worker(model: Pipeline, model_home: Path, tmp_path: Path) -> Worker:
    """Return a function that starts a child with three LoRAs, of which some are pinned."""

    def start(*pinned: str, memory: int = 10**9) -> Child:
        variables = lora_cache(tmp_path / "loras")
        rows = {}
        for number, name in enumerate(("one", "two", "three")):
            tensors = {key: tensor * (1 + number) for key, tensor in kohya_lora().items()}
            file = write(tmp_path / f"{name}.safetensors", tensors)
            rows[name] = CatalogueRow(
                source=file.as_uri(),
                sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
                weight=0.5,
                trigger_words=(f"{name} style",),
                pinned=name in pinned,
            )
        made = settings(model_home, **variables, ZLORA_LORA_ROOTS=str(tmp_path))
        return make_child(model, MemoryStore(), made, lora_memory=memory, catalogue=Catalogue(rows))

    return start


def by_name(name: str, **fields: object) -> LoraSpec:
    return LoraSpec(file=Asset(ref=f"lora://{name}"), **fields)  # type: ignore[arg-type]


def pixels_of(result: GenerateResult) -> list[str | None]:
    return [image.pixels_sha256 for image in result.images]


def test_a_name_draws_what_its_address_draws(worker: Worker, tmp_path: Path) -> None:
    """The receipt has the name, and the request of the result draws it again without it."""
    child = worker()
    plain = run_job(child, "plain", a_request(seed=7))
    file = Asset(url=(tmp_path / "one.safetensors").as_uri())
    spelled = a_request(seed=7, loras=(LoraSpec(file=file, weight=0.5),))

    named = run_job(child, "named", a_request(seed=7, loras=(by_name("one"),)))

    (receipt,) = named.loras
    assert pixels_of(named) == pixels_of(run_job(child, "spelled", spelled)) != pixels_of(plain)
    assert (receipt.catalogue, receipt.adapter_name) == ("one", "one")
    assert receipt.unet_weight == receipt.text_encoder_weight == 0.5
    assert receipt.trigger_words == ("one style",)
    assert named.request is not None
    assert named.request.loras[0].file.address == file.address
    again = run_job(replace(child, catalogue=Catalogue()), "again", named.request)
    assert pixels_of(again) == pixels_of(named)
    assert pixels_of(run_job(child, "after", a_request(seed=7))) == pixels_of(plain)


def test_trigger_words_are_added_if_the_request_says_so(worker: Worker) -> None:
    """The next job without them has the image that it had before."""
    child, loras = worker(), (by_name("one"), by_name("two", weight=0.0))
    listed = run_job(child, "listed", a_request(seed=7, loras=loras))
    written = a_request(seed=7, loras=loras, prompt="a city at night, one style")

    added = run_job(child, "added", a_request(seed=7, loras=loras, trigger_words="add"))

    assert pixels_of(added) == pixels_of(run_job(child, "written", written)) != pixels_of(listed)
    assert added.request is not None
    assert (added.request.prompt, added.request.trigger_words) == (written.prompt, "list")
    assert [receipt.trigger_words for receipt in listed.loras] == [("one style",), ("two style",)]
    again = run_job(child, "again", a_request(seed=7, loras=loras))
    assert pixels_of(again) == pixels_of(listed)


def test_a_tag_in_the_prompt_draws_what_the_list_of_loras_draws(worker: Worker) -> None:
    """Weights of text encoders and UNet are those of the web UI; the record has no tag."""
    child = worker()
    spec = by_name("one", text_encoder_weight=0.25, unet_weight=0.75)
    request = a_request(seed=7, prompt="a (city:1.2)", prompt_syntax="a1111", loras=(spec,))
    tagged = a_request(seed=7, prompt="a (city:1.2) <lora:one:0.25:0.75>", prompt_syntax="a1111")
    expected = run_job(child, "listed", request)

    result = run_job(child, "tagged", tagged)

    assert pixels_of(result) == pixels_of(expected)
    assert (result.loras[0].text_encoder_weight, result.loras[0].unet_weight) == (0.25, 0.75)
    assert result.request is not None
    assert result.request.prompt == "a (city:1.2)"
    assert pixels_of(run_job(child, "again", result.request)) == pixels_of(expected)


def test_words_that_are_asked_for_and_not_known_are_a_warning(
    worker: Worker, tmp_path: Path
) -> None:
    child = worker()
    file = Asset(url=(tmp_path / "two.safetensors").as_uri())

    result = run_job(child, "unknown", a_request(loras=(LoraSpec(file=file),), trigger_words="add"))

    assert "trigger_words: none are added" in result.loras[0].warnings[0]


def test_an_unknown_name_fails_the_job(worker: Worker) -> None:
    with pytest.raises(LoraNotFound, match="the nearest names: one"):
        run_job(worker(), "unknown", a_request(loras=(by_name("on"),)))


def test_a_pinned_lora_stays_in_memory_and_on_disk(worker: Worker) -> None:
    """Others are evicted for each other; the file of the pinned one is held by the process."""
    child = worker("one")
    hold_pinned(child)
    size = child.loras.nbytes
    child = worker("one", memory=2 * size)
    hold_pinned(child)

    for name in ("two", "three", "two", "three"):
        run_job(child, name, a_request(loras=(by_name(name),)))
    child.lora_files.budget.prune(max_bytes=0, older_than=0.0)
    result = run_job(child, "one", a_request(loras=(by_name("one"),)))

    assert result.loras[0].tier == "memory"
    assert child.loras.nbytes == 2 * size


def test_pins_beyond_memory_are_refused_at_the_start(worker: Worker) -> None:
    child = worker("one", "two")
    hold_pinned(child)
    room = child.loras.nbytes

    hold_pinned(worker("one", "two", memory=room))
    with pytest.raises(InvalidSetting, match=r"the pinned LoRA two has .* leaves no room"):
        hold_pinned(worker("one", "two", memory=room - 1))


def test_a_pinned_lora_that_cannot_be_had_is_refused_at_the_start(
    worker: Worker, tmp_path: Path
) -> None:
    child = worker("three")
    shutil.rmtree(tmp_path / "loras" / "files")
    (tmp_path / "three.safetensors").unlink()

    with pytest.raises(InvalidSetting, match=r"the pinned LoRA three: .*no such file"):
        hold_pinned(child)
