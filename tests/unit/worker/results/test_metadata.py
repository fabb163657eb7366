"""Metadata in image files: for other tools, for this project, and never a secret."""

import hashlib
import io
import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any, Final, get_args
from xml.etree import ElementTree as ET

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sd_parsers import ParserManager
from support.fakes import (
    TEXT,
    UNET,
    MemoryStore,
    a_request,
    image_provenance,
    kohya_lora,
    links,
    load_pipeline,
    peft_lora,
    settings,
    write,
)
from support.jobs import make_spool, run_job
from support.tiny_folder import TINY
from zlora.schema import Asset, GenerateResult, LoraSpec, OutputFormat, parse_request
from zlora_worker.child import Child
from zlora_worker.fetch.cache import Cache
from zlora_worker.fetch.fetcher import Fetcher
from zlora_worker.lora.memory_cache import LoraMemoryCache
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results import encoding
from zlora_worker.results.infotext import infotext
from zlora_worker.results.metadata import embed_metadata, provenance_of
from zlora_worker.results.provenance import ImageProvenance, image_provenances

FORMATS: Final = get_args(OutputFormat)
SECRETS: Final = ("s3cret", "pa55word", "fr4gment", "us3r")


def lengthened(strategy: st.SearchStrategy[str], length: int) -> st.SearchStrategy[str]:
    """Return texts of up to `length` characters, from few choices."""
    return st.builds(
        lambda text, times: (text * times)[:length], strategy, st.sampled_from([1, 1, 50, length])
    )


ODD: Final = st.text(
    st.sampled_from("\0\t\n\r\x7f\x85\u2028\ufeff\ufffe\uffff\U0001f600<>&]\"\\'é "), max_size=20
)
PROMPTS: Final = lengthened(st.text(max_size=20) | ODD, 10_000)
SPECS: Final = st.fixed_dictionaries(
    {"file": st.fixed_dictionaries({"url": lengthened(st.text(min_size=1, max_size=20), 4096)})},
    optional={
        "adapter_name": lengthened(st.text(max_size=20) | ODD, 200),
        "weight": st.floats(-4, 4),
    },
)
REQUESTS: Final = st.fixed_dictionaries(
    {"prompt": PROMPTS, "output_format": st.sampled_from(FORMATS)},
    optional={
        "negative_prompt": PROMPTS,
        "loras": st.lists(SPECS, max_size=8),
        "guidance_scale": st.floats(0, 50),
    },
)
LONGEST: Final = {
    "prompt": "\U0001f600" * 10_000,
    "negative_prompt": "\uffff\0<" * 3_333,
    "loras": [{"file": {"url": "\U0001f600" * 4096}, "adapter_name": "\U0001f600" * 200}] * 8,
}


def saved_image(provenance: ImageProvenance) -> tuple[Image.Image, str]:
    """Save a small image with its metadata and open it; return it and its infotext."""
    request = provenance.request
    text = infotext(provenance, ["a" * 64 for spec in request.loras if spec.is_used])
    options = embed_metadata(provenance, text, request.output_format)
    data = encoding.encode(Image.new("RGB", (8, 8)), request, **options)
    return encoding.open_image(data), text


def infotext_of(image: Image.Image) -> str:
    """Return the infotext of an opened image, from the place that AUTOMATIC1111 uses."""
    if image.format == "PNG":
        return str(image.info["parameters"])
    # The type of the comment is UNDEFINED: some readers take one of another type for numbers.
    assert b"\x92\x86\0\x07" in image.info["exif"]
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0")
    return str(comment[8:].decode("utf-16-be"))


def json_in_xmp(image: Image.Image) -> str | None:
    """Return the JSON in an XMP packet, found by a parser of XML."""
    if "xmp" not in image.info:
        return None
    return ET.fromstring(image.info["xmp"]).findtext(".//{urn:x-zlora:1}recipe")  # noqa: S314 - our own


