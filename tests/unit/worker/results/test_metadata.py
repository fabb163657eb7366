"""Pictures that say what they are: to other people's tools, to this project, and never a secret."""

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
    a_recipe,
    a_request,
    kohya_lora,
    links,
    load_engine,
    peft_lora,
    settings,
    write,
)
from support.tiny_folder import TINY
from zlora.schema import Asset, GenerateResult, LoraSpec, OutputFormat, parse_request
from zlora_worker.fetch.cache import Cache
from zlora_worker.fetch.fetcher import Fetcher
from zlora_worker.generate import Child, generate
from zlora_worker.lora.memory_cache import LoraMemoryCache
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results import encoding
from zlora_worker.results.infotext import infotext
from zlora_worker.results.metadata import embed_metadata, provenance_of
from zlora_worker.results.provenance import Provenance, provenances

FORMATS: Final = get_args(OutputFormat)
SECRETS: Final = ("s3cret", "pa55word", "fr4gment", "us3r")


def lengthened(strategy: st.SearchStrategy[str], most: int) -> st.SearchStrategy[str]:
    """Texts of up to `most` characters, without as many choices."""
    return st.builds(
        lambda text, times: (text * times)[:most], strategy, st.sampled_from([1, 1, 50, most])
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


def drawn(recipe: Provenance) -> tuple[Image.Image, str]:
    """A small picture that says what it is, saved and opened again, and its infotext."""
    text = infotext(recipe, ["a" * 64 for _ in recipe.request.loras])
    options = embed_metadata(recipe, text, recipe.request.output_format)
    return encoding.opened(
        encoding.encode(Image.new("RGB", (8, 8)), recipe.request, **options)
    ), text


def said(picture: Image.Image) -> str:
    """The infotext of an opened picture, where A1111 has it."""
    if picture.format == "PNG":
        return str(picture.info["parameters"])
    assert (
        b"\x92\x86\0\x07" in picture.info["exif"]
    )  # its type is UNDEFINED: of another it is numbers to some readers
    comment = picture.getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0")
    return str(comment[8:].decode("utf-16-be"))


def packet_of(picture: Image.Image) -> str | None:
    """The recipe in an XMP packet, by a parser of XML."""
    if "xmp" not in picture.info:
        return None
    return ET.fromstring(picture.info["xmp"]).findtext(".//{urn:x-zlora:1}recipe")  # noqa: S314 - our own


@hypothesis_settings(deadline=None)
@given(document=REQUESTS)
@example(document=LONGEST | {"output_format": "png"})
@example(document=LONGEST | {"output_format": "jpeg"})
@example(document=LONGEST | {"output_format": "webp"})
@example(document={"prompt": "\ufffe]]>&amp;</zlora:recipe>\uffff", "output_format": "jpeg"})
def test_a_picture_of_any_request_says_what_it_is(document: dict[str, Any]) -> None:
    """No request fails for it; only of a JPEG, and only where it is too long for one, the JSON is left out."""
    recipe = a_recipe(parse_request(document))

    picture, text = drawn(recipe)

    assert said(picture) == text
    if picture.format == "JPEG" and "xmp" not in picture.info:
        assert provenance_of(picture) is None
        assert len(msgspec.json.encode(recipe)) * 6 > 65_000  # a character is spelt by six at most
    else:
        assert provenance_of(picture) == recipe
    if packet := packet_of(picture):
        assert msgspec.json.decode(packet, type=Provenance) == recipe


@pytest.mark.parametrize(("length", "there"), [(64_000, True), (64_800, False)])
def test_the_json_is_in_a_jpeg_as_long_as_it_fits(length: int, there: bool) -> None:
    recipe = a_recipe(a_request(output_format="jpeg"))
    longer = msgspec.structs.replace(
        recipe, model="x" * (length - len(msgspec.json.encode(recipe)))
    )

    picture, _ = drawn(longer)

    assert provenance_of(picture) == (longer if there else None)


def test_a_png_has_two_text_chunks_as_they_stand_in_the_file() -> None:
    """Neither is compressed, and both come before the pixels, so that a reader of the header has them."""
    recipe = a_recipe(a_request(prompt="plain"))
    text = infotext(recipe, [])
    file = encoding.encode(
        Image.new("RGB", (8, 8)), recipe.request, **embed_metadata(recipe, text, "png")
    )

    found, place = [], 8
    while place < len(file):
        length, kind = struct.unpack_from(">I4s", file, place)
        found.append((kind, file[place + 8 : place + 8 + length]))
        place += 12 + length

    assert [kind for kind, _ in found] == [b"IHDR", b"tEXt", b"iTXt", b"IDAT", b"IEND"]
    assert found[1][1] == b"parameters\0" + text.encode("latin-1")
    assert found[2][1] == b"zlora\0\0\0\0\0" + msgspec.json.encode(recipe)


# --- what strangers write


def saved(options: dict[str, Any], output_format: str = "png") -> Image.Image:
    """A stranger's picture: the text chunks of a PNG, or options of Pillow's `save`."""
    buffer, chunks = io.BytesIO(), PngInfo()
    if output_format == "png":
        for name, text in options.items():
            chunks.add_text(name, text)
        options = {"pnginfo": chunks}
    Image.new("RGB", (8, 8)).save(buffer, output_format, **options)
    return encoding.opened(buffer.getvalue())


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_picture_of_another_tool_says_nothing(output_format: str) -> None:
    """Whatever else it has."""
    plain = saved({}, output_format)
    if output_format == "png":
        others = saved(
            {"parameters": "a city\nSteps: 1", "xmp": "\xff<zlora:recipe>{}", "prompt": "{}"}
        )
    else:
        others = saved(
            {"xmp": b"<zlora:recipe>" * 1_000 + b"\xff", "exif": Image.Exif().tobytes()},
            output_format,
        )

    assert provenance_of(plain) is None
    assert provenance_of(others) is None


@pytest.mark.parametrize(
    "packet", [7, None, ("<zlora:recipe>{}</zlora:recipe>",), {}, "<zlora:recipe>", b""]
)
def test_an_xmp_packet_of_another_type_says_nothing(packet: object) -> None:
    picture = Image.new("RGB", (8, 8))
    picture.info = {"xmp": packet, "zlora": None}

    assert provenance_of(picture) is None


def test_a_packet_is_read_as_text_too() -> None:
    recipe = a_recipe(a_request(prompt="café", output_format="webp"))
    picture, _ = drawn(recipe)
    picture.info["xmp"] = picture.info["xmp"].decode()

    assert provenance_of(picture) == recipe


@given(
    document=st.text(max_size=30)
    | st.sampled_from(["{}", "[" * 9_999, '{"a":' * 9_999, "null", " "])
)
def test_what_is_no_recipe_is_one_kind_of_error(document: str) -> None:
    """In the chunk of a PNG and in XMP."""
    packet = b"<zlora:recipe>" + document.encode() + b"</zlora:recipe>"

    for picture in (
        saved({"zlora": document}),
        saved({"xmp": packet}, "webp"),
        saved({"xmp": packet}, "jpeg"),
    ):
        with pytest.raises(msgspec.DecodeError):
            provenance_of(picture)


# --- whole jobs


class Jobs:
    """Jobs of two pictures with two LoRAs on the tiny model, each drawn once."""

    def __init__(self, home: Path, folder: Path) -> None:
        self.store = MemoryStore()
        fetcher = Fetcher(settings(home))
        cache = Cache(folder / "loras", max_bytes=10**9, free_bytes=0, fetcher=fetcher)
        self.runtime = Child(
            engine=load_engine(home),
            cache=cache,
            shelf=LoraMemoryCache(max_bytes=10**9),
            store=self.store,
            links=links(self.store),
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
        """Of the one job of a format."""
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
            self._results[key] = generate(self.runtime, job_id, request, lambda *_: None)
        return self._results[key]

    def pictures(self, result: GenerateResult) -> list[bytes]:
        """The files of a job."""
        return [self.store.objects[image.key][0] for image in result.images]


def sha256_without_header(file: Path) -> str:
    """What a safetensors file has after its header, whose length its first 8 bytes tell."""
    data = file.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


@pytest.fixture(scope="module")
def jobs(model_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(model_home, tmp_path_factory.mktemp("jobs"))


@pytest.mark.parametrize("output_format", FORMATS)
def test_an_independent_parser_reads_what_was_drawn(
    jobs: Jobs, output_format: OutputFormat
) -> None:
    """The hashes of the LoRAs, which it drops, by the grammar: each that of the file without its header."""
    result = jobs.result(output_format)

    opened = [
        encoding.opened(data) for data in jobs.pictures(result)
    ]  # it remembers a picture by its id
    for index, picture in enumerate(opened):
        found = ParserManager().parse(picture)
        assert found is not None
        (sampler,) = found.samplers
        (prompt,) = sampler.prompts
        assert prompt.value == "a café at night, (neon:1.2) <lora:one:0.5> <lora:two:0.5>"
        assert [prompt.value for prompt in sampler.negative_prompts] == [
            "blurry: no, \N{GRINNING FACE}"
        ]
        assert (sampler.name, sampler.parameters["scheduler"]) == ("DPM++ 2M", "Karras")
        assert (sampler.parameters["steps"], sampler.parameters["cfg_scale"]) == ("1", "5.25")
        assert sampler.parameters["seed"] == str(40 + index)
        assert found.metadata["Size"] == f"{picture.width}x{picture.height}"
        assert sampler.model is not None
        assert (sampler.model.name, sampler.model.hash) == (TINY, str(result.base_sha256)[:10])
        last = said(picture).split("\n")[-1]
        hashes = json.loads(re.findall(r'Lora hashes: ("(?:\\.|[^"\\])*")', last)[0])
        assert hashes.split(", ") == [f"one: {jobs.hashes[0]}", f"two: {jobs.hashes[1]}"]


@pytest.mark.parametrize("output_format", FORMATS)
def test_pictures_and_manifest_say_the_same(jobs: Jobs, output_format: OutputFormat) -> None:
    """And it is all of it: who has the LoRAs' files draws the same by what the last picture says."""
    result = jobs.result(output_format)
    stored = json.loads(jobs.store.objects[f"runs/{result.job_id}/manifest.json"][0])

    said = [provenance_of(encoding.opened(data)) for data in jobs.pictures(result)]

    assert said == provenances(result) == provenances(msgspec.convert(stored, GenerateResult))
    last = said[-1]
    assert last is not None
    again = msgspec.structs.replace(last.request, seed=last.seed, num_images=1)
    (image,) = generate(jobs.runtime, f"{output_format}-again", again, lambda *_: None).images
    assert image.pixels_sha256 == last.pixels_sha256


def test_a_lora_of_whose_address_nothing_may_be_told_fails_no_job(jobs: Jobs) -> None:
    """It is named by its digest."""
    digest = jobs.specs[0].file.sha256
    request = a_request(loras=(LoraSpec(file=Asset(url="?token=s3cret", sha256=digest)),))

    result = generate(jobs.runtime, "secret", request, lambda *_: None)

    (found,) = [provenance_of(encoding.opened(data)) for data in jobs.pictures(result)]
    assert found is not None
    assert found.request.loras[0].file == Asset(url=f"sha256:{digest}", sha256=digest)


@pytest.mark.parametrize("output_format", FORMATS)
def test_no_file_of_a_job_has_a_secret(jobs: Jobs, output_format: OutputFormat) -> None:
    """Neither as it is, nor in UTF-16, nor compressed: there is no compressed text."""
    result = jobs.result(output_format)

    for key, (data, _) in jobs.store.objects.items():
        if key.startswith(f"runs/{result.job_id}/"):
            assert b"loras.invalid/one.safetensors" in data
            for secret in SECRETS:
                spelt = [
                    secret.encode(encoding) for encoding in ("utf-8", "utf-16-be", "utf-16-le")
                ]
                assert not any(form in data for form in spelt)
            assert not re.search(rb"zTXt|iCCP|\x00zlora\x00\x01", data)


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_request_may_want_none_of_it(jobs: Jobs, output_format: OutputFormat) -> None:
    """The pixels are the same, and the file says nothing."""
    with_it, without = jobs.result(output_format), jobs.result(output_format, embed_metadata=False)

    for data in jobs.pictures(without):
        picture = encoding.opened(data)
        assert not {"parameters", "zlora", "xmp", "exif", "comment"} & picture.info.keys()
        assert not re.search(rb"caf|loras|zlora|tEXt|iTXt|eXIf|Exif|XMP|xap", data)
    assert [encoding.pixels_sha256(encoding.opened(data)) for data in jobs.pictures(without)] == [
        encoding.pixels_sha256(encoding.opened(data)) for data in jobs.pictures(with_it)
    ]
