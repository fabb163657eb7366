"""Prompts as the text encoders read them: tokens, windows, weights, hidden states.

A text encoder reads windows of 75 tokens, and one more at the beginning and the end. A longer text
has several windows, whose hidden states follow one another. A window ends after the last `.`, `,`,
`;` or `:` that fits, otherwise after the last word. The pooled vector is that of the first window.

Weights change the hidden states as in compel 2.5 (`EmbeddingsProvider`): each state is moved away
from, or towards, that of an empty text. A fragment with a weight below 1 is also masked, and the
states without it are blended with those of the whole text.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from zlora.prompt_syntax import MAX_WINDOWS, Fragment, ParsedPrompt, PromptSyntax, parse
from zlora.schema import GenerateRequest, PromptReceipt, invalid

from zlora_worker.model.family import Family

_BATCH: Final = 16  # windows that a text encoder reads at once
# Spellings of tokens after which a window may end, the best ones first.
_ENDS: Final = (re.compile(r"[.,;:]</w>"), re.compile(r".*</w>", re.DOTALL))
_TAG: Final = re.compile(r"<(?:lora|lyco):[^<>]+>")
_TAG_IS_TEXT: Final = "`<lora:...>` is text: only with prompt_syntax a1111 it names a LoRA"
_LEAST_WEIGHT: Final = 1e-5  # of a fragment that is blended: at 0 its counterpart would be infinite
# Token at the place of an embedding's vector. Not the end token: CLIP pools at the first of those.
_STAND_IN: Final = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class Embedding:
    """Textual inversion of one job: `token` in the text stands for these vectors.

    `vectors` has a tensor [n, width] for each text encoder, by its name in the pipeline. The token
    is found in upper and lower case, and not inside a longer word.
    """

    token: str
    vectors: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class EncodedText:
    """Prompts of a request: hidden states [1, tokens, width] and pooled vectors [1, width].

    Pooled vectors are None for a model that reads none. If there is no negative prompt its tensors
    are None, which diffusers takes for zeros. `uses` counts how often the token of each embedding
    is in the prompts.
    """

    prompt: Tensor
    pooled: Tensor | None = None
    negative: Tensor | None = None
    negative_pooled: Tensor | None = None
    prompt_receipt: PromptReceipt
    negative_receipt: PromptReceipt | None = None
    uses: tuple[int, ...] = ()


class ReadPrompts(NamedTuple):
    """Prompts of a request as their tokens: the negative one is left out if it is not encoded.

    `layers` has the layer that is read for each prompt, `plans` its sections by text encoder.
    """

    encoders: "list[_TextEncoder]"
    layers: list[int]
    plans: "list[list[list[_Section]]]"
    receipts: list[PromptReceipt]


def read_prompts(
    pipeline: Any, family: Family, request: GenerateRequest, embeddings: Sequence[Embedding] = ()
) -> ReadPrompts:
    """Read the prompts of a request, without encoding them.

    Raises `InvalidRequest` if a prompt has too many windows, or a text encoder too few layers.
    """
    encoders = [
        _TextEncoder(pipeline, name, tokenizer, embeddings, is_normed=family.normalizes_text)
        for name, tokenizer in family.text_encoders.items()
    ]
    layers = min(encoder.layers for encoder in encoders)
    skip = request.clip_skip or 0
    if skip >= layers:
        expected = f"Expected less than {layers}, the number of layers of a text encoder"
        raise invalid("$.clip_skip", skip, expected)
    # diffusers skips no layer for the negative prompt.
    prompts = {"$.prompt": (request.prompt, family.text_layer - skip)}
    denoiser = getattr(pipeline, family.denoiser)
    # With this dimension the denoiser reads the guidance scale itself.
    is_guided = family.is_guided(request) and denoiser.config.time_cond_proj_dim is None
    has_zeros = pipeline.config.get("force_zeros_for_empty_prompt", False)
    is_zeros = has_zeros and not request.negative_prompt
    if is_guided and not is_zeros:
        prompts["$.negative_prompt"] = (request.negative_prompt, family.text_layer)

    read = ReadPrompts(encoders, [layer for _, layer in prompts.values()], [], [])
    for path, (text, _) in prompts.items():
        parsed = parse_without_loras(path, text, request.prompt_syntax)
        plan = [[encoder.plan(section) for section in parsed.sections] for encoder in encoders]
        receipt = PromptReceipt(
            tokens=sum(section.tokens for section in plan[0]),
            windows=max(sum(len(section.ids) for section in sections) for sections in plan),
            warnings=warnings_of(text, request.prompt_syntax),
        )
        if receipt.windows > MAX_WINDOWS:
            found = f"{receipt.windows} with {receipt.tokens} tokens"
            raise invalid(path, text, f"Expected at most {MAX_WINDOWS} windows, got {found}")
        read.plans.append(plan)
        read.receipts.append(receipt)
    return read


@torch.no_grad()
def encode(
    pipeline: Any, family: Family, request: GenerateRequest, embeddings: Sequence[Embedding] = ()
) -> EncodedText:
    """Encode the prompts of a request, once for all of its images; raise as `read_prompts`."""
    encoders, layers, plans, receipts = read_prompts(pipeline, family, request, embeddings)
    # The denoiser reads both prompts at once, so they have equally many windows.
    windows = max(receipt.windows for receipt in receipts)
    encoded: list[Tensor | None] = []
    for plan, layer in zip(plans, layers, strict=True):
        states = [
            encoder.encode(sections, layer=layer, windows=windows)
            for encoder, sections in zip(encoders, plan, strict=True)
        ]
        encoded.append(torch.concat([hidden for hidden, _ in states], dim=-1))
        # Only the last text encoder has a projection.
        encoded.append(states[-1][1] if family.pools_text else None)
    tensors: dict[str, Any] = dict(
        zip(("prompt", "pooled", "negative", "negative_pooled"), encoded, strict=False)
    )
    return EncodedText(
        **tensors,
        prompt_receipt=receipts[0],
        negative_receipt=receipts[1] if len(receipts) > 1 else None,
        uses=tuple(
            sum(ids.count(first) for plan in plans for section in plan[0] for ids in section.ids)
            for first, *_ in encoders[0].ids.values()
        ),
    )


def parse_without_loras(path: str, text: str, syntax: PromptSyntax) -> ParsedPrompt:
    """Parse a prompt; raise `InvalidRequest` for LoRA tags, which would be ignored from here on."""
    parsed = parse(text, syntax)
    if parsed.loras:  # what resolves them also removes them
        raise invalid(path, text, "Expected no LoRA tags, or a worker that resolves them")
    return parsed


def warnings_of(text: str, syntax: PromptSyntax) -> tuple[str, ...]:
    """Return what the text may have been meant as, for the receipt."""
    if syntax == "plain" and _TAG.search(text):
        return (_TAG_IS_TEXT,)
    return ()


class _Token(NamedTuple):
    """One position of a window: `spelling` ends in `</w>` at the end of a word."""

    id: int
    spelling: str
    fragment: int


@dataclass
class _Section:
    """Text between two `BREAK`s, in windows of one text encoder.

    Negative `ids` stand for vectors of embeddings. `lowered` has the weight of each fragment whose
    weight is below 1, with its first and last position in all windows together.
    """

    tokens: int
    ids: list[list[int]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    lowered: list[tuple[float, int, int]] = field(default_factory=list)


class _TextEncoder:
    """A text encoder, with its tokenizer and its vectors of the embeddings."""

    def __init__(
        self,
        pipeline: Any,
        name: str,
        tokenizer: str,
        embeddings: Sequence[Embedding],
        *,
        is_normed: bool,
    ) -> None:
        self._model: Any = getattr(pipeline, name)
        self._tokenizer: Any = getattr(pipeline, tokenizer)
        self._is_normed = is_normed
        self.layers: int = self._model.config.num_hidden_layers
        self.ids: dict[str, list[int]] = {}  # of the vectors of each embedding, by its token
        self._length: int = self._tokenizer.model_max_length
        vectors: list[Tensor] = []
        for embedding in embeddings:
            start, own = len(vectors), embedding.vectors[name]
            vectors += own.to(self._model.device, self._model.dtype)
            self.ids[embedding.token.lower()] = [-1 - start - row for row in range(len(own))]
        self._vectors = torch.stack(vectors) if vectors else None
        # The longest first, because one token may begin with another.
        tokens = sorted((one.token for one in embeddings), key=len, reverse=True)
        self._embedded = re.compile(f"({'|'.join(map(_as_word, tokens))})", re.IGNORECASE)

    def plan(self, fragments: Sequence[Fragment]) -> _Section:
        """Divide the tokens of the fragments among windows."""
        tokens = [
            token for index, one in enumerate(fragments) for token in self._tokens(one.text, index)
        ]
        section = _Section(tokens=len(tokens))
        spans: dict[int, tuple[int, int]] = {}  # of the fragments: first and last position
        while tokens or not section.ids:
            position = self._length * len(section.ids)
            window, tokens = self._cut(tokens)
            for token in window:
                position += 1
                spans[token.fragment] = (spans.get(token.fragment, (position,))[0], position)
            fill = self._length - len(window) - 2
            section.ids.append(
                [
                    self._tokenizer.bos_token_id,
                    *(token.id for token in window),
                    self._tokenizer.eos_token_id,
                    *[self._tokenizer.pad_token_id] * fill,
                ]
            )
            weights = [fragments[token.fragment].weight for token in window]
            section.weights.append([1.0, *weights, 1.0, *[1.0] * fill])
        for index, (first, last) in spans.items():
            if fragments[index].weight < 1:
                section.lowered.append((fragments[index].weight, first, last))
        return section

    def encode(
        self, sections: Sequence[_Section], *, layer: int, windows: int
    ) -> tuple[Tensor, Tensor]:
        """Return the hidden states of a text in so many windows, and its pooled vector.

        Windows that the text does not need are those of an empty text.
        """
        states = [self._read_weighted(section, layer) for section in sections]
        hidden = torch.concat([one for one, _ in states])
        if len(hidden) < windows:
            empty = self._empty(layer).expand(windows - len(hidden), -1, -1)
            hidden = torch.concat([hidden, empty])
        return hidden.flatten(0, 1)[None], states[0][1][:1]

    def _tokens(self, text: str, fragment: int) -> Iterator[_Token]:
        """Return the tokens of a text; the last vector of an embedding ends a word."""
        parts = self._embedded.split(text) if self.ids else [text]
        for index, part in enumerate(parts):
            # Patterns also find letters such as the long s, which is no upper or lower case of s.
            if index % 2 and (found := self.ids.get(part.lower())):  # the token of an embedding
                *ids, last = found
                yield from (_Token(one, "", fragment) for one in ids)
                yield _Token(last, "</w>", fragment)
            elif part:
                ids = self._tokenizer(part, add_special_tokens=False, verbose=False).input_ids
                spellings = self._tokenizer.convert_ids_to_tokens(ids)
                yield from map(_Token, ids, spellings, repeat(fragment))

    def _cut(self, tokens: list[_Token]) -> tuple[list[_Token], list[_Token]]:
        """Return the tokens of a window, and those after it."""
        room = self._length - 2  # without the beginning and the end
        if len(tokens) <= room:
            return tokens, []
        for ends in _ENDS:
            for end in range(room, 0, -1):
                if ends.fullmatch(tokens[end - 1].spelling):
                    return tokens[:end], tokens[end:]
        return tokens[:room], tokens[room:]

    def _read_weighted(self, section: _Section, layer: int) -> tuple[Tensor, Tensor]:
        """Return the weighted hidden states [windows, tokens, width], and the pooled vectors."""
        ids = torch.tensor(section.ids)
        states, pooled = self._read(ids, layer)
        weights = torch.tensor(section.weights, device=states.device)[..., None]
        if bool((weights == 1).all()):
            return states, pooled
        empty = self._empty(layer).float()

        def weighted(states: Tensor, weights: Tensor) -> Tensor:
            states = states.float()
            return torch.where(weights == 1, states, empty + (states - empty) * weights)

        whole = weighted(states, weights)
        blended = whole.clone()
        # One row for each window with a lowered fragment: its number, its mask, its share.
        windows: list[int] = []
        masks: list[Tensor] = []
        shares: list[float] = []
        total = 1 + sum(_counterpart(weight) for weight, _, _ in section.lowered)
        for weight, first, last in section.lowered:
            mask = torch.ones(ids.shape, dtype=torch.long)
            mask.view(-1)[first : last + 1] = 0
            mask[:, (0, -1)] = 1
            for window in range(first // self._length, last // self._length + 1):
                windows.append(window)
                masks.append(mask[window])
                shares.append(_counterpart(weight) / total)
        if windows:
            without, _ = self._read(ids[windows], layer, torch.stack(masks))
            for one, window, share in zip(without, windows, shares, strict=True):
                change = weighted(one, weights[window])[0] - whole[window]
                blended[window] += change * share
        return blended.to(states.dtype), pooled

    def _empty(self, layer: int) -> Tensor:
        """Return the hidden states [1, tokens, width] of an empty text."""
        return self._read(torch.tensor(self.plan(()).ids), layer)[0]

    def _read(self, ids: Tensor, layer: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the hidden states of windows at one layer, and what else the encoder returns."""
        device = self._model.device
        states, pooled = [], []
        for start in range(0, len(ids), _BATCH):
            rows = slice(start, start + _BATCH)
            with self._vectors_in(ids[rows]) as known:
                output = self._model(
                    known,
                    None if mask is None else mask[rows].to(device),
                    output_hidden_states=True,
                )
            states.append(self._states(output, layer))
            pooled.append(output[0])
        return torch.concat(states), torch.concat(pooled)

    def _states(self, output: Any, layer: int) -> Tensor:
        """Return the hidden states at one layer as the denoiser reads them."""
        states: Tensor
        if not self._is_normed:
            states = output.hidden_states[layer]
        elif layer == -1:
            states = output.last_hidden_state
        else:
            # Only some releases of transformers have `text_model` here.
            model = getattr(self._model, "text_model", self._model)
            states = model.final_layer_norm(output.hidden_states[layer])
        return states

    @contextmanager
    def _vectors_in(self, ids: Tensor) -> Iterator[Tensor]:
        """Put the vectors of embeddings where the ids are negative; return ids that exist.

        The hook does nothing in any other call, even if a signal prevents its removal.
        """
        places = ids < 0
        known = ids.clamp(min=_STAND_IN).to(self._model.device)
        if self._vectors is None or not bool(places.any()):
            yield known
            return
        vectors = self._vectors[-1 - ids[places]]

        def put(_module: object, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if arguments[0].data_ptr() == known.data_ptr():
                output[places.to(output.device)] = vectors

        with self._model.get_input_embeddings().register_forward_hook(put):
            yield known


def _as_word(token: str) -> str:
    """Return a pattern that finds a token, but not inside a longer word."""
    before = r"(?<!\w)" if re.match(r"\w", token) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", token) else ""
    return f"{before}{re.escape(token)}{after}"


def _counterpart(weight: float) -> float:
    """Return the weight of the text without a fragment; that of the whole text is 1."""
    return math.tan((1 - max(weight, _LEAST_WEIGHT)) * math.pi / 2)
