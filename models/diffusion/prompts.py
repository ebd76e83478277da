"""Prompts to embeddings: emphasis, chunks beyond 77 tokens, the embedding cache.

The syntax and the arithmetic are those of AUTOMATIC1111's web UI, which prompts are written for
(`modules/prompt_parser.py`, `sd_hijack_clip.py`, `sd_emphasis.py`); a prompt without emphasis that
fits into one chunk is encoded as diffusers does.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from itertools import groupby, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from models.acceleration.transfers import upload
from models.diffusion.prompt_syntax import without_extra_networks
from models.errors import InvalidInput, Violation
from models.params import BREAK, CHUNK_TOKENS, MAX_PROMPT_CHUNKS

MAX_WEIGHT = 100.0
"""Weights are held within ± this: higher ones leave the range of half precision."""

CACHED_PROMPTS = 64

CALL_CHUNKS = 32
"""Chunks of one call of a text encoder at most."""

_COMMA_WINDOW = 20
"""A full chunk is cut after its last comma if that is among this many last tokens."""

_ROUND = 1.1
_SQUARE = 1 / 1.1

# No two repetitions that could match the same characters stand side by side: linear time.
_SYNTAX = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)"
    r"|:\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<plain>[^\\()\[\]:]+|:)"
)


class WeightedText(NamedTuple):
    text: str
    weight: float


class WeightedToken(NamedTuple):
    id: int
    weight: float


def parse_prompt(prompt: str) -> list[list[WeightedText]]:
    """The prompt's sections, which `BREAK` divides; no two neighbours in one have equal weights.

    `(x)` weighs 1.1, `[x]` 1 / 1.1, `(x:1.3)` 1.3, nested ones their product. A backslash makes the
    bracket or backslash after it literal, and is dropped elsewhere. A bracket never closed reaches
    to the end of the prompt, one never opened is literal.
    """
    reader = _Reader(len(prompt))
    for match in _SYNTAX.finditer(prompt):
        kind, found = match.lastgroup, match[0]
        if kind == "escaped":
            reader.add(match["escaped"])
        elif kind == "weight" and reader.is_open("("):
            reader.close("(", float(match["weight"]))
        elif found in ("(", "["):
            reader.open(found)
        elif found == ")" and reader.is_open("("):
            reader.close("(", _ROUND)
        elif found == "]" and reader.is_open("["):
            reader.close("[", _SQUARE)
        else:
            reader.add_with_breaks(found)
    return reader.finish()


class _Reader:
    """The state of reading one prompt: pieces so far, their weights, brackets still open."""

    def __init__(self, max_pieces: int) -> None:
        self._pieces: list[str | None] = []  # None is a BREAK
        # In one array, because deeply nested brackets multiply the same weights again and again.
        self._weights = np.ones(max_pieces)
        self._opened: dict[str, list[int]] = {"(": [], "[": []}

    def add(self, text: str) -> None:
        self._pieces.append(text)

    def add_with_breaks(self, text: str) -> None:
        sections = BREAK.split(text)
        for index, section in enumerate(sections):
            if index > 0:
                self._pieces.append(None)
                section = section.lstrip()
            if index < len(sections) - 1:
                section = section.rstrip()
            self._pieces.append(section)

    def is_open(self, bracket: str) -> bool:
        return bool(self._opened[bracket])

    def open(self, bracket: str) -> None:
        self._opened[bracket].append(len(self._pieces))

    def close(self, bracket: str, factor: float) -> None:
        # Round and square brackets may overlap, so this is a range of pieces, not a tree.
        inside = self._weights[self._opened[bracket].pop() : len(self._pieces)]
        inside *= _within_limits(factor)
        np.clip(inside, -MAX_WEIGHT, MAX_WEIGHT, out=inside)

    def finish(self) -> list[list[WeightedText]]:
        for bracket, factor in (("(", _ROUND), ("[", _SQUARE)):
            while self.is_open(bracket):
                self.close(bracket, factor)
        sections: list[list[WeightedText]] = [[]]
        for piece, weight in zip(self._pieces, self._weights.tolist(), strict=False):
            if piece is None:
                sections.append([])
            elif piece:
                sections[-1].append(WeightedText(piece, weight))
        return [list(_merge_equal(section)) for section in sections]


def _within_limits(weight: float) -> float:
    return max(-MAX_WEIGHT, min(MAX_WEIGHT, weight))


def _merge_equal(texts: Iterable[WeightedText]) -> Iterator[WeightedText]:
    for weight, group in groupby(texts, key=lambda piece: piece.weight):
        yield WeightedText("".join(piece.text for piece in group), weight)


def split_chunks(tokens: list[WeightedToken], comma_id: int) -> Iterator[list[WeightedToken]]:
    """At most 75 tokens each, at least one chunk; a comma near the end draws the cut to itself."""
    start = 0
    while len(tokens) - start > CHUNK_TOKENS:
        end = start + CHUNK_TOKENS
        if tokens[end].id != comma_id:
            end = _after_last_comma(tokens, end, comma_id)
        yield tokens[start:end]
        start = end
    yield tokens[start:]


def _after_last_comma(tokens: list[WeightedToken], end: int, comma_id: int) -> int:
    for position in range(end, end - _COMMA_WINDOW, -1):
        if tokens[position - 1].id == comma_id:
            return position
    return end


class Layer(Enum):
    """Which of a text encoder's states a UNet was trained on; clip_skip counts from there."""

    LAST = 0
    """The last, after the encoder's final norm: Stable Diffusion 1 and 2."""
    PENULTIMATE = 1
    """The last but one, as it is: SDXL."""


