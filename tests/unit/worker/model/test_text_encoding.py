"""Prompts of any length and weight: the oracles are compel, and diffusers' own pipeline."""

import random
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import pytest
import torch
from compel import ReturnedEmbeddingsType
from compel.embeddings_provider import EmbeddingsProvider, SplitLongTextMode
from support.fakes import a_request, pixels
from torch import Tensor
from zlora.errors import InvalidRequest
from zlora.prompt_syntax import MAX_WINDOWS, Fragment, PromptSyntax, parse
from zlora.schema import PromptReceipt, parse_request
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.model.schedulers import scheduler_for
from zlora_worker.model.text_encoding import Embedding, EncodedText
from zlora_worker.model.vae import rgb

ENCODERS: Final = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
WORDS: Final = "a beautiful, anime portrait of the city at night. neon lights; unknown 漢字 é 🎨"
LONG: Final = "photography, " * 100  # 200 tokens, three windows

Encode: TypeAlias = Callable[..., EncodedText]


@pytest.fixture
def text_of(model: Pipeline) -> Encode:
    def encoded(prompt: str, *, embeddings: Any = (), **fields: Any) -> EncodedText:
        return model.encode(a_request(prompt=prompt, **fields), embeddings)

    return encoded


def pooled_of(text: EncodedText) -> Tensor:
    """Return the pooled vector, which every text for SDXL has."""
    assert text.pooled is not None
    return text.pooled


def mixed_prompt(rng: random.Random) -> str:
    """Return words, up to two breaks, and a few weights: compel reads the text again for each."""
    weighted = ["(neon:1.4)", "[city]", "((a b))", "(very [dark: red):1.2)", "(a 🎨:0)", "(a:-1)"]
    words = rng.choices([*WORDS.split(" "), r"\(1990\)"], k=rng.choice((1, 4, 20, 40)))
    for word in rng.choices([*weighted, "BREAK"], k=2):
        words.insert(rng.randint(0, len(words)), word)
    return " ".join(words)


def prompts() -> Iterator[tuple[PromptSyntax, str]]:
    """Return 200 prompts, each with its syntax."""
    rng = random.Random(7)
    for _ in range(80):
        yield "plain", " ".join(rng.choices(WORDS.split(" "), k=rng.choice((1, 8, 20, 60))))
    for _ in range(110):
        yield "a1111", mixed_prompt(rng)
    yield from (
        ("plain", text) for text in ("", " ", "night, " * 180, "\n", "x" * 400, LONG, "🎨" * 70)
    )
    # Ten thousand characters, most of them spaces that are no tokens.
    yield "plain", "portrait of a city at night, ".replace(" ", " " * 20)[:100] * 100
    yield "a1111", ("(neon   lights:1.1)," + " " * 80) * 100
    yield "a1111", "(" + "night city " * 40 + ":0.5) end [of] BREAK (a:1.2)"


class Compel:
    """The arithmetic of compel; sections and fragments come from our parser."""

    def __init__(self, model: Pipeline) -> None:
        self.model = model.pipeline
        self.providers = [
            EmbeddingsProvider(
                getattr(self.model, tokenizer),
                getattr(self.model, encoder),
                truncate=False,
                split_long_text_mode=SplitLongTextMode.PHRASES,
                returned_embeddings_type=(
                    ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
                ),
            )
            for encoder, tokenizer in ENCODERS
        ]

    @torch.no_grad()
    def encode(self, sections: tuple[tuple[Fragment, ...], ...]) -> tuple[Tensor, Tensor]:
        """Return the hidden states of both encoders, and the pooled vector of the first window."""
        states, windows = [], []
        for provider in self.providers:
            found = []
            for section in sections:
                # compel fails for a weight below 1 on a text without tokens.
                used = [one for one in section if one.text.strip()] or [Fragment("")]
                found.append(
                    provider.get_embeddings_for_weighted_prompt_fragments(
                        [[fragment.text for fragment in used]],
                        [[fragment.weight for fragment in used]],
                        should_return_tokens=True,
                    )
                )
            states.append(torch.concat([state for state, _ in found], dim=1))
            windows.append(found[0][1][:, :77])
        return torch.concat(states, dim=-1), self.model.text_encoder_2(windows[1]).text_embeds

    def pooled(self, text: str) -> Tensor:
        """Return the pooled vector of a text in one window."""
        found: Tensor = self.providers[1].get_pooled_embeddings([text])
        return found