@hypothesis_settings(deadline=None, max_examples=40)
@given(document=REQUESTS)
@example(document=LONGEST | {"output_format": "png"})
@example(document=LONGEST | {"output_format": "jpeg"})
@example(document=LONGEST | {"output_format": "webp"})
@example(document={"prompt": "\ufffe]]>&amp;</zlora:recipe>\uffff", "output_format": "jpeg"})
def test_metadata_of_any_request_is_read_back(document: dict[str, Any]) -> None:
    """No request fails; only a JPEG leaves the JSON out, and only if it is too long for one."""
    provenance = image_provenance(parse_request(document))

    image, text = saved_image(provenance)

    assert infotext_of(image) == text
    if image.format == "JPEG" and "xmp" not in image.info:
        assert provenance_of(image) is None
        assert len(msgspec.json.encode(provenance)) * 6 > 65_000  # an escape has six characters
    else:
        assert provenance_of(image) == provenance
    if packet := json_in_xmp(image):
        assert msgspec.json.decode(packet, type=ImageProvenance) == provenance


@pytest.mark.parametrize(("length", "fits"), [(64_000, True), (64_800, False)])
def test_a_jpeg_has_the_json_if_it_fits_into_a_segment(length: int, fits: bool) -> None:
    provenance = image_provenance(a_request(output_format="jpeg"))
    padding = "x" * (length - len(msgspec.json.encode(provenance)))
    provenance = msgspec.structs.replace(provenance, model=padding)

    image, _ = saved_image(provenance)

    assert provenance_of(image) == (provenance if fits else None)


def test_a_png_has_two_text_chunks_before_its_pixels() -> None:
    """Neither is compressed, and a reader of the header has them."""
    provenance = image_provenance(a_request(prompt="plain"))
    text = infotext(provenance, [])
    options = embed_metadata(provenance, text, "png")
    file = encoding.encode(Image.new("RGB", (8, 8)), provenance.request, **options)

    chunks, place = [], 8
    while place < len(file):
        length, kind = struct.unpack_from(">I4s", file, place)
        chunks.append((kind, file[place + 8 : place + 8 + length]))
        place += 12 + length

    assert [kind for kind, _ in chunks] == [b"IHDR", b"tEXt", b"iTXt", b"IDAT", b"IEND"]
    assert chunks[1][1] == b"parameters\0" + text.encode("latin-1")
    assert chunks[2][1] == b"zlora\0\0\0\0\0" + msgspec.json.encode(provenance)


# --- files of other programs


def foreign_image(options: dict[str, Any], output_format: str = "png") -> Image.Image:
    """Return an image with these text chunks of a PNG, or options of Pillow's `save`."""
    buffer, chunks = io.BytesIO(), PngInfo()
    if output_format == "png":
        for name, text in options.items():
            chunks.add_text(name, text)
        options = {"pnginfo": chunks}
    Image.new("RGB", (8, 8)).save(buffer, output_format, **options)
    return encoding.open_image(buffer.getvalue())


@pytest.mark.parametrize("output_format", FORMATS)
def test_an_image_of_another_program_has_no_provenance(output_format: str) -> None:
    if output_format == "png":
        other: dict[str, Any] = {
            "parameters": "a city\nSteps: 1",
            "xmp": "\xff<zlora:recipe>{}",
            "prompt": "{}",
        }
    else:
        other = {"xmp": b"<zlora:recipe>" * 1_000 + b"\xff", "exif": Image.Exif().tobytes()}

    assert provenance_of(foreign_image({}, output_format)) is None
    assert provenance_of(foreign_image(other, output_format)) is None


def test_an_xmp_packet_of_another_type_is_ignored() -> None:
    image = Image.new("RGB", (8, 8))
    packets: list[object] = [
        7,
        None,
        ("<zlora:recipe>{}</zlora:recipe>",),
        {},
        "<zlora:recipe>",
        b"",
    ]
    for packet in packets:
        image.info = {"xmp": packet, "zlora": None}

        assert provenance_of(image) is None


