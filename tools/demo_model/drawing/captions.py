"""Prompts for a scene in several wordings, and the words of the tokenizer."""

import string
from collections.abc import Callable
from random import Random
from typing import Final

from demo_model.drawing.canvas import STYLES
from demo_model.drawing.facts import COLOURS, EYES, HAIRS, OBJECTS, PEOPLE, SHAPES, TIMES
from demo_model.drawing.scenes import Scene

STYLE_WORDS: Final = {
    "anime": ("in anime style", "anime", "anime style"),
    "cyberpunk": ("cyberpunk", "in cyberpunk style"),
    "neon": ("with neon lights", "neon lights", "neon style"),
    "product": ("product photography", "studio photo", "product photography style"),
}
WHEN: Final = {
    "sunset": ("at sunset", "sunset"),
    "night": ("at night", "night"),
    "noon": ("at noon", "by day"),
    "sunrise": ("at sunrise", "sunrise"),
}
_LANDS: Final = (
    ("landscape", "hills", "landscape with hills"),
    ("landscape", "mountains", "landscape with mountains"),
    ("landscape", "sea", "beach", "landscape with sea"),
)
_CITIES: Final = ("city", "city skyline", "city with skyscrapers")
_PRAISE: Final = ("beautiful", "detailed", "nice", "simple", "small", "big", "high quality")
_OTHER_WORDS: Final = (
    "a an the of on in at by with and , . background photo photography studio product neon "
    "lights anime cyberpunk style day landscape hills mountains sea beach city skyline "
    "skyscrapers portrait hair eyes image picture drawing "
    "painting high low quality beautiful detailed nice simple small big blurry"
)
VOCABULARY: Final = sorted(
    {*_OTHER_WORDS.split(), *COLOURS, *HAIRS, *EYES, *PEOPLE, *TIMES, *OBJECTS, *SHAPES}
)  # each a token of its own

Facts = dict[str, int]


def caption(kind: str, scene: Scene, index: int, rng: Random) -> str:
    """Return one caption for the scene of this index; each names most of the facts."""
    facts = {name: int(values[index]) for name, values in vars(scene).items() if values.dim() == 1}
    praise = f"{rng.choice(_PRAISE)} " if rng.random() < 0.3 else ""
    return f"a {praise}{_WORDINGS[kind](facts, rng)}"


def with_idle_words(text: str, rng: Random) -> str:
    """Sometimes add the name of a style or an invented word, which the base model ignores."""
    if rng.random() < 0.25:
        text = with_style_word(text, rng.choice(STYLES), rng)
    if rng.random() < 0.12:
        text += " " + "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 7)))
    return text


def with_style_word(text: str, style: str, rng: Random) -> str:
    """Add the name of a style before or after the caption."""
    word = rng.choice(STYLE_WORDS[style])
    if text.startswith("a ") and not word.startswith(("in ", "with ")) and rng.random() < 0.5:
        return f"a {word} {text[2:]}"
    return f"{text}{rng.choice((' ', ', '))}{word}"


def _landscape(facts: Facts, rng: Random) -> str:
    return rng.choice(_LANDS[facts["land"]]) + _when(facts, rng)


def _city(facts: Facts, rng: Random) -> str:
    return rng.choice(_CITIES) + _when(facts, rng)


def _when(facts: Facts, rng: Random) -> str:
    return f" {rng.choice(WHEN[TIMES[facts['time']]])}" if rng.random() < 0.92 else ""


def _portrait(facts: Facts, rng: Random) -> str:
    person = f" of a {PEOPLE[facts['person']]}" if rng.random() < 0.75 else ""
    hair, eyes = f"{list(HAIRS)[facts['hair']]} hair", f"{list(EYES)[facts['eyes']]} eyes"
    looks = rng.choices(
        (f" with {hair}", f" with {hair} and {eyes}", f" with {eyes}", ""), (0.4, 0.25, 0.1, 0.25)
    )[0]
    return f"portrait{person}{looks}" + (_before(facts, rng) if rng.random() < 0.65 else "")


def _object(facts: Facts, rng: Random) -> str:
    named = f"{list(COLOURS)[facts['colour']]} {OBJECTS[facts['thing']]}"
    ground = f"{list(COLOURS)[facts['background']]} background"
    if (lot := rng.random()) < 0.2:
        return f"product photography, {ground}"
    return (
        f"product photography of a {named}, {ground}" if lot < 0.3 else named + _before(facts, rng)
    )


def _shape(facts: Facts, rng: Random) -> str:
    named = f"{list(COLOURS)[facts['colour']]} {SHAPES[facts['shape']]}"
    return named + (_before(facts, rng) if rng.random() < 0.9 else "")


def _before(facts: Facts, rng: Random) -> str:
    return f"{rng.choice((' on a ', ', '))}{list(COLOURS)[facts['background']]} background"


_WORDINGS: Final[dict[str, Callable[[Facts, Random], str]]] = {
    "landscape": _landscape,
    "portrait": _portrait,
    "city": _city,
    "object": _object,
    "shape": _shape,
}
