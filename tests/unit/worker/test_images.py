"""Jobs that start from an image, and masks, on the tiny model; diffusers is the oracle."""

import dataclasses
import gc
import hashlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline
from PIL import Image, ImageFilter
from support.fakes import (
    MemoryStore,
    a_request,
    kohya_lora,
    load_pipeline,
    pixels,
    require_same,
    settings,
    upcast_vae,
    write,
)
from support.image_files import SIZE, converted, file_of, half_mask, hostile, picture
from support.jobs import Watch, lora_cache, make_child, run_job
from support.servers import Request, reply, serving, watched_connections
from zlora.errors import (
    InvalidRequest,
    JobRevoked,
    LoraCorrupt,
    LoraError,
    LoraNotAllowed,
    LoraNotFound,
    LoraTooLarge,
)
from zlora.schema import Asset, GenerateRequest, GenerateResult, LoraSpec, Phase, Upscale
from zlora_worker.child import Child
from zlora_worker.image_in_use import ImageInUse, read_files
from zlora_worker.model import vae
from zlora_worker.model.pipeline import Pipeline, PipelineState
from zlora_worker.model.schedulers import scheduler_for
from zlora_worker.model.starting_image import StartingImage
from zlora_worker.results.manifest import write_verdict

STEPS: Final = 4


def drawn(
    child: Child, job_id: str, watch: Watch = lambda *_: None, **fields: Any
) -> tuple[GenerateResult, bytes]:
    """Run a job; return its result, and the RGB bytes of its first image."""
    small: dict[str, Any] = {"seed": 7, "num_inference_steps": STEPS}
    result = run_job(child, job_id, a_request(**small | fields), watch)
    with Image.open(io.BytesIO(child.store.get(result.images[0].key) or b"")) as image:
        return result, image.convert("RGB").tobytes()


def by_diffusers(
    model: Pipeline, start: Image.Image, mask: Image.Image | None, **fields: Any
) -> torch.Tensor:
    """Draw with diffusers' own pipeline over the components in memory."""
    request = a_request(**{"num_inference_steps": STEPS} | fields)
    options: dict[str, Any] = {"image": start}
    cls: Any = StableDiffusionXLImg2ImgPipeline
    if mask is not None:
        cls = StableDiffusionXLInpaintPipeline
        options |= {"mask_image": mask, "width": start.width, "height": start.height}
    drawing = cls(**model.pipeline.components, add_watermarker=False)
    drawing.set_progress_bar_config(disable=True)
    drawing.scheduler = scheduler_for(model.base.scheduler, request, seed=7)
    output = drawing(
        prompt=request.prompt,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        strength=request.image_strength,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
        **options,
    )
    image: torch.Tensor = output.images[0]
    return image


def rounded(image: torch.Tensor) -> bytes:
    """Return the RGB bytes of an image."""
    return vae.rgb(image).numpy().tobytes()


def require_plain(child: Child, plain: bytes) -> None:
    """Raise `AssertionError` unless the next job without an image is what it was before."""
    assert child.model.state is PipelineState.READY
    assert pixels(child.model) == plain


# --- what is drawn