def test_an_xmp_packet_may_be_text() -> None:
    provenance = image_provenance(a_request(prompt="café", output_format="webp"))
    image, _ = saved_image(provenance)
    image.info["xmp"] = image.info["xmp"].decode()

    assert provenance_of(image) == provenance


@hypothesis_settings(max_examples=30)
@given(
    document=st.text(max_size=30)
    | st.sampled_from(["{}", "[" * 9_999, '{"a":' * 9_999, "null", " "])
)
def test_invalid_json_is_a_decode_error(document: str) -> None:
    """In the chunk of a PNG and in XMP."""
    packet = b"<zlora:recipe>" + document.encode() + b"</zlora:recipe>"

    for image in (
        foreign_image({"zlora": document}),
        foreign_image({"xmp": packet}, "webp"),
        foreign_image({"xmp": packet}, "jpeg"),
    ):
        with pytest.raises(msgspec.DecodeError):
            provenance_of(image)


# --- whole jobs


class Jobs:
    """Jobs of two images with two LoRAs on the tiny model; each job is drawn once."""

    def __init__(self, home: Path, folder: Path) -> None:
        self.store = MemoryStore()
        fetcher = Fetcher(settings(home))
        cache = Cache(folder / "loras", max_bytes=10**9, free_bytes=0, fetcher=fetcher)
        self.child = Child(
            model=load_pipeline(home),
            lora_files=cache,
            loras=LoraMemoryCache(max_bytes=10**9),
            store=self.store,
            spool=make_spool(folder / "spool"),
            urls=links(self.store),
            job_timeout=870,
            meter=Meter(),
        )
        files = (
            write(folder / "one.safetensors", kohya_lora()),
            write(folder / "two.safetensors", peft_lora(TEXT + UNET)),
        )
        self.hashes = [sha256_without_header(file)[:12] for file in files]
        self.specs = [self._spec(file, cache._files) for file in files]
        self._results: dict[tuple[str, bool], GenerateResult] = {}

    def _spec(self, file: Path, cached: Path) -> LoraSpec:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, cached / f"{digest}.safetensors")
        url = f"https://us3r:pa55word@loras.invalid/{file.name}?token=s3cret#fr4gment"
        return LoraSpec(file=Asset(url=url, sha256=digest), weight=0.5)

    def result(self, output_format: OutputFormat, *, embed_metadata: bool = True) -> GenerateResult:
        """Return the result of the job in a format."""
        key = (output_format, embed_metadata)
        if key not in self._results:
            request = a_request(
                prompt="a café at night, (neon:1.2)",
                negative_prompt="blurry: no, \N{GRINNING FACE}",
                loras=tuple(self.specs),
                seed=40,
                num_images=2,
                guidance_scale=5.25,
                scheduler="dpmpp_2m_karras",
                output_format=output_format,
                embed_metadata=embed_metadata,
            )
            job_id = f"{output_format}-{embed_metadata}"
            self._results[key] = run_job(self.child, job_id, request)
        return self._results[key]

    def images(self, result: GenerateResult) -> list[bytes]:
        """Return the image files of a job."""
        return [self.store.objects[image.key][0] for image in result.images]


def sha256_without_header(file: Path) -> str:
    """Return the sha256 of what follows a safetensors header; its first 8 bytes are its length."""
    data = file.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