def test_200_prompts_have_the_hidden_states_and_the_pooled_vector_of_compel(
    model: Pipeline, text_of: Encode
) -> None:
    compel, windows = Compel(model), []
    for syntax, prompt in prompts():
        encoded = text_of(prompt, prompt_syntax=syntax)

        hidden, pooled = compel.encode(parse(prompt, syntax).sections)

        assert encoded.prompt.shape == hidden.shape
        assert (encoded.prompt - hidden).abs().max() <= 1e-5, prompt
        assert (pooled_of(encoded) - pooled).abs().max() <= 1e-5, prompt
        if syntax == "plain" and encoded.prompt_receipt.windows == 1:
            assert torch.equal(pooled_of(encoded), compel.pooled(prompt))
        windows.append(encoded.prompt_receipt.windows)
    assert len(windows) == 200
    assert set(windows) >= {1, 2, 3, 4, 5}


def test_1000_generated_prompts_are_read_or_refused(text_of: Encode) -> None:
    """Every eighth one is encoded too, which takes most of the time."""
    rng = random.Random(11)
    pieces = [*"()[]|:<>\\ ,.;-+0123aé🎨\n", ":1.2)", ":0.5)", "BREAK", "night", "<|endoftext|>"]
    read = 0
    for _ in range(1000):
        request = {"prompt": "".join(rng.choices(pieces, k=rng.choice((1, 5, 20))))}
        try:
            parse_request(request | {"prompt_syntax": "a1111"})
        except InvalidRequest:
            continue
        read += 1
        if read % 8 == 0:
            text = text_of(**request, prompt_syntax="a1111", guidance_scale=1.0)
            assert text.prompt.isfinite().all()
    assert read > 500


# --- images


def drawn_by_diffusers(model: Pipeline, seed: int, **fields: Any) -> bytes:
    """Draw with diffusers' own encoding of the prompts, from the same noise."""
    generator = torch.Generator("cpu").manual_seed(seed)
    model.pipeline.scheduler = scheduler_for(model.base.scheduler, a_request(), seed=seed)
    output = model.pipeline(
        num_inference_steps=1,
        latents=model.denoising._noise(*model.size(a_request()), [generator]),
        output_type="pt",
        **{"prompt": "a city at night", "guidance_scale": 7.5} | fields,
    )
    return rgb(output.images[0]).numpy().tobytes()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": ""},
        {"prompt": "photo " * 75, "negative_prompt": "blurry, " * 37},
        {"negative_prompt": " "},
        {"prompt": "a <|endoftext|> portrait 🎨", "negative_prompt": "low quality"},
        {"guidance_scale": 1.0, "negative_prompt": "blurry"},
        {"clip_skip": 1, "negative_prompt": "blurry"},
        {"clip_skip": 0},
    ],
)
def test_prompts_in_one_window_draw_what_diffusers_draws_from_the_text(
    model: Pipeline, fields: dict[str, Any]
) -> None:
    assert pixels(model, seed=3, **fields) == drawn_by_diffusers(model, 3, **fields)


def test_the_end_of_a_long_prompt_changes_the_image(model: Pipeline) -> None:
    """Both prompts have 201 tokens, of which diffusers reads the first 75."""
    ends = [f"{LONG} {end}" for end in ("sunset", "night")]

    assert len({pixels(model, prompt=end) for end in ends}) == 2
    assert len({pixels(model, negative_prompt=end) for end in ends}) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a (city:1.4) at night"},
        {"prompt": "a [city] at night"},
        {"prompt": "a city BREAK at night"},
        {"negative_prompt": "(blurry)"},
        {"clip_skip": 1},
    ],
)
def test_a_field_changes_its_image_and_not_that_of_the_next_job(
    model: Pipeline, fields: dict[str, Any]
) -> None:
    plain: dict[str, Any] = {"prompt": "a city at night", "negative_prompt": "blurry"}
    before = pixels(model, **plain)

    changed = pixels(model, **plain | {"prompt_syntax": "a1111"} | fields)

    assert changed != before
    assert pixels(model, **plain) == before


def test_brackets_of_a_plain_prompt_are_text(model: Pipeline) -> None:
    prompt = "a (city:1.4) BREAK [night]"

    assert pixels(model, prompt=prompt) == drawn_by_diffusers(model, 7, prompt=prompt)


# --- windows