class EncodedPrompt(NamedTuple):
    """states: `(1, 77 * chunks, d)`; pooled: `(1, d)` of the first chunk, None without a head."""

    states: Tensor
    pooled: Tensor | None


class PromptKey(NamedTuple):
    """What decides a text's states. clip_skip: as in diffusers."""

    text: str
    clip_skip: int = 0


class _ChunkStates(NamedTuple):
    """A text encoder's output for one chunk: the states of every layer, the last one also normed.

    layers: `(1, 77, d)` each; last: `(1, 77, d)`; pooled: `(1, d)`, None without a head.
    """

    layers: Sequence[Tensor]
    last: Tensor
    pooled: Tensor | None


class PromptEncoder:
    """Embeds prompts with one of a checkpoint's text encoders and remembers the last ones.

    The tensors are shared with the cache: read them, do not write into them.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        device: torch.device,
        dtype: torch.dtype,
        layer: Layer = Layer.LAST,
    ) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._device = device
        self._dtype = dtype
        self._layer = layer
        self._comma_id = self._token_ids(",")[-1]
        self._cached: OrderedDict[PromptKey, EncodedPrompt] = OrderedDict()

    def remember(self, keys: Iterable[PromptKey]) -> None:
        """Encode what is not in the cache with as few calls as possible, for later `encode`s.

        A text's numbers then depend on its neighbours, in the last bits.
        Raises: InvalidInput.
        """
        self._recall(dict.fromkeys(keys, "prompt"), CALL_CHUNKS)

    def encode(self, text: str, clip_skip: int = 0, *, field: str = "prompt") -> Tensor:
        """`(1, 77 * chunks, d)`, on the encoder's device and in its dtype.

        clip_skip: as in diffusers; 0 is the family's own layer, 1 the one before.
        Raises: InvalidInput, naming `field` for a text of more than 32 chunks, or `clip_skip`.
        """
        return self._encoded(text, clip_skip, field).states

    def pool(self, text: str, clip_skip: int = 0, *, field: str = "prompt") -> Tensor:
        """`(1, d)`: the projected embedding of the first chunk, without emphasis.

        clip_skip, field: as given to `encode`, whose work is in the cache; they change nothing.
        Source: A1111's `sd_hijack_clip.py`; diffusers knows one chunk only.
        """
        pooled = self._encoded(text, clip_skip, field).pooled
        if pooled is None:
            raise ValueError("this text encoder has no projection")
        return pooled

    def encode_pair(
        self, prompt: str, negative_prompt: str, clip_skip: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Both texts, equally long: the shorter is followed by encoded empty chunks.

        Raises: InvalidInput.
        """
        positive = self.encode(prompt, clip_skip)
        negative = self.encode(negative_prompt, clip_skip, field="negative_prompt")
        length = max(positive.shape[1], negative.shape[1])
        return (
            self._extend(positive, length, clip_skip),
            self._extend(negative, length, clip_skip),
        )

    def _extend(self, states: Tensor, length: int, clip_skip: int) -> Tensor:
        if states.shape[1] == length:
            return states
        empty = self.encode("", clip_skip)
        missing_chunks = (length - states.shape[1]) // empty.shape[1]
        return torch.cat([states, *[empty] * missing_chunks], dim=1)

    def _encoded(self, text: str, clip_skip: int, field: str) -> EncodedPrompt:
        # One by one, so that a chunk's numbers do not depend on its neighbours in a batch.
        (found,) = self._recall({PromptKey(text, clip_skip): field}, call_chunks=1)
        return found

    def _recall(self, fields: dict[PromptKey, str], call_chunks: int) -> list[EncodedPrompt]:
        """Look up texts in the cache after encoding the missing ones. fields: named in errors."""
        chunks = {
            key: self._checked_chunks(key, field)
            for key, field in fields.items()
            if key not in self._cached
        }
        states = iter(self._run([chunk for each in chunks.values() for chunk in each], call_chunks))
        for key, own in chunks.items():
            self._cached[key] = self._join(key, own, list(islice(states, len(own))))
        for key in fields:
            self._cached.move_to_end(key)
        found = [self._cached[key] for key in fields]
        while len(self._cached) > CACHED_PROMPTS:
            self._cached.popitem(last=False)
        return found

    def _checked_chunks(self, key: PromptKey, field: str) -> list[list[WeightedToken]]:
        """Raises: InvalidInput."""
        layers = self._text_encoder.config.num_hidden_layers - self._layer.value
        if not 0 <= key.clip_skip <= layers:
            raise InvalidInput([Violation("clip_skip", 0, layers)])
        chunks = self._chunks(key.text)
        if len(chunks) > MAX_PROMPT_CHUNKS:
            reason = f"must not need more than {MAX_PROMPT_CHUNKS} chunks of tokens"
            raise InvalidInput([Violation(field, reason=reason)])
        return chunks

    def _join(
        self, key: PromptKey, chunks: list[list[WeightedToken]], states: list[_ChunkStates]
    ) -> EncodedPrompt:
        chosen = [
            self._weighted(chunk, self._chosen_states(each, key.clip_skip))
            for chunk, each in zip(chunks, states, strict=True)
        ]
        pooled = states[0].pooled
        return EncodedPrompt(
            torch.cat(chosen, dim=1).to(self._dtype),  # (1, 77 * chunks, d)
            None if pooled is None else pooled.to(self._dtype),
        )

    def _chunks(self, text: str) -> list[list[WeightedToken]]:
        known = without_extra_networks(text)
        sections = [self._tokens(section) for section in parse_prompt(known)]
        if len(sections) > 1 and not sections[-1]:
            del sections[-1]  # A BREAK at the very end begins nothing.
        return [chunk for tokens in sections for chunk in split_chunks(tokens, self._comma_id)]

    def _tokens(self, section: list[WeightedText]) -> list[WeightedToken]:
        return [
            WeightedToken(token_id, weight)
            for text, weight in section
            for token_id in self._token_ids(text)
        ]

    def _token_ids(self, text: str) -> list[int]:
        # Lone surrogates, which JSON can carry, are no text to the tokenizer.
        encodable = text.encode("utf-8", "replace").decode()
        # Quiet, because it would warn of more than 77 tokens, which are split afterwards.
        ids: list[int] = self._tokenizer(
            encodable, add_special_tokens=False, verbose=False
        ).input_ids
        return ids

    @torch.no_grad()
    def _run(self, chunks: list[list[WeightedToken]], call_chunks: int) -> list[_ChunkStates]:
        """The text encoder's output for each chunk, so many of them to a call."""
        found = []
        for start in range(0, len(chunks), call_chunks):
            ids = [self._padded_ids(chunk) for chunk in chunks[start : start + call_chunks]]
            output = self._text_encoder(
                upload(torch.tensor(ids), self._device), output_hidden_states=True
            )
            pooled = output.get("text_embeds")
            found += [
                _ChunkStates(
                    [layer[row : row + 1] for layer in output.hidden_states],
                    output.last_hidden_state[row : row + 1],
                    None if pooled is None else pooled[row : row + 1],
                )
                for row in range(len(ids))
            ]
        return found

    def _padded_ids(self, chunk: list[WeightedToken]) -> list[int]:
        """The 77 tokens the encoder reads."""
        return [
            self._tokenizer.bos_token_id,
            *(token.id for token in chunk),
            self._tokenizer.eos_token_id,
            *[self._tokenizer.pad_token_id] * (CHUNK_TOKENS - len(chunk)),
        ]

    @torch.no_grad()
    def _chosen_states(self, states: _ChunkStates, clip_skip: int) -> Tensor:
        """`(1, 77, d)`; agrees with diffusers' `encode_prompt` of the family."""
        if self._layer is Layer.PENULTIMATE:
            return states.layers[-(clip_skip + 2)]
        if clip_skip > 0:
            normed: Tensor = self._text_encoder.final_layer_norm(states.layers[-(clip_skip + 1)])
            return normed
        return states.last

    def _weighted(self, chunk: list[WeightedToken], states: Tensor) -> Tensor:
        weights = [1.0, *(token.weight for token in chunk)]
        weights += [1.0] * (states.shape[1] - len(weights))
        if all(weight == 1 for weight in weights):
            return states
        return emphasise(states, upload(torch.tensor(weights), self._device))


def emphasise(states: Tensor, weights: Tensor) -> Tensor:
    """States of one chunk times their weights, then rescaled to the mean they had before.

    states: `(1, n, d)`; weights: `(n,)`. The result is float32.
    A mean that is mere rounding noise is no scale to return to, so such states are not rescaled.
    Source: A1111, `EmphasisOriginal`.
    """
    plain = states.float()
    weighted = plain * weights[:, None]
    before, after = plain.mean(), weighted.mean()
    noise = 1e-4 * plain.std()
    is_noise = torch.minimum(before.abs(), after.abs()) < noise
    return torch.where(is_noise, weighted, weighted * (before / after))
