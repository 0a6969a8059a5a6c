"""Train the tiny umT5 (Wan) and T5 (TangoFlux) encoders and their tokenizers on captions.

Two objectives at once: fill in masked tokens, and name the clip's attributes from the mean of the
states. The second is what a large language encoder knows anyway and a tiny one must be taught.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from playground.backbones import recipe
from playground.backbones.clips import TRAIN_SEED
from playground.world.clip import COLOURS, MATERIALS, SCENES, ClipFacts, describe
from playground.world.physics import MOTION_NAMES
from playground.world.wording import how_many

PAD, EOS, UNKNOWN, MASK = range(4)
CAPTIONS = 6000
FIRST_CAPTION = 100_000  # far from the indices whose clips are drawn
VOCABULARY = 512
BATCH = 64
SIZES = {
    "video": {"d_model": 96, "d_kv": 24, "d_ff": 192, "num_layers": 2, "num_heads": 4},
    "audio": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
}


def build_tokenizer(captions: list[str]) -> T5TokenizerFast:
    """A T5-style tokenizer (pad 0, EOS 1 appended) with a BPE vocabulary of these captions."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    return T5TokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        extra_ids=0, model_max_length=512,
    )


def video_labels(facts: ClipFacts) -> list[int]:
    """Six colour flags, then number of balls, material, motion, scene kind (0 = none)."""
    flags = [int(colour in facts.colours) for colour in COLOURS]
    material = 1 + MATERIALS.index(facts.material) if facts.material else 0
    motion = 1 + MOTION_NAMES.index(facts.motion) if facts.motion else 0
    kind = 1 + SCENES.index(facts.scene) if facts.scene in SCENES else 0
    return [*flags, len(facts.colours), material, motion, kind]


def audio_labels(facts: ClipFacts) -> list[int]:
    """Material, rough number of impacts, kind of ambience (0 = none)."""
    material = 1 + MATERIALS.index(facts.material) if facts.material else 0
    words = ("a single", "a few", "several", "many")
    number = 1 + words.index(how_many(len(facts.events))) if facts.material else 0
    kind = 1 + SCENES.index(facts.scene) if facts.scene in SCENES else 0
    return [material, number, kind]


VIDEO_CLASSES = (2,) * len(COLOURS) + (4, 1 + len(MATERIALS), 1 + len(MOTION_NAMES), 4)
AUDIO_CLASSES = (1 + len(MATERIALS), 5, 4)


def mean_states(encoder: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the true tokens of the last states: (B,N) ids -> (B,D)."""
    states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask[..., None].float()
    return (states * weights).sum(1) / weights.sum(1)


class _Trainer(nn.Module):
    """An encoder with the two heads of its training; only the encoder is kept."""

    def __init__(self, encoder: T5EncoderModel | UMT5EncoderModel, classes: tuple[int, ...]):
        super().__init__()
        self.encoder, self.classes = encoder, classes
        self.attributes = nn.Linear(encoder.config.d_model, sum(classes))
        self.embedding = encoder.shared

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        hidden = (torch.rand(ids.shape) < 0.2) & (mask > 0) & (ids != EOS)
        states = self.encoder(input_ids=ids.masked_fill(hidden, MASK), attention_mask=mask)
        logits = states.last_hidden_state[hidden] @ self.embedding.weight.T
        fill_in = nn.functional.cross_entropy(logits * logits.shape[-1] ** -0.5, ids[hidden])
        scores = self.attributes(mean_states(self.encoder, ids, mask)).split(self.classes, dim=1)
        named = [nn.functional.cross_entropy(s, labels[:, i]) for i, s in enumerate(scores)]
        return fill_in + torch.stack(named).mean() * 2


def _batches(
    tokenizer: T5TokenizerFast, captions: list[str], labels: torch.Tensor, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    rng = np.random.default_rng(seed)
    while True:
        chosen = torch.from_numpy(rng.integers(0, len(captions), BATCH))
        length = int(mask[chosen].sum(1).max())
        yield ids[chosen, :length], mask[chosen, :length], labels[chosen]


def _fit(
    kind: str, encoder: T5EncoderModel | UMT5EncoderModel, tokenizer: T5TokenizerFast,
    captions: list[str], labels: torch.Tensor, classes: tuple[int, ...], minutes: float,
) -> int:
    trainer = _Trainer(encoder, classes).train()
    optimizer = torch.optim.AdamW(trainer.parameters(), lr=2e-3)
    budget = recipe.Budget(minutes)
    batches = _batches(tokenizer, captions, labels, seed=0)
    while budget.running():
        recipe.set_learning_rate(budget, 2e-3, optimizer)
        loss = trainer(*next(batches))
        recipe.update(trainer, loss, optimizer)
        if budget.step % 100 == 0:
            print(f"text {kind} step {budget.step} loss {loss.item():.3f}", flush=True)
    encoder.eval()
    return budget.step


def update_tangoflux(tensors: dict[str, torch.Tensor]) -> None:
    """Replace these tensors in tangoflux.safetensors, which holds the DiT and T5 together."""
    path = recipe.TANGOFLUX / "tangoflux.safetensors"
    kept: dict[str, torch.Tensor] = {}
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            kept = {name: file.get_tensor(name) for name in file.keys()}
    recipe.save_tensors(kept | tensors, recipe.TANGOFLUX, "tangoflux")


def _untied(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """State without the second name of the tied embedding, as the released files have it."""
    state = encoder.state_dict()
    state.pop("encoder.embed_tokens.weight")
    return state


def _save_tokenizer(tokenizer: T5TokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)


def train(minutes: float, seed: int = 0) -> None:
    """Both encoders, the video one for three quarters of `minutes`, in the released layouts."""
    torch.manual_seed(seed)
    facts = [describe(TRAIN_SEED, FIRST_CAPTION + index) for index in range(CAPTIONS)]
    shared = {"vocab_size": VOCABULARY, "dropout_rate": 0.0, "pad_token_id": PAD,
              "eos_token_id": EOS, "feed_forward_proj": "gated-gelu"}
    video_captions = [f.video_caption for f in facts]
    tokenizer = build_tokenizer(video_captions)
    video = UMT5EncoderModel(UMT5Config(**shared, **SIZES["video"]))
    labels = torch.tensor([video_labels(f) for f in facts])
    steps = [_fit("video", video, tokenizer, video_captions, labels, VIDEO_CLASSES, 0.75 * minutes)]
    video.config.save_pretrained(recipe.WAN / "text_encoder")
    recipe.save_tensors(_untied(video), recipe.WAN / "text_encoder", "model")
    _save_tokenizer(tokenizer, recipe.WAN / "tokenizer")

    audio_captions = [f.audio_caption for f in facts]
    tokenizer = build_tokenizer(audio_captions)
    audio = T5EncoderModel(T5Config(**shared, **SIZES["audio"]))
    labels = torch.tensor([audio_labels(f) for f in facts])
    steps += [
        _fit("audio", audio, tokenizer, audio_captions, labels, AUDIO_CLASSES, 0.25 * minutes)
    ]
    folder = recipe.TANGOFLUX / "text_encoder"
    audio.config.save_pretrained(folder)
    _save_tokenizer(tokenizer, folder)
    update_tangoflux({f"text_encoder.{name}": t for name, t in _untied(audio).items()})
    path = recipe.TANGOFLUX / "config.json"
    recipe.save_json(recipe.load_json(path) | {"text_encoder_name": "text_encoder"}, path)
    recipe.note("text_training", {"minutes": minutes, "steps": steps, "captions": CAPTIONS})