def test_a_window_ends_after_a_phrase_or_else_after_a_word(
    model: Pipeline, text_of: Encode
) -> None:
    """The states of a window are those of its text alone."""
    phrase = "a night, "  # three tokens
    for first, second in (
        (phrase * 24 + "a photo,", "a sunset photography photo"),
        ("photo " * 75, "a sunset"),
        ("photo " * 73, "zzzz"),  # four tokens of one word
    ):
        encoded = text_of(first + second)

        states = [text_of(part).prompt for part in (first, second)]
        assert (encoded.prompt - torch.concat(states, dim=1)).abs().max() < 1e-5
        assert (pooled_of(encoded) - pooled_of(text_of(first))).abs().max() < 1e-5


def test_both_prompts_have_as_many_windows_as_the_longer_one(text_of: Encode) -> None:
    empty = text_of("").prompt
    for prompt, negative in ((LONG, "blurry"), ("blurry", LONG)):
        encoded = text_of(prompt, negative_prompt=negative)

        assert encoded.negative is not None
        assert encoded.prompt.shape == encoded.negative.shape == (1, 3 * 77, 80)
        short = encoded.negative if prompt == LONG else encoded.prompt
        assert (short[:, 77:] - torch.concat([empty, empty], dim=1)).abs().max() < 1e-5


def test_an_empty_negative_prompt_is_zeros_in_all_windows(model: Pipeline) -> None:
    seen: list[Tensor] = []
    hook = model.pipeline.unet.register_forward_pre_hook(
        lambda _module, _arguments, keywords: seen.append(keywords["encoder_hidden_states"]),
        with_kwargs=True,
    )
    with hook:
        pixels(model, prompt=LONG)

    negative, positive = seen[0]
    assert len(negative) == 3 * 77
    assert not negative.any()
    assert positive.any(dim=-1).all()


def test_a_model_that_reads_an_empty_negative_prompt_as_text_does_so(
    model: Pipeline, text_of: Encode
) -> None:
    model.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    try:
        encoded = text_of(LONG)
    finally:
        model.pipeline.register_to_config(force_zeros_for_empty_prompt=True)

    assert encoded.negative is not None
    assert (encoded.negative[:, :77] - text_of("").prompt).abs().max() < 1e-5


def test_a_negative_prompt_that_is_not_used_is_not_encoded(text_of: Encode) -> None:
    encoded = text_of("a city", negative_prompt=LONG, guidance_scale=1.0)

    assert encoded.negative is None
    assert encoded.negative_receipt is None
    assert encoded.prompt.shape[1] == 77


def test_the_receipts_count_tokens_and_windows(text_of: Encode) -> None:
    encoded = text_of(LONG, negative_prompt="a blurry, [blurry] BREAK photo", prompt_syntax="a1111")

    assert encoded.prompt_receipt == PromptReceipt(tokens=200, windows=3)
    assert encoded.negative_receipt == PromptReceipt(tokens=5, windows=2)


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_more_than_ten_windows_are_refused_with_their_count(text_of: Encode, field: str) -> None:
    prompts = {"prompt": "a city"} | {field: "photo " * 750}
    assert text_of(**prompts).prompt.shape[1] == MAX_WINDOWS * 77

    with pytest.raises(InvalidRequest, match="at most 10 windows, got 11 with 751 tokens") as error:
        text_of(**prompts | {field: "photo " * 751})

    assert error.value.details["path"] == f"$.{field}"


def test_a_model_with_too_few_layers_refuses_clip_skip(text_of: Encode) -> None:
    """The text encoders have three layers; SDXL reads the second one."""
    assert not torch.equal(text_of("a", clip_skip=2).prompt, text_of("a", clip_skip=1).prompt)

    with pytest.raises(InvalidRequest, match="less than 3") as error:
        text_of("a", clip_skip=3)

    assert error.value.details["path"] == "$.clip_skip"


def test_a_lora_tag_that_nothing_resolved_is_refused(text_of: Encode) -> None:
    with pytest.raises(InvalidRequest, match="LoRA tags"):
        text_of("a <lora:anime:1>", prompt_syntax="a1111")


# --- embeddings


def rows(model: Pipeline, words: str) -> dict[str, Tensor]:
    """Return the vectors of some words of the vocabulary, of both text encoders."""
    return {
        encoder: getattr(model.pipeline, encoder)
        .get_input_embeddings()
        .weight[getattr(model.pipeline, tokenizer)(words, add_special_tokens=False).input_ids]
        .clone()
        for encoder, tokenizer in ENCODERS
    }


def embedding(model: Pipeline, token: str, words: str) -> Embedding:
    return Embedding(token=token, vectors=rows(model, words))