@pytest.mark.parametrize("scheduler", ["euler_ancestral", "heun"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_images_are_those_of_diffusers(
    child: Child, cached: Callable[[bytes], Asset], scheduler: str, with_mask: bool
) -> None:
    """Byte for byte: a scheduler that adds noise, and one that takes two calls a step."""
    start, mask = picture(), half_mask() if with_mask else None
    fields: dict[str, Any] = {"image": cached(file_of(start)), "strength": 0.6}
    if mask:
        fields["mask"] = cached(file_of(mask))

    _, image = drawn(child, "job", scheduler=scheduler, **fields)

    expected = by_diffusers(child.model, start, mask, scheduler=scheduler, strength=0.6)
    assert image == rounded(expected)


def test_values_before_rounding_are_those_of_diffusers(
    child: Child, cached: Callable[[bytes], Asset], seen: list[torch.Tensor]
) -> None:
    """The greatest difference in fp32 is 0."""
    start, mask = picture(), half_mask()

    drawn(child, "job", image=cached(file_of(start)), mask=cached(file_of(mask)))

    require_same(seen[0], by_diffusers(child.model, start, mask))


def test_a_soft_mask_is_that_of_diffusers_and_keeps_the_image_beyond_it(
    child: Child, cached: Callable[[bytes], Asset]
) -> None:
    """diffusers draws with the blurred mask, and lays the image over what it has drawn."""
    start, mask = picture(), half_mask().filter(ImageFilter.GaussianBlur(4))
    fields: dict[str, Any] = {"image": cached(file_of(start)), "mask": cached(file_of(half_mask()))}

    _, image = drawn(child, "job", **fields, mask_blur=4)

    made = Image.frombytes("RGB", SIZE, rounded(by_diffusers(child.model, start, mask)))
    processor = child.model.pipeline.image_processor
    assert image == processor.apply_overlay(mask, start, made).tobytes()
    right = (52, 0, *SIZE)
    found = Image.frombytes("RGB", SIZE, image)
    assert found.crop(right).tobytes() == start.crop(right).tobytes()


@pytest.mark.parametrize("mask", [None, half_mask()])
def test_no_weight_is_copied(
    child: Child, cached: Callable[[bytes], Asset], mask: Image.Image | None
) -> None:
    """Bytes of all weights in this process, and their places, while an image is drawn."""
    found = []
    fields: dict[str, Any] = {"image": cached(file_of(picture()))}
    if mask:
        fields["mask"] = cached(file_of(mask))
    assert (before := weights_in_memory())

    drawn(child, "job", lambda *_: found.append(weights_in_memory()), **fields)

    assert all(places == before for places in found)


def weights_in_memory() -> dict[int, int]:
    """Return the bytes of each weight of this process by its place in memory."""
    # Not `isinstance`, which also holds for what a compiler has traced: it has no memory.
    weights = [each for each in gc.get_objects() if type(each) is torch.nn.Parameter]
    return {each.data_ptr(): each.untyped_storage().nbytes() for each in weights}


def test_each_field_changes_the_image_and_the_next_job_is_plain(
    child: Child, plain: bytes, cached: Callable[[bytes], Asset], tmp_path: Path
) -> None:
    image, mask = cached(file_of(picture())), cached(file_of(half_mask()))
    jobs: list[dict[str, Any]] = [
        {"width": SIZE[0], "height": SIZE[1]},
        {"image": image},
        {"image": cached(file_of(picture(seed=2)))},
        {"image": image, "strength": 0.5},
        {"image": image, "strength": 0.5, "width": 72},
        {"image": image, "mask": mask},
        {"image": image, "mask": mask, "mask_invert": True},
        {"image": image, "mask": mask, "mask_blur": 8},
        {"image": image, "mask": mask, "strength": 0.5},
        {"image": image, "loras": (LoraSpec(file=cached(lora_file(tmp_path))),)},
    ]

    images = [drawn(child, f"job-{index}", **fields)[1] for index, fields in enumerate(jobs)]

    assert len(set(images)) == len(jobs)
    require_plain(child, plain)


def lora_file(folder: Path) -> bytes:
    return write(folder / "lora.safetensors", kohya_lora()).read_bytes()


def test_what_is_black_in_the_mask_stays(
    child: Child, cached: Callable[[bytes], Asset], model: Pipeline
) -> None:
    """Its latents are those of the image: what differs is one pass through the VAE."""
    start = picture()
    fields: dict[str, Any] = {"image": cached(file_of(start)), "mask": cached(file_of(half_mask()))}

    _, image = drawn(child, "job", **fields, strength=1.0)
    _, other = drawn(child, "other", **fields, strength=1.0, seed=8)

    one, two = (np.frombuffer(each, np.uint8).reshape(72, 64, 3) for each in (image, other))
    change = np.abs(one.astype(int) - two)
    assert change[:, :24].mean() > 10 * change[:, 48:].mean()


@pytest.mark.parametrize(
    ("size", "fields", "expected"),
    [
        ((64, 72), {}, (64, 72)),
        ((71, 79), {}, (64, 72)),
        ((128, 96), {"width": 64, "height": 64}, (64, 64)),
        ((128, 96), {"width": 96}, (96, 72)),
        ((96, 128), {"height": 96}, (72, 96)),
    ],
)
def test_the_size_is_the_images_unless_the_request_names_one(
    child: Child,
    cached: Callable[[bytes], Asset],
    size: tuple[int, int],
    fields: dict[str, Any],
    expected: tuple[int, int],
) -> None:
    """The image is resized as diffusers does, and the request in the result has the size."""
    start, steps = picture(size), 2

    result, image = drawn(
        child, "job", image=cached(file_of(start)), num_inference_steps=steps, **fields
    )

    resized = start.resize(expected, Image.Resampling.LANCZOS)
    assert image == rounded(by_diffusers(child.model, resized, None, num_inference_steps=steps))
    assert (result.images[0].width, result.images[0].height) == expected
    assert result.request is not None
    assert (result.request.width, result.request.height) == expected
    assert result.image_receipt is not None
    assert (result.image_receipt.width, result.image_receipt.height) == size


def test_steps_are_counted_as_they_are_drawn(
    child: Child, cached: Callable[[bytes], Asset]
) -> None:
    steps: list[tuple[int, int]] = []

    def watch(phase: Phase, done: int, total: int) -> None:
        if phase is Phase.DENOISE:
            steps.append((done, total))

    image = cached(file_of(picture()))
    drawn(child, "job", watch, image=image, strength=0.5, num_inference_steps=6, num_images=2)

    assert steps == [(done, 6) for done in range(1, 7)]


def test_a_job_that_is_cancelled_at_any_step_leaves_the_base_exact(
    child: Child, plain: bytes, cached: Callable[[bytes], Asset]
) -> None:
    fields: dict[str, Any] = {
        "image": cached(file_of(picture())),
        "mask": cached(file_of(half_mask())),
    }

    for last in range(1, 4):

        def cancel(phase: Phase, done: int, _total: int, last: int = last) -> None:
            if phase is Phase.DENOISE and done == last:
                raise JobRevoked("cancelled")

        with pytest.raises(JobRevoked):
            drawn(child, f"job-{last}", cancel, **fields)
        require_plain(child, plain)


def test_a_redelivery_uses_the_stored_images_and_draws_the_others_alike(
    child: Child, store: MemoryStore, cached: Callable[[bytes], Asset]
) -> None:
    fields: dict[str, Any] = {"num_images": 2, "seed": 7, "num_inference_steps": STEPS}
    fields["image"] = cached(file_of(picture()))
    whole = run_job(child, "job", a_request(**fields))
    first = store.objects[whole.images[0].key]
    store.objects.clear()
    store.objects[whole.images[0].key] = first

    again = run_job(child, "job", a_request(**fields), is_resumed=True)

    assert [each.pixels_sha256 for each in again.images] == [
        each.pixels_sha256 for each in whole.images
    ]
    assert [each.seed for each in again.images] == [7, 8]


@pytest.mark.parametrize("mask", [None, half_mask()])
def test_an_image_of_a_batch_does_not_depend_on_its_company(
    model: Pipeline, mask: Image.Image | None
) -> None:
    """Each has noise of its own, also for the image it starts from."""
    start = StartingImage(picture(), mask)
    request = a_request(image=Asset(url="job:a#0"), num_inference_steps=STEPS)

    def drawn_at_once(*seeds: int) -> list[bytes]:
        made = model.draw(request, seeds, lambda _step: None, start=start)
        return [image.tobytes() for image in made]

    one, two = drawn_at_once(7, 8), drawn_at_once(7, 9)

    assert one[0] == two[0]
    assert len({*one, *two}) == 3


@pytest.mark.parametrize("fields", [{}, {"upscale": Upscale(factor=1.5)}])
def test_previews_show_what_is_drawn_from_an_image(
    model_home: Path, fields: dict[str, Any]
) -> None:
    """By the pipeline that draws it: the resident one has drawn nothing before."""
    model = load_pipeline(model_home)
    request = a_request(
        image=Asset(url="job:a#0"), num_inference_steps=STEPS, previews=True, **fields
    )
    found: list[str | None] = []

    model.draw(
        request,
        [7],
        lambda _step: found.append(model.previews.latest()),
        start=StartingImage(picture()),
    )

    assert len(found) == request.all_steps
    assert all(preview and preview.startswith("data:image/jpeg") for preview in found)


@upcast_vae
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_leaves_the_base_exact(model_home: Path, tmp_path: Path, dtype: str) -> None:
    """The VAE encodes in fp32, and is cast back."""
    variables = {"ZLORA_DTYPE": dtype, "ZLORA_BASE_CHECK": "all"}
    model = load_pipeline(model_home, **variables)
    child = make_child(model, MemoryStore(), settings(model_home, **lora_cache(tmp_path)))
    data = file_of(picture())
    asset = Asset(url="https://files.invalid/a", sha256=hashlib.sha256(data).hexdigest())
    child.lora_files.file(asset.sha256 or "").write_bytes(data)

    fields: dict[str, Any] = {"image": asset, "upscale": Upscale(factor=1.5)}
    result, image = drawn(child, "job", num_inference_steps=2, **fields)
    _, again = drawn(child, "again", num_inference_steps=2, **fields)

    assert result.base_intact
    assert result.base_checked == 1.0
    assert model.pipeline.vae.dtype is getattr(torch, dtype)
    assert image == again


# --- files


def test_receipts_and_the_request_have_the_files_without_secrets(
    child: Child, cached: Callable[[bytes], Asset]
) -> None:
    image, mask = file_of(picture()), file_of(half_mask())

    result, _ = drawn(child, "job", image=cached(image), mask=cached(mask))

    assert result.image_receipt is not None
    assert result.mask_receipt is not None
    assert result.image_receipt.source == "https://files.invalid/a.png"
    assert result.image_receipt.sha256 == hashlib.sha256(image).hexdigest()
    assert result.mask_receipt.size == len(mask)
    assert (result.image_receipt.tier, result.image_receipt.notes) == ("disk", ())
    assert result.request is not None
    assert result.request.image is not None
    assert result.request.image.url == "https://files.invalid/a.png"
    assert result.request.image.sha256 == result.image_receipt.sha256
    assert result.request.strength == 0.75
    assert "pa55" not in repr(result)
    assert "s3cret" not in repr(result)


def test_an_image_is_downloaded_once(model: Pipeline, model_home: Path, tmp_path: Path) -> None:
    data = file_of(picture())
    with serving(reply(data, ETag='"1"')) as host:
        variables = {"ZLORA_ALLOW_HOSTS": host.name, **lora_cache(tmp_path / "loras")}
        child = make_child(model, MemoryStore(), settings(model_home, **variables))
        asset = Asset(url=f"{host.url}/a.png")
        first, image = drawn(child, "one", image=asset)
        second, _ = drawn(child, "two", image=first.request and first.request.image)

    assert host.asked == ["GET /a.png"]
    found = [each.image_receipt.tier for each in (first, second) if each.image_receipt]
    assert found == ["network", "disk"]
    assert image == rounded(by_diffusers(model, picture(), None))


@pytest.mark.parametrize("name", list(converted()))
def test_an_image_of_any_kind_is_decoded_as_it_looks(
    child: Child, cached: Callable[[bytes], Asset], name: str
) -> None:
    data, expected, notes = converted()[name]
    request = a_request(image=cached(data))

    found = decoded(child, request)

    assert found.start.image.mode == "RGB"
    assert found.start.image.tobytes() == expected.tobytes()
    assert found.receipts["image"].notes == notes


def decoded(child: Child, request: GenerateRequest) -> ImageInUse:
    """Return the image that a job would start from."""
    with child.lora_files.files([], images=request.fetched_images) as files:
        return ImageInUse.decode(child, request, read_files(child, request, files))


# --- images of earlier jobs


def test_an_image_of_an_earlier_job_is_named_by_its_index(child: Child, plain: bytes) -> None:
    """Its receipt and the request in the result have its checksum."""
    small: dict[str, Any] = {"num_inference_steps": 1, "width": SIZE[0], "height": SIZE[1]}
    first, _ = drawn(child, "first", num_images=2, **small)
    _, second = drawn(child, "again", seed=8, **small)

    result, image = drawn(child, "job", image=Asset(url="job:first#1"))

    start = Image.frombytes("RGB", SIZE, second)
    assert image == rounded(by_diffusers(child.model, start, None))
    receipt = result.image_receipt
    assert receipt is not None
    assert result.request is not None
    assert (receipt.source, receipt.tier) == ("job:first#1", "store")
    assert receipt.sha256 == first.images[1].sha256
    assert result.request.image == Asset(url="job:first#1", sha256=receipt.sha256)
    require_plain(child, plain)


def test_an_earlier_image_that_is_not_there_is_refused(child: Child, store: MemoryStore) -> None:
    drawn(child, "first", num_inference_steps=1)
    gone, _ = drawn(child, "gone", num_inference_steps=1)
    store.delete(gone.images[0].key)
    write_verdict(store, "failed", JobRevoked("cancelled"), None)
    cases: list[tuple[Asset, type[LoraError], str]] = [
        (Asset(url="job:none#0"), LoraNotFound, "no result"),
        (Asset(ref="job:failed#0"), LoraNotFound, "no result"),
        (Asset(url="job:first#2"), LoraNotFound, "has 1 images"),
        (Asset(url="job:gone#0"), LoraNotFound, "deleted"),
        (Asset(url="job:first#0", sha256="0" * 64), LoraCorrupt, "sha256"),
        (Asset(url="job:first"), LoraNotAllowed, "not a URL"),
        (Asset(url="job:../secret#0"), LoraNotAllowed, "not a URL"),
    ]

    for asset, error, reason in cases:
        with pytest.raises(error, match=reason):
            drawn(child, "job", image=asset)


def test_a_lora_cannot_be_an_image_of_a_job(child: Child) -> None:
    with pytest.raises(LoraNotAllowed):
        drawn(child, "job", loras=(LoraSpec(file=Asset(url="job:first#0")),))


# --- what is refused


def test_hostile_images_are_refused_and_the_worker_goes_on(
    child: Child, plain: bytes, cached: Callable[[bytes], Asset]
) -> None:
    """Each is a typed error that names the field; memory stays bounded."""
    files = hostile()
    assert len(files) >= 40
    Path("/proc/self/clear_refs").write_text("5")  # forget the process's highest memory so far
    before = resident()
    for index, (name, (data, words)) in enumerate(files.items()):
        for field in ("image", "mask"):
            fields: dict[str, Any] = {"image": cached(file_of(picture()))} | {field: cached(data)}
            if words is None:  # odd, and harmless
                decoded(child, a_request(image=fields["image"]))
                continue
            with pytest.raises(InvalidRequest) as caught:
                drawn(child, f"job-{index}-{field}", **fields)
            details = caught.value.details
            assert details["path"] == f"$.{field}", name
            found = f"{details['expected']}"
            if field == "image":
                assert re.search(words, found), (name, found)
            assert "s3cret" not in f"{caught.value}"
    assert resident() - before < 250 * 2**20
    require_plain(child, plain)


def test_hostile_addresses_get_no_connection(child: Child, plain: bytes, tmp_path: Path) -> None:
    """The guard and the lists of what is allowed are those of LoRAs."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(file_of(picture()))
    addresses = (
        "http://example.com/a.png",
        "https://127.0.0.1/a.png",
        "https://localhost/a.png",
        "https://169.254.169.254/latest/meta-data",
        "https://[::1]/a.png",
        "https://[::ffff:7f00:1]/a.png",
        "https://2130706433/a.png",
        "https://0x7f.1/a.png",
        "https://10.0.0.1:6379/a.png",
        "https://us3r:s3cret@192.168.1.1/a.png",
        "ftp://example.com/a.png",
        "data:image/png;base64,AAAA",
        "gopher://127.0.0.1:6379/_FLUSHALL",
        f"file://{secret}",
        "file:///etc/passwd",
        "file:///proc/self/environ",
        "s3://other-bucket/a.png",
        "cozy://secret",
        "demo://cyberpunk-style",
        "lora://anything",
        "job:../../etc/passwd#0",
        "job:a/b#0",
        "/etc/passwd",
        "..",
    )
    with watched_connections() as connections:
        for index, address in enumerate(addresses):
            for field in ("image", "mask"):
                fields: dict[str, Any] = {"image": Asset(url="job:none#0")} | {
                    field: Asset(url=address)
                }
                with pytest.raises(LoraError) as caught:
                    drawn(child, f"job-{index}-{field}", **fields)
                assert "s3cret" not in f"{caught.value} {caught.value.details}"
    assert connections == []
    require_plain(child, plain)


def test_a_file_of_too_many_bytes_is_refused(
    child: Child, cached: Callable[[bytes], Asset]
) -> None:
    """Also one that is in the cache, such as a LoRA."""
    small = dataclasses.replace(child, image_max_bytes=1000)

    with pytest.raises(LoraTooLarge, match="more than 1000 bytes"):
        drawn(small, "job", image=cached(file_of(picture())))


def test_a_download_of_too_many_bytes_is_cut(
    model: Pipeline, model_home: Path, tmp_path: Path
) -> None:
    def answer(_request: Request) -> Iterator[bytes]:
        yield reply(length=None)
        for _ in range(1000):
            yield bytes(100_000)

    with serving(answer) as host:
        variables = {
            "ZLORA_ALLOW_HOSTS": host.name,
            "ZLORA_IMAGE_MAX_BYTES": "200000",
            **lora_cache(tmp_path / "loras"),
        }
        child = make_child(model, MemoryStore(), settings(model_home, **variables))
        with pytest.raises(LoraTooLarge):
            drawn(child, "job", image=Asset(url=f"{host.url}/a.png"))

    assert host.sent < 20_000_000


@pytest.mark.parametrize(
    ("mask", "fields", "expected"),
    [
        (picture((72, 64)), {}, "Expected 64 x 72 pixels, the size of the image"),
        (Image.new("L", SIZE, 0), {}, "a mask with white in it"),
        (Image.new("L", SIZE, 127), {}, "a mask with white in it"),
        (Image.new("L", SIZE, 255), {"mask_invert": True}, "a mask with black in it"),
        (Image.new("L", SIZE, 0), {"mask_blur": 9}, "a mask with white in it"),
        (Image.new("RGBA", SIZE, (255, 255, 255, 0)), {}, "without transparent pixels"),
    ],
)
def test_a_mask_that_leaves_nothing_to_draw_is_refused(
    child: Child,
    cached: Callable[[bytes], Asset],
    mask: Image.Image,
    fields: dict[str, Any],
    expected: str,
) -> None:
    image = cached(file_of(picture()))

    with pytest.raises(InvalidRequest) as caught:
        drawn(child, "job", image=image, mask=cached(file_of(mask)), **fields)

    assert caught.value.details["path"] == "$.mask"
    assert expected in caught.value.details["expected"]


def test_levels_of_a_second_order_scheduler_are_refused(
    child: Child, cached: Callable[[bytes], Asset]
) -> None:
    """diffusers would draw no step, or the wrong ones; a first-order one draws the last levels."""
    fields: dict[str, Any] = {"image": cached(file_of(picture())), "num_inference_steps": None}
    levels = (900, 600, 300, 100)

    with pytest.raises(InvalidRequest, match="second order") as caught:
        drawn(child, "job", **fields, scheduler="heun", timesteps=levels)
    result, _ = drawn(child, "lcm", **fields, scheduler="lcm", timesteps=levels, strength=0.5)

    assert caught.value.details["path"] == "$.timesteps"
    assert result.request is not None
    assert result.request.drawn_steps == 2


def test_a_strength_that_leaves_no_step_of_a_recipe_is_refused(
    child: Child, cached: Callable[..., Asset], tmp_path: Path
) -> None:
    """The few-step LoRA sets 4 steps, of which a fifth is none."""
    fast = cached(lora_file(tmp_path), name="sdxl_lightning_4step_lora.safetensors")
    fields: dict[str, Any] = {"image": cached(file_of(picture())), "loras": (LoraSpec(file=fast),)}

    with pytest.raises(InvalidRequest, match="to draw one of 4 steps") as caught:
        drawn(child, "job", **fields, num_inference_steps=None, strength=0.2)

    assert caught.value.details["path"] == "$.strength"


def resident() -> int:
    """Return the highest number of bytes of this process in memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