@pytest.fixture(scope="module")
def jobs(model_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(model_home, tmp_path_factory.mktemp("jobs"))


@pytest.mark.parametrize("output_format", FORMATS)
def test_an_independent_parser_reads_what_was_drawn(
    jobs: Jobs, output_format: OutputFormat
) -> None:
    """The parser drops the hashes of the LoRAs, so these are read by the grammar.

    Each hash is that of the file without its header.
    """
    result = jobs.result(output_format)

    # All are open at once, since the parser caches an image by its id.
    opened = [encoding.open_image(data) for data in jobs.images(result)]
    for index, image in enumerate(opened):
        found = ParserManager().parse(image)
        assert found is not None
        (sampler,) = found.samplers
        (prompt,) = sampler.prompts
        assert prompt.value == (r"a café at night, \(neon:1.2\) <lora:one:0.5> <lora:two:0.5>")
        assert [prompt.value for prompt in sampler.negative_prompts] == [
            "blurry: no, \N{GRINNING FACE}"
        ]
        assert (sampler.name, sampler.parameters["scheduler"]) == ("DPM++ 2M", "Karras")
        assert (sampler.parameters["steps"], sampler.parameters["cfg_scale"]) == ("1", "5.25")
        assert sampler.parameters["seed"] == str(40 + index)
        assert found.metadata["Size"] == f"{image.width}x{image.height}"
        assert sampler.model is not None
        assert (sampler.model.name, sampler.model.hash) == (TINY, str(result.base_sha256)[:10])
        last = infotext_of(image).split("\n")[-1]
        hashes = json.loads(re.findall(r'Lora hashes: ("(?:\\.|[^"\\])*")', last)[0])
        assert hashes.split(", ") == [f"one: {jobs.hashes[0]}", f"two: {jobs.hashes[1]}"]


@pytest.mark.parametrize("output_format", FORMATS)
def test_images_and_manifest_have_the_same_provenance(
    jobs: Jobs, output_format: OutputFormat
) -> None:
    """With the LoRAs' files, a job made from the provenance draws the same pixels."""
    result = jobs.result(output_format)
    stored = json.loads(jobs.store.objects[f"runs/{result.job_id}/manifest.json"][0])

    found = [provenance_of(encoding.open_image(data)) for data in jobs.images(result)]

    assert found == image_provenances(result)
    assert found == image_provenances(msgspec.convert(stored, GenerateResult))
    last = found[-1]
    assert last is not None
    again = msgspec.structs.replace(last.request, seed=last.seed, num_images=1)
    (image,) = run_job(jobs.child, f"{output_format}-again", again).images
    assert image.pixels_sha256 == last.pixels_sha256


def test_a_lora_whose_address_is_all_secret_is_named_by_its_sha256(jobs: Jobs) -> None:
    digest = jobs.specs[0].file.sha256
    request = a_request(loras=(LoraSpec(file=Asset(url="?token=s3cret", sha256=digest)),))

    result = run_job(jobs.child, "secret", request)

    (found,) = [provenance_of(encoding.open_image(data)) for data in jobs.images(result)]
    assert found is not None
    assert found.request.loras[0].file == Asset(url=f"sha256:{digest}", sha256=digest)


@pytest.mark.parametrize("output_format", FORMATS)
def test_no_file_of_a_job_has_a_secret(jobs: Jobs, output_format: OutputFormat) -> None:
    """Neither in UTF-8, nor in UTF-16, nor in compressed text, which the files do not have."""
    result = jobs.result(output_format)

    for key, (data, _) in jobs.store.objects.items():
        if key.startswith(f"runs/{result.job_id}/"):
            assert b"loras.invalid/one.safetensors" in data
            for secret in SECRETS:
                for charset in ("utf-8", "utf-16-be", "utf-16-le"):
                    assert secret.encode(charset) not in data
            assert not re.search(rb"zTXt|iCCP|\x00zlora\x00\x01", data)


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_request_may_refuse_all_metadata(jobs: Jobs, output_format: OutputFormat) -> None:
    """The pixels are the same."""
    with_it, without = jobs.result(output_format), jobs.result(output_format, embed_metadata=False)

    for data in jobs.images(without):
        image = encoding.open_image(data)
        assert not {"parameters", "zlora", "xmp", "exif", "comment"} & image.info.keys()
        assert not re.search(rb"caf|loras|zlora|tEXt|iTXt|eXIf|Exif|XMP|xap", data)
    assert [encoding.pixels_sha256(encoding.open_image(data)) for data in jobs.images(without)] == [
        encoding.pixels_sha256(encoding.open_image(data)) for data in jobs.images(with_it)
    ]