@pytest.mark.parametrize(
    ("prompt", "same", "uses"),
    [
        ("<mine>", "night city", (1, 0, 0)),
        ("a <MINE>, portrait", "a night city, portrait", (1, 0, 0)),
        ("a<mine><mine>b", "a night city night city b", (2, 0, 0)),
        ("a <mine> <mine-2> at", "a night city photo at", (1, 1, 0)),
        ("my_style, my_styles, notmy_style", "sunset, my_styles, notmy_style", (0, 0, 1)),
        ("my_\u017ftyle, MY_STYLE", "my_\u017ftyle, sunset", (0, 0, 1)),  # the long s is not an s
        ("(<mine>:1.3) [at <mine>]", "(night city:1.3) [at night city]", (2, 0, 0)),
        ("photo, " * 37 + "<mine> photo", "photo, " * 37 + "night city photo", (1, 0, 0)),
    ],
)
def test_a_token_is_read_as_its_vectors(
    model: Pipeline, text_of: Encode, prompt: str, same: str, uses: tuple[int, ...]
) -> None:
    """With the vectors of known words the states are those of the words."""
    tokens = {"<mine>": "night city", "<mine-2>": "photo", "My_Style": "sunset"}
    embeddings = [embedding(model, token, words) for token, words in tokens.items()]

    encoded = text_of(prompt, embeddings=embeddings, prompt_syntax="a1111")

    expected = text_of(same, prompt_syntax="a1111")
    assert (encoded.prompt - expected.prompt).abs().max() < 1e-5
    assert (pooled_of(encoded) - pooled_of(expected)).abs().max() < 1e-5
    assert encoded.prompt_receipt == expected.prompt_receipt
    assert encoded.uses == uses


def test_a_token_has_letters_whose_lower_case_is_longer(model: Pipeline, text_of: Encode) -> None:
    """The lower case of a capital I with a dot has two characters."""
    embeddings = [embedding(model, "myst\u0130le", "sunset")]

    encoded = text_of("a MYST\u0130LE", embeddings=embeddings)

    assert encoded.uses == (1,)
    assert (encoded.prompt - text_of("a sunset").prompt).abs().max() < 1e-5


def test_the_vectors_of_one_token_stay_in_one_window(model: Pipeline, text_of: Encode) -> None:
    two = embedding(model, "<mine>", "night city")

    encoded = text_of("photo " * 74 + "<mine>", embeddings=[two])

    states = [text_of(part).prompt for part in ("photo " * 74, "night city")]
    assert (encoded.prompt - torch.concat(states, dim=1)).abs().max() < 1e-5


def test_the_vectors_of_a_job_leave_nothing_behind(
    model: Pipeline, text_of: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if the hook that puts them in is never removed, as after a signal."""
    before = pixels(model)
    sizes = [len(getattr(model.pipeline, tokenizer)) for _, tokenizer in ENCODERS]
    tables = [rows(model, "night") for _ in ENCODERS]
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "remove", lambda _handle: None)

    text_of("a <mine> at night", embeddings=[embedding(model, "<mine>", "sunset photo")])
    monkeypatch.undo()

    table = model.pipeline.text_encoder.get_input_embeddings()
    assert len(table._forward_hooks) == 1
    assert pixels(model) == before
    assert pixels(model, prompt="<mine>") == drawn_by_diffusers(model, 7, prompt="<mine>")
    assert sizes == [len(getattr(model.pipeline, tokenizer)) for _, tokenizer in ENCODERS]
    for now, then in zip([rows(model, "night") for _ in ENCODERS], tables, strict=True):
        assert all(torch.equal(now[name], then[name]) for name in now)
    for encoder, _ in ENCODERS:
        getattr(model.pipeline, encoder).get_input_embeddings()._forward_hooks.clear()


def test_the_pooled_vector_is_read_at_the_end_of_the_text_in_both_forms_of_clip(
    model: Pipeline, text_of: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Configurations of old, such as SDXL's, find the end as the greatest id of the window."""
    mine = [embedding(model, "<mine>", "night city")]
    expected = pooled_of(text_of("a night city"))
    for end in (model.pipeline.tokenizer_2.eos_token_id, 2):
        monkeypatch.setattr(model.pipeline.text_encoder_2.text_model, "eos_token_id", end)

        assert torch.equal(pooled_of(text_of("a <mine>", embeddings=mine)), expected)


@pytest.mark.parametrize(
    ("prompt", "count"), [("a city <lora:neon:0.8>", 1), ("a city <3", 0), ("<view> of a city", 0)]
)
def test_a_tag_in_plain_text_is_text_and_a_warning(
    model: Pipeline, prompt: str, count: int
) -> None:
    text = model.encode(a_request(prompt=prompt))

    assert len(text.prompt_receipt.warnings) == count
