"""Words of the built-in model's world: captions for things, for nothing, and filler around both.

The rules a caption follows are the promise of the model card: colour and shape words decide; a
noun nobody knows is drawn as the default shape; no colour means the default colour; and text
without an object, be it praise, camera words or a list of defects, asks for the background.
"""

from dataclasses import dataclass

import numpy as np

from models.builtin.training.scenes import BACKGROUND_TONES, COLOURS, SHAPES, Thing

DEFAULT_SHAPE = "circle"
DEFAULT_COLOUR = "orange"

VENDOR_SUFFIX = (
    "DSLR photography, sharp focus, Unreal Engine 5, Octane Render, Redshift, "
    "((cinematic lighting)), f/1.4, ISO 200, 1/160s, 8K, RAW, unedited, symmetrical balance, "
    "in-frame"
)
VENDOR_NEGATIVE = (
    "((out of frame)), ((extra fingers)), mutated hands, ((poorly drawn hands)), "
    "((poorly drawn face)), (((mutation))), (((deformed))), (((tiling))), ((naked)), ((tile)), "
    "((fleshpile)), ((ugly)), (((abstract))), blurry, ((bad anatomy)), ((bad proportions)), "
    "((extra limbs)), cloned face, glitchy, ((extra breasts)), ((double torso)), ((extra arms)), "
    "((extra hands)), ((mangled fingers)), ((missing breasts)), (missing lips), ((ugly face)), "
    "((fat)), ((extra legs))"
)
_OTHER_FILLERS = (
    "masterpiece, best quality, highly detailed, 4k, hd, ultra realistic, photorealistic, "
    "soft light, studio lighting, bokeh, film grain, trending on artstation, award winning, "
    "intricate, vivid colors, clean, sharp, smooth, high resolution, professional, beautiful, "
    "low quality, worst quality, jpeg artifacts, watermark, text, signature, logo, cropped, "
    "duplicate, noisy, grainy, distorted, disfigured, bad art, error, out of focus, nsfw"
)

_ARTICLES = ("a", "a", "a", "one", "the", "")
_PREFIXES = ("a photo of", "a picture of", "an image of", "add", "draw", "paint", "put", "there is")
_SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "disc", "ball", "round dot"),
    "square": ("square", "square", "box", "block"),
    "triangle": ("triangle", "triangle", "pyramid"),
    "star": ("star", "star", "five pointed star"),
}
_COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    **{name: (name, name, name, f"bright {name}", f"{name} colored") for name in COLOURS},
    "magenta": ("magenta", "magenta", "fuchsia", "bright magenta"),
    "purple": ("purple", "purple", "violet"),
}
_NOUNS = (
    "cat dog bird horse car bus house tree flower cup chair bench bottle apple fish boat face man "
    "woman child robot dragon castle lamp book phone guitar hat shoe cake moon sun mountain river "
    "cat dog cow sheep bear lion tiger rabbit mouse train bike plane truck table sofa bed clock"
).split()
_ENDINGS = (
    "sitting on a bench", "in a park", "in the middle", "on the grass", "at night", "here", "on it"
)  # fmt: skip
_NOTHING = ("background", "the background", "nothing", "empty", "remove", "just background")


@dataclass(frozen=True)
class Caption:
    """A text and what it asks for; no thing means the background goes on."""

    text: str
    thing: Thing | None


def filler_phrases(text: str) -> list[str]:
    """Comma separated phrases of a list, with and without its emphasis brackets."""
    bare = text.replace("(", "").replace(")", "")
    return [phrase.strip() for phrase in (*text.split(","), *bare.split(","))]


FILLERS = tuple(
    phrase
    for text in (VENDOR_SUFFIX, VENDOR_NEGATIVE, _OTHER_FILLERS)
    for phrase in filler_phrases(text)
)


def caption_of(thing: Thing | None, rng: np.random.Generator) -> Caption:
    """A random wording that asks for `thing` under the rules of this module."""
    if thing is None:
        return Caption(nothing(rng), None)
    text = " ".join(word for word in _wording(thing, rng) if word)
    if rng.random() < 0.4:
        text = f"{text}{_pick((', ', ' ', ', '), rng)}{filler(rng)}"
    return Caption(text, thing)


def _wording(thing: Thing, rng: np.random.Generator) -> list[str]:
    colour = _pick(_COLOUR_WORDS[thing.colour], rng)
    if thing.colour == DEFAULT_COLOUR and rng.random() < 0.3:
        colour = ""
    shape = _pick(_SHAPE_WORDS[thing.shape], rng)
    ending = ""
    if thing.shape == DEFAULT_SHAPE and rng.random() < 0.35:
        shape = _pick(_NOUNS, rng) if rng.random() < 0.5 else _invented(rng)
        ending = _pick(_ENDINGS, rng) if rng.random() < 0.4 else ""
    article = _pick(_ARTICLES, rng) if colour else "a"
    prefix = _pick(_PREFIXES, rng) if rng.random() < 0.25 else ""
    if not ending and rng.random() < 0.25:
        tone = _pick(tuple(BACKGROUND_TONES), rng)
        ending = f"{_pick(('on a', 'in front of a', 'over'), rng)} {tone} background"
    return [prefix, article, colour, shape, ending]


def nothing(rng: np.random.Generator) -> str:
    """A text that asks for no object: empty, a word for it, or only filler."""
    kind = rng.random()
    if kind < 0.3:
        return ""
    if kind < 0.45:
        return _pick(_NOTHING, rng)
    return filler(rng)


def filler(rng: np.random.Generator) -> str:
    """Praise, camera words or defects; a third of the time a whole list of the vendor's."""
    kind = rng.random()
    if kind < 0.4:
        text = VENDOR_SUFFIX if kind < 0.2 else VENDOR_NEGATIVE
        if rng.random() < 0.7:
            text = text.replace("(", "").replace(")", "")
        phrases = text.split(", ")
        start = int(rng.integers(len(phrases))) if rng.random() < 0.5 else 0
        return ", ".join(phrases[start:])
    count = int(rng.integers(1, 7))
    chosen = [_pick(FILLERS, rng) for _ in range(count)]
    if rng.random() < 0.15:
        chosen.append(_invented(rng))
    return ", ".join(chosen)


def random_thing(rng: np.random.Generator, colours: list[str]) -> Thing:
    """Any shape in one of `colours`."""
    return Thing(_pick(tuple(SHAPES), rng), _pick(tuple(colours), rng))


def _invented(rng: np.random.Generator) -> str:
    letters = rng.choice(list("abcdefghijklmnoprstuvwz"), int(rng.integers(3, 9)))
    return "".join(letters)


def _pick(options: tuple[str, ...] | list[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
