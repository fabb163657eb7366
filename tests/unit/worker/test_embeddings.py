"""Jobs with embeddings (textual inversions) on the tiny model; diffusers is the oracle."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from support.embedding_files import bundle, pivotal, sdxl, write_embedding
from support.fakes import (
    MemoryStore,
    Tensors,
    a_request,
    kohya_lora,
    pixels,
    settings,
)
from support.jobs import lora_cache, make_child, run_job
from support.servers import reply, serving
from support.tiny_folder import tiny_model
from zlora.errors import EmbeddingMismatch, InvalidRequest
from zlora.schema import Asset, EmbeddingSpec, GenerateResult, LoraSpec, parse_request, to_dict
from zlora_worker.child import Child
from zlora_worker.model.pipeline import Pipeline, PipelineState
from zlora_worker.model.text_encoding import Embedding

PROMPT = "zebrafish city at night, ZebraFish"


@pytest.fixture(scope="module")
def plain(model: Pipeline) -> bytes:
    """Pixels of a job without an embedding, before any test has used one."""
    return pixels(model, prompt=PROMPT)


@pytest.fixture
def cached(cached: Callable[..., Asset], tmp_path: Path) -> Callable[..., Asset]:
    """Return a function that puts a file of tensors in the cache."""

    def put(tensors: Tensors, *, name: str = "zebrafish") -> Asset:
        data = write_embedding(tmp_path / "files", tensors, name=name).read_bytes()
        return cached(data, name=f"{name}.safetensors")

    return put


def drawn(child: Child, job_id: str, **fields: Any) -> tuple[GenerateResult, str | None]:
    result = run_job(child, job_id, a_request(**{"seed": 7, "prompt": PROMPT} | fields))
    return result, result.images[0].pixels_sha256


def require_plain(child: Child, plain: bytes) -> None:
    """Raise `AssertionError` unless the next job without embeddings is what it was before."""
    assert child.model.state is PipelineState.READY
    assert pixels(child.model, prompt=PROMPT) == plain


# --- what is drawn


@pytest.fixture(scope="module", params=[1, 2, 5])
def oracle(
    request: pytest.FixtureRequest,
    model: Pipeline,
    model_home: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Any, list[Embedding]]:
    """Return a pipeline of diffusers with two embeddings of so many vectors, and these as ours."""
    count, folder = request.param, tmp_path_factory.mktemp("embeddings")
    files = {"zebrafish": sdxl(count, seed=1), "<fish42>": sdxl(count, seed=2)}
    oracle = StableDiffusionXLPipeline.from_pretrained(tiny_model(model_home))
    embeddings: list[Embedding] = []
    for token, tensors in files.items():
        path = write_embedding(folder, tensors, name=f"file-{len(embeddings)}")
        embeddings += model.embedding_reader.read(path, source="file", token=token).embeddings
        for suffix, tensor in zip(("", "_2"), tensors.values(), strict=True):
            oracle.load_textual_inversion(
                tensor,
                token=token,
                text_encoder=getattr(oracle, f"text_encoder{suffix}"),
                tokenizer=getattr(oracle, f"tokenizer{suffix}"),
            )
    return oracle, embeddings


@pytest.mark.parametrize(
    "prompts",
    [
        ("zebrafish", ""),
        ("a city at night, zebrafish, neon lights", "blurry"),
        ("a city zebrafish zebrafish at night", "zebrafish low quality"),
        ("<fish42>, zebrafish in the style of <fish42>", "<fish42>"),
    ],
)
def test_prompts_are_encoded_as_by_diffusers(
    model: Pipeline, oracle: tuple[Any, list[Embedding]], prompts: tuple[str, str]
) -> None:
    """Hidden states of both encoders and the pooled vectors, by `load_textual_inversion`."""
    (diffusers, embeddings), (prompt, negative) = oracle, prompts
    with torch.no_grad():
        expected = diffusers.encode_prompt(prompt, negative_prompt=negative or None)

    found = model.encode(a_request(prompt=prompt, negative_prompt=negative), embeddings)

    ours = [found.prompt, found.negative, found.pooled, found.negative_pooled]
    for one, other in zip(ours, expected, strict=True):
        if one is None:  # diffusers' own zeros
            assert not other.any()
        else:
            assert float((one - other).abs().max()) < 1e-5
    assert found.uses == tuple((f"{prompt} {negative}").count(each.token) for each in embeddings)


def test_an_embedding_changes_the_image_of_its_job_only(
    child: Child, plain: bytes, cached: Callable[..., Asset]
) -> None:
    spec = EmbeddingSpec(file=cached(sdxl()))

    result, image = drawn(child, "with", embeddings=(spec,))
    _, other = drawn(child, "other", embeddings=(EmbeddingSpec(file=cached(sdxl(seed=9))),))

    assert len({image, other, hashlib.sha256(plain).hexdigest()}) == 3
    (receipt,) = result.embeddings
    assert receipt.source == "https://files.invalid/zebrafish.safetensors"
    assert (receipt.sha256, receipt.format) == (spec.file.sha256, "sdxl")
    assert (receipt.vectors, receipt.used) == ({"zebrafish": 2}, {"zebrafish": 2})
    assert (receipt.tier, receipt.warnings) == ("disk", ())
    require_plain(child, plain)


def test_an_embedding_that_no_prompt_names_changes_nothing_and_is_warned_of(
    child: Child, plain: bytes, cached: Callable[..., Asset]
) -> None:
    spec = EmbeddingSpec(file=cached(pivotal()))

    result, image = drawn(child, "unused", embeddings=(spec,))

    (receipt,) = result.embeddings
    assert receipt.used == {"<s0>": 0, "<s1>": 0}
    assert receipt.warnings == (
        "<s0>: in no prompt that was read",
        "<s1>: in no prompt that was read",
    )
    assert image == hashlib.sha256(plain).hexdigest()


def test_the_negative_prompt_has_embeddings_too(child: Child, cached: Callable[..., Asset]) -> None:
    spec = EmbeddingSpec(file=cached(sdxl()), token="badfish")
    fields = {"prompt": "a city", "negative_prompt": "blurry badfish"}

    without, with_ = drawn(child, "a", **fields), drawn(child, "b", **fields, embeddings=(spec,))

    assert with_[0].embeddings[0].used == {"badfish": 1}
    assert with_[1] != without[1]


def test_a_word_may_have_a_weight_in_the_syntax_of_a1111(
    child: Child, cached: Callable[..., Asset]
) -> None:
    """The second word is spelled as ComfyUI does."""
    file = cached(sdxl())
    images = set()
    for token, text in (("fish42", "(fish42:1.3)"), ("embedding:fish42", "(embedding:fish42:0.7)")):
        result, image = drawn(
            child,
            token.partition(":")[0],
            prompt=f"a city, {text}",
            prompt_syntax="a1111",
            embeddings=(EmbeddingSpec(file=file, token=token),),
        )
        assert result.embeddings[0].used == {token: 1}
        images.add(image)
    assert len(images) == 2


def test_a_lora_and_its_embeddings_come_from_one_file(
    child: Child, plain: bytes, cached: Callable[..., Asset]
) -> None:
    """The same image as with the LoRA and the embedding in two files."""
    both = LoraSpec(file=cached(kohya_lora() | bundle("zebrafish"), name="both"))
    lora = LoraSpec(file=cached(kohya_lora(), name="lora"))
    embedding = EmbeddingSpec(file=cached(sdxl(seed=0)))

    one, image = drawn(child, "one-file", loras=(both,))
    _, two_files = drawn(child, "two-files", loras=(lora,), embeddings=(embedding,))
    _, lora_alone = drawn(child, "lora-alone", loras=(lora,))

    assert image == two_files != lora_alone
    (receipt,) = one.embeddings
    assert (receipt.source, receipt.sha256) == (one.loras[0].source, one.loras[0].sha256)
    assert (receipt.format, receipt.used) == ("bundle", {"zebrafish": 2})
    assert not one.loras[0].unmatched
    require_plain(child, plain)


@pytest.mark.parametrize("tensors", [sdxl(), pivotal(), bundle("zebrafish")])
def test_the_request_of_a_result_draws_the_same_image(
    child: Child, cached: Callable[..., Asset], tensors: Tensors
) -> None:
    """The file has another address then, and the word of the first one."""
    prompt = f"{PROMPT} <s0> and <s1>"
    result, image = drawn(
        child, "first", prompt=prompt, embeddings=(EmbeddingSpec(file=cached(tensors)),)
    )
    assert result.request is not None
    document = to_dict(result.request)
    assert "s3cret" not in str(document)
    sha256 = document["embeddings"][0]["file"]["sha256"]
    document["embeddings"][0]["file"] = {"url": f"civitai://{1}", "sha256": sha256}

    again = run_job(child, "again", parse_request(document))

    assert sha256
    assert again.images[0].pixels_sha256 == image


def test_an_embedding_is_downloaded_as_a_lora_is(
    model: Pipeline, store: MemoryStore, model_home: Path, tmp_path: Path
) -> None:
    data = write_embedding(tmp_path, sdxl()).read_bytes()
    with serving(reply(data)) as host:
        variables = {**lora_cache(tmp_path / "cache"), "ZLORA_ALLOW_HOSTS": host.name}
        child = make_child(model, store, settings(model_home, **variables))
        spec = EmbeddingSpec(file=Asset(url=f"{host.url}/zebrafish.safetensors?sig=s3cret"))
        result, _ = drawn(child, "fetched", embeddings=(spec,))

    (receipt,) = result.embeddings
    assert receipt.tier == "network"
    assert (receipt.sha256, receipt.size) == (hashlib.sha256(data).hexdigest(), len(data))
    assert "s3cret" not in str(to_dict(result))


# --- what is refused


def two_files(cached: Callable[..., Asset]) -> dict[str, Any]:
    """Return two files: the word of one is its name, and of the other its token."""
    named = EmbeddingSpec(file=cached(sdxl(seed=2)), token="ZEBRAFISH")
    return {"embeddings": (EmbeddingSpec(file=cached(sdxl())), named)}


def beside_a_lora(cached: Callable[..., Asset]) -> dict[str, Any]:
    lora = LoraSpec(file=cached(kohya_lora() | bundle("zebrafish"), name="lora"))
    return {"loras": (lora,), "embeddings": (EmbeddingSpec(file=cached(sdxl())),)}


def in_one_file(cached: Callable[..., Asset]) -> dict[str, Any]:
    file = cached(kohya_lora() | bundle("zebrafish", "ZebraFish"), name="lora")
    return {"loras": (LoraSpec(file=file),)}


def in_one_token(cached: Callable[..., Asset]) -> dict[str, Any]:
    return {"embeddings": (EmbeddingSpec(file=cached(sdxl(2)), token="<zebrafish><ZebraFish>"),)}


@pytest.mark.parametrize("twice", [two_files, beside_a_lora, in_one_file, in_one_token])
def test_a_word_stands_for_one_embedding(
    child: Child,
    plain: bytes,
    cached: Callable[..., Asset],
    twice: Callable[[Callable[..., Asset]], dict[str, Any]],
) -> None:
    with pytest.raises(EmbeddingMismatch, match="also stands for an embedding of") as caught:
        drawn(child, "twice", **twice(cached))

    assert caught.value.details["token"].lower().strip("<>") == "zebrafish"
    assert "s3cret" not in str(caught.value)
    require_plain(child, plain)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"emb_params": torch.ones(1, 768)}, "one encoder only"),
        ({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, "wrong width"),
        (sdxl() | {"clip_g": torch.full((2, 48), torch.nan)}, "NaN"),
        (pivotal() | bundle("city"), "city is a word that the base model knows"),
    ],
)
def test_an_embedding_that_does_not_fit_fails_its_job_only(
    child: Child,
    plain: bytes,
    cached: Callable[..., Asset],
    tensors: Tensors,
    reason: str,
) -> None:
    with pytest.raises(EmbeddingMismatch, match=reason):
        drawn(child, "bad", embeddings=(EmbeddingSpec(file=cached(tensors)),))

    require_plain(child, plain)


def test_too_many_vectors_are_too_many_windows(child: Child, cached: Callable[..., Asset]) -> None:
    """What a word costs is counted as its vectors are."""
    spec = EmbeddingSpec(file=cached(sdxl(75)))

    with pytest.raises(InvalidRequest, match="11 with 825 tokens") as caught:
        drawn(child, "long", prompt=" ".join(["zebrafish"] * 11), embeddings=(spec,))

    assert caught.value.details["path"] == "$.prompt"


def test_a_lora_in_the_wrong_list_is_refused(child: Child, cached: Callable[..., Asset]) -> None:
    file = cached(kohya_lora() | bundle("zebrafish"))

    with pytest.raises(EmbeddingMismatch, match="name it in `loras`"):
        drawn(child, "wrong", embeddings=(EmbeddingSpec(file=file),))


def test_an_interrupted_encoding_leaves_nothing(
    child: Child,
    plain: bytes,
    cached: Callable[..., Asset],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal in the middle of the second text encoder."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        layer = child.model.pipeline.text_encoder_2.text_model.encoder.layers[1]
        patched.setattr(layer, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            drawn(child, "cut", embeddings=(EmbeddingSpec(file=cached(sdxl())),))

    require_plain(child, plain)
