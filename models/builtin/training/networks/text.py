"""The tokenizer and the text encoder, trained alone and then frozen.

Training the encoder to name the thing a caption asks for, from the end token and the padding
behind it, stands in for CLIP's pre-training: the UNet then only has to read a clear answer.
"""

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.builtin.training.captions import (
    FILLERS,
    VENDOR_NEGATIVE,
    VENDOR_SUFFIX,
    Caption,
    caption_of,
    random_thing,
)
from models.builtin.training.checkpoints import Checkpoint
from models.builtin.training.scenes import COLOURS, SHAPES

WIDTH = 96
TOKENS = 77
_VOCABULARY = 1480
# Prompt emphasis rescales hidden states to the mean they had, which must not be near 0 for that.
_MEAN_SHIFT = 0.5
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_COLOUR_IDS = {name: index for index, name in enumerate([*COLOURS, "none"])}
_SHAPE_IDS = {name: index for index, name in enumerate([*SHAPES, "none"])}


@dataclass(frozen=True)
class TextSettings:
    steps: int = 600
    batch: int = 96
    learning_rate: float = 2e-3
    corpus_lines: int = 20_000
    seed: int = 2


def random_caption(rng: np.random.Generator, nothing_share: float) -> Caption:
    """A caption for any thing, or with probability `nothing_share` for the background."""
    if rng.random() < nothing_share:
        return caption_of(None, rng)
    return caption_of(random_thing(rng, list(COLOURS)), rng)


def build_tokenizer(settings: TextSettings) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's format, learnt from captions and fillers.

    The order of equally frequent pairs differs from run to run, so the merges are kept with the
    weights that were trained on them.
    """
    rng = np.random.default_rng(settings.seed)
    corpus = [random_caption(rng, 0.3).text.lower() for _ in range(settings.corpus_lines)]
    corpus += [text.lower() for text in (*FILLERS, VENDOR_NEGATIVE, VENDOR_SUFFIX)] * 40
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True)
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    return tokenizer_of(json.loads(learner.to_str())["model"]["merges"])


def tokenizer_of(merges: list[list[str]]) -> CLIPTokenizer:
    """CLIP's tokenizer over a list of merges: bytes, bytes that end a word, merged words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(first, second) for first, second in merges]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    words += list(dict.fromkeys(first + second for first, second in pairs))
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*words, _BOS, _EOS]))}
    return _from_parts(vocabulary, pairs)


def _from_parts(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> CLIPTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        vocabulary_file, merges_file = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary_file.write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
        merges_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer(
            str(vocabulary_file), str(merges_file), model_max_length=TOKENS, pad_token=_EOS
        )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers, 96 wide, 77 positions."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=256,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids `(n, 77)`: begin, text, end, padded with end; longer texts are cut."""
    ids: Tensor = tokenizer(
        texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


class ThingReader(nn.Module):
    """The encoder with two linear heads that are thrown away after training."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.colour = nn.Linear(WIDTH, len(_COLOUR_IDS))
        self.shape = nn.Linear(WIDTH, len(_SHAPE_IDS))

    def forward(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Colour and shape logits at `positions` `(n, k)` of `ids` `(n, 77)`."""
        hidden = self.encoder(ids)[0]  # (n, 77, 96)
        chosen = torch.gather(hidden, 1, positions[..., None].expand(-1, -1, WIDTH))
        return self.colour(chosen), self.shape(chosen)


def answer_positions(ids: Tensor, eos: int, generator: torch.Generator) -> Tensor:
    """The end token's position and two random ones behind it, `(n, 3)`."""
    ends = (ids == eos).int().argmax(dim=1, keepdim=True)
    spread = torch.rand((len(ids), 2), generator=generator)
    later = ends + (spread * (TOKENS - ends)).long()
    return torch.cat([ends, later.clamp(max=TOKENS - 1)], dim=1)


def caption_targets(captions: list[Caption]) -> tuple[Tensor, Tensor]:
    """Class ids of colours and shapes, each `(n,)`; the last class is "none"."""
    colours = [c.thing.colour if c.thing else "none" for c in captions]
    shapes = [c.thing.shape if c.thing else "none" for c in captions]
    return (
        torch.tensor([_COLOUR_IDS[name] for name in colours]),
        torch.tensor([_SHAPE_IDS[name] for name in shapes]),
    )


def train_text(
    settings: TextSettings, checkpoint: Checkpoint
) -> tuple[CLIPTokenizer, CLIPTextModel, float]:
    """The tokenizer, the frozen encoder and its accuracy on new captions; resumes by itself."""
    torch.manual_seed(settings.seed)
    state = checkpoint.load() or {"step": 0}
    tokenizer = tokenizer_of(state["merges"]) if "merges" in state else build_tokenizer(settings)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    reader = ThingReader(build_text_encoder(tokenizer))
    optimizer = torch.optim.AdamW(reader.parameters(), settings.learning_rate, (0.9, 0.98))
    if state["step"]:
        reader.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
    bar = tqdm(range(state["step"], settings.steps), desc="text encoder", unit="step")
    for step in bar:
        rng = np.random.default_rng((settings.seed, step))
        share = step / settings.steps
        rate = min(1.0, (step + 1) / 50) * (0.02 + 0.98 * math.cos(0.5 * math.pi * share))
        optimizer.param_groups[0]["lr"] = settings.learning_rate * rate
        loss, accuracy = _score(reader, tokenizer, rng, settings.batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{accuracy:.3f}")
        if (step + 1) % 200 == 0 or step + 1 == settings.steps:
            weights, moments = reader.state_dict(), optimizer.state_dict()
            saved = {"step": step + 1, "merges": merges, "weights": weights}
            checkpoint.save({**saved, "optimizer": moments})
    reader.eval()
    with torch.no_grad():
        reader.encoder.final_layer_norm.bias += _MEAN_SHIFT
        held_out = np.random.default_rng((settings.seed, 10**9))
        for head in (reader.colour, reader.shape):
            head.bias.sub_(_MEAN_SHIFT * head.weight.sum(dim=1))
        _, accuracy = _score(reader, tokenizer, held_out, 1000)
    return tokenizer, reader.encoder.requires_grad_(False).eval(), accuracy


def _score(
    reader: ThingReader, tokenizer: CLIPTokenizer, rng: np.random.Generator, count: int
) -> tuple[Tensor, float]:
    """Mean cross entropy over fresh captions and the share with both heads right."""
    captions = [random_caption(rng, 0.25) for _ in range(count)]
    ids = tokenize(tokenizer, [caption.text for caption in captions])
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    eos = int(tokenizer.eos_token_id)
    colours, shapes = reader(ids, answer_positions(ids, eos, generator))  # (n, 3, classes)
    loss = torch.zeros(())
    right = torch.ones(count, colours.shape[1], dtype=torch.bool)
    for logits, target in zip((colours, shapes), caption_targets(captions), strict=True):
        wanted = target[:, None].expand(-1, logits.shape[1])
        loss = loss + functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        right &= logits.argmax(dim=-1) == wanted
    return loss, float(right.float().mean())
