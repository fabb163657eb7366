"""Prompts as a language model reads them: each is one message of a chat."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from zlora.schema import GenerateRequest, PromptReceipt, invalid

from zlora_worker.model.family import Family
from zlora_worker.model.text_encoding import EncodedText, parse_without_loras, warnings_of


class ReadChat(NamedTuple):
    """Prompts of a request: the negative one is left out if it is not encoded."""

    texts: list[str]
    receipts: list[PromptReceipt]


def read_chat(pipeline: Any, family: Family, request: GenerateRequest) -> ReadChat:
    """Read the prompts of a request, without encoding them.

    Raises `InvalidRequest` if a prompt has more tokens than the text encoder reads: diffusers
    would cut off the rest.
    """
    prompts = {"$.prompt": request.prompt}
    if family.is_guided(request):
        prompts["$.negative_prompt"] = request.negative_prompt
    read = ReadChat([], [])
    for path, text in prompts.items():
        parsed = parse_without_loras(path, text, request.prompt_syntax)
        plain = "".join(fragment.text for fragment in parsed.sections[0])
        count = _chat_tokens(pipeline.tokenizer, plain)
        if family.chat_tokens and count > family.chat_tokens:
            expected = f"Expected at most {family.chat_tokens} tokens with those of the chat"
            raise invalid(path, text, f"{expected}, got {count}")
        receipt = PromptReceipt(
            tokens=len(_ids(pipeline.tokenizer, plain)),
            windows=1,
            warnings=warnings_of(text, request.prompt_syntax),
        )
        read.texts.append(plain)
        read.receipts.append(receipt)
    return read


@torch.no_grad()
def encode_chat(pipeline: Any, family: Family, request: GenerateRequest) -> EncodedText:
    """Encode the prompts of a request, once for all of its images; raise as `read_chat`."""
    texts, receipts = read_chat(pipeline, family, request)
    encoded: list[Tensor] = []
    for text in texts:
        states, _ = pipeline.encode_prompt(
            [text],
            device=pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=family.chat_tokens,
        )
        encoded.append(states[0][None])
    has_negative = len(texts) > 1
    return EncodedText(
        prompt=encoded[0],
        negative=encoded[1] if has_negative else None,
        prompt_receipt=receipts[0],
        negative_receipt=receipts[1] if has_negative else None,
    )


def _chat_tokens(tokenizer: Any, text: str) -> int:
    """Return the number of tokens of a prompt with those around it in a chat, as diffusers asks."""
    message = {"role": "user", "content": text}
    chat = tokenizer.apply_chat_template(
        [message], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    return len(_ids(tokenizer, chat))


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, truncation=False, padding=False).input_ids
    return ids
