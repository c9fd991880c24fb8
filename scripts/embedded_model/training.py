"""The two training stages: first the vision tower and the projector, then the language model.

1. `train_vision`: every patch, after the projector, learns to name what it shows, by its dot products with the word
   embeddings of the language model; the CLS token learns which objects the scene contains, so that its attention
   points at them.
2. `train_language`: the vision tower is frozen, and the language model learns to answer questions about few objects
   at first and many later, mostly with a part of the image tokens removed and the rest at consecutive positions.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from promprune.embedded.scenes import COLOURS, MAX_OBJECTS, TRAIN_SEEDS

from .data import (
    EVENLY,
    IGNORE,
    KINDS,
    MOSTLY_COUNTING,
    PATCH_GROUPS,
    Batch,
    Packer,
    SceneBatches,
    keep_patches,
    stream,
)

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Schedule:
    """Progress of a stage: by steps, or by minutes if the limit in minutes is reached first."""

    steps: int
    minutes: float
    step: int = 0
    seconds: float = 0.0
    _resumed: float = field(default_factory=time.monotonic, repr=False)

    def progress(self) -> float:
        """0 at the start of the stage, 1 at its end."""
        return min(max(self.step / self.steps, self.elapsed() / (60 * self.minutes)), 1.0)

    def elapsed(self) -> float:
        """Seconds spent on this stage, including earlier runs."""
        return self.seconds + time.monotonic() - self._resumed

    def rate(self) -> float:
        """Learning-rate factor: rises for 100 steps, stays constant, and falls linearly over the last 40 %."""
        return min((self.step + 1) / 100, 1.0, (1 - self.progress()) / 0.4 + 0.01)


@dataclass
class Trainer:
    """What both stages share: model, optimisers, schedule, checkpoints, log."""

    model: LlavaForConditionalGeneration
    packer: Packer
    folder: Path
    image_size: int
    vision_batch_size: int
    language_batch_size: int
    bf16: bool
    workers: int

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16, cache_enabled=False)

    def run(
        self,
        name: str,
        schedule: Schedule,
        modules: nn.ModuleDict,
        groups: list[dict[str, object]],
        step: Callable[[Batch, Schedule], dict[str, Tensor]],
        dataset: Callable[[Schedule], SceneBatches],
        report: Callable[[], str] | None = None,
    ) -> None:
        """Train until the schedule ends; save a checkpoint every two minutes, from which a killed run can resume.

        `step` returns the loss as ``"loss"`` and further numbers to log; `dataset` may change with progress.
        """
        parameters = [p for group in groups for p in group["params"] if p.requires_grad]
        stage = Stage(self.folder / f"{name}.pt", schedule, modules, make_optimisers(groups))
        stage.restore()
        saving, logging, reporting = Every(120), Every(20), Every(300)
        current, batches = None, None
        while schedule.progress() < 1:
            wanted = dataset(schedule)
            if current is None or not wanted.same_scenes(current):
                current, batches = wanted, stream(wanted)
            parts = [next(batches) for _ in range(self.workers)]
            stage.note(self._accumulate(step, schedule, parts, parameters))
            nn.utils.clip_grad_norm_(parameters, 1.0)
            stage.update()
            if logging.due():
                print(stage.line(), flush=True)
            if report and reporting.due():
                print(report(), flush=True)
            if saving.due():
                stage.save()
        stage.save()

    def _accumulate(
        self,
        step: Callable[[Batch, Schedule], dict[str, Tensor]],
        schedule: Schedule,
        parts: list[Batch],
        parameters: list[nn.Parameter],
    ) -> dict[str, Tensor]:
        """Set the gradients of the mean loss of the parts of a batch, each computed by a separate thread.

        On busy cores this is much faster than one computation in which every operation waits for two threads.
        """

        def one(part: Batch) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
            numbers = step(part, schedule)
            return numbers, torch.autograd.grad(numbers["loss"], parameters, allow_unused=True)

        done = list(self._pool.map(one, parts))
        for index, parameter in enumerate(parameters):
            found = [gradients[index] for _, gradients in done if gradients[index] is not None]
            parameter.grad = sum(found[1:], found[0]) / len(done) if found else None
        return {key: sum(numbers[key].detach() for numbers, _ in done) / len(done) for key in done[0][0]}

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.workers)


def make_optimisers(groups: list[dict[str, object]]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for everything else; each group has its own `lr` for both."""
    muon, adam = [], []
    for group in groups:
        parameters = [p for p in group["params"] if p.requires_grad]
        matrices = [p for p in parameters if p.dim() == 2 and group["matrices"]]
        others = [p for p in parameters if not (p.dim() == 2 and group["matrices"])]
        if matrices:
            muon.append({"params": matrices, "lr": group["lr"]})
        if others:
            adam.append({"params": others, "lr": group["lr"]})
    return [
        torch.optim.Muon(muon, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adam, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


@dataclass
class Every:
    """A timer that is due once per interval."""

    seconds: float
    last: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        now = time.monotonic()
        if now - self.last < self.seconds:
            return False
        self.last = now
        return True


class Stage:
    """The state of one stage: trained modules, optimisers, schedule, and running means of the logged numbers."""

    def __init__(
        self, path: Path, schedule: Schedule, modules: nn.ModuleDict, optimisers: list[torch.optim.Optimizer]
    ) -> None:
        self.path = path
        self.schedule = schedule
        self.modules = modules
        self.optimisers = optimisers
        self.base_rates = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
        self.numbers: dict[str, float] = {}

    def update(self) -> None:
        """Run one step of every optimiser at the current learning rate of the schedule."""
        for optimiser, rates in zip(self.optimisers, self.base_rates, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * self.schedule.rate()
            optimiser.step()
            optimiser.zero_grad()
        self.schedule.step += 1

    def note(self, numbers: dict[str, Tensor]) -> None:
        """Update the running means with new numbers."""
        for key, value in numbers.items():
            self.numbers[key] = 0.95 * self.numbers.get(key, value.item()) + 0.05 * value.item()

    def line(self) -> str:
        """Return one line for the log."""
        numbers = " ".join(f"{key} {value:.3f}" for key, value in self.numbers.items())
        return f"{self.path.stem} {self.schedule.progress():6.1%} step {self.schedule.step} {numbers}"

    def save(self) -> None:
        """Write the checkpoint; if the run is killed meanwhile, the previous one remains."""
        state = {
            "step": self.schedule.step,
            "seconds": self.schedule.elapsed(),
            "modules": self.modules.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        part = self.path.with_suffix(".tmp")
        torch.save(state, part)
        part.replace(self.path)

    def restore(self) -> None:
        """Resume from the checkpoint, if there is one."""
        if not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True)
        self.schedule.step, self.schedule.seconds = state["step"], state["seconds"]
        self.modules.load_state_dict(state["modules"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        print(f"resumed {self.path.name} at step {self.schedule.step}", flush=True)


# --------------------------------------------------------------------------------------------------------- vision


def normalise(pixels: Tensor) -> Tensor:
    """[B, side, side, 3] uint8 -> [B, 3, side, side] float32, as CLIPImageProcessor does."""
    mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def vision_states(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Return the output of the second to last layer, [B, 1 + P, width]: the CLS token, then the projector's input."""
    tower = model.model.vision_tower
    states = tower.pre_layrnorm(tower.embeddings(normalise(pixels)))
    for layer in tower.encoder.layers[:-1]:
        states = layer(states, attention_mask=None)
        states = states[0] if isinstance(states, tuple) else states
    return states


class Probes(nn.Module):
    """Heads that only training needs: they predict objects from the CLS token, and object centres from patches."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.cls = nn.ModuleList(nn.Linear(vision_width, len(KINDS) * len(COLOURS)) for _ in range(2))
        self.count = nn.ModuleList(nn.Linear(vision_width, MAX_OBJECTS + 1) for _ in range(2))
        self.norm = nn.LayerNorm(vision_width)
        self.centre = nn.Parameter(torch.randn(text_width) / math.sqrt(text_width))

    def cls_loss(self, depth: int, cls: Tensor, batch: Batch) -> Tensor:
        """Return the loss of predicting the (kind, colour) pairs and the number of objects from `cls` [B, width]."""
        pairs = F.binary_cross_entropy_with_logits(self.cls[depth](cls).float(), batch.pairs)
        return 6 * pairs + 0.2 * F.cross_entropy(self.count[depth](cls).float(), batch.counts)


def patch_losses(words: Tensor, groups: dict[str, Tensor], probes: Probes, batch: Batch) -> dict[str, Tensor]:
    """Return the losses of naming patches by their projection `words` [B, P, D], and their accuracy on objects."""
    losses: dict[str, Tensor] = {}
    is_object = batch.patches[:, :, 0] > 0
    weight = torch.where(is_object, 1.0, 0.25)
    flat = words.flatten(0, 1)
    for index, (name, embeddings) in enumerate(groups.items()):
        logits = F.pad(10 * (flat @ embeddings.T), (1, 0)).float()
        target = batch.patches[:, :, index].flatten()
        loss = F.cross_entropy(logits, target, reduction="none").view_as(weight)
        losses[name] = (loss * weight).sum() / weight.sum()
        if name in ("kind", "colour"):
            right = (logits.argmax(-1) == target).view_as(is_object)
            losses[f"{name}_right"] = right[is_object].float().mean()
    centre = (10 * (flat @ probes.centre) - 2).float()
    target = batch.centres.flatten().float()
    losses["centre"] = F.binary_cross_entropy_with_logits(centre, target, pos_weight=torch.tensor(4.0))
    return losses


def word_groups(model: LlavaForConditionalGeneration, packer: Packer) -> dict[str, Tensor]:
    """Return the embeddings [words, D] of the words of each of `PATCH_GROUPS`; every word is one token."""
    table = model.get_input_embeddings().weight
    return {name: table[[packer.ids(f" {word}")[0] for word in words]] for name, words in PATCH_GROUPS.items()}


def train_vision(trainer: Trainer, probes: Probes, schedule: Schedule) -> None:
    """Stage 1: vision tower, projector, and the word embeddings that name what patches show."""
    model = trainer.model
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector

    def step(batch: Batch, schedule: Schedule) -> dict[str, Tensor]:
        with trainer.autocast():
            states = vision_states(model, batch.pixels)
            words = projector(states[:, 1:])
            losses = patch_losses(words, word_groups(model, trainer.packer), probes, batch)
            cls_loss = probes.cls_loss(0, probes.norm(states[:, 0]), batch)
            if schedule.step % 6 == 0:
                last = tower.encoder.layers[-1](states.detach(), attention_mask=None)
                last = last[0] if isinstance(last, tuple) else last
                cls_loss = cls_loss + probes.cls_loss(1, tower.post_layernorm(last[:, 0]), batch)
        dense = sum(losses[name] for name in (*PATCH_GROUPS, "kind", "centre"))  # the kind is the hardest: twice
        return {"loss": dense + cls_loss, "cls": cls_loss, **losses}

    modules = nn.ModuleDict({"model": model.model, "probes": probes})
    trained = [*tower.encoder.parameters(), *projector.parameters()]
    rest = [*tower.embeddings.parameters(), *tower.pre_layrnorm.parameters(), *tower.post_layernorm.parameters()]
    rest += [*probes.parameters(), model.get_input_embeddings().weight]
    groups: list[dict[str, object]] = [
        {"params": trained, "lr": 3e-3, "matrices": True},
        {"params": rest, "lr": 1.5e-3, "matrices": False},
    ]

    def dataset(schedule: Schedule) -> SceneBatches:
        size = trainer.vision_batch_size
        return _dataset(trainer, schedule, first=0, batch_size=size, limits={}, objects=(10, MAX_OBJECTS))

    trainer.run("vision", schedule, modules, groups, step, dataset)


def _dataset(
    trainer: Trainer,
    schedule: Schedule,
    *,
    first: int,
    batch_size: int,
    limits: dict[str, int],
    objects: tuple[int, int],
) -> SceneBatches:
    return SceneBatches(
        trainer.packer,
        image_size=trainer.image_size,
        batch_size=batch_size // trainer.workers,
        first_seed=first + schedule.step * batch_size,
        limits=limits,
        min_objects=objects[0],
        max_objects=objects[1],
    )


# ------------------------------------------------------------------------------------------------------- language


def packed_logits(
    model: LlavaForConditionalGeneration, packer: Packer, image_words: Tensor, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Return the logits at the positions that have a label, and those labels.

    `image_words` [B, K, D] follow the prefix and are computed once; each of the Q questions after them is computed
    as if it were the only one.
    """
    language, table = model.model.language_model, model.get_input_embeddings()
    size, kept = image_words.shape[:2]
    without = 0 if kept else 1  # without an image, the line break after it is removed too
    tokens, labels = batch.tokens[:, :, without:], batch.labels[:, :, without:].flatten(1)
    questions, width = tokens.shape[1:]
    prefix = table(torch.tensor(packer.prefix)).expand(size, -1, -1)
    head = prefix.shape[1] + kept
    states = torch.cat([prefix, image_words.to(prefix.dtype), table(tokens.flatten(1))], dim=1)
    positions = torch.cat([torch.arange(head), head + torch.arange(width).repeat(questions)])[None]
    rotary = language.rotary_emb(states, positions)
    for layer in language.layers:
        states = states + packed_attention(layer.self_attn, layer.input_layernorm(states), rotary, head, width)
        states = states + layer.mlp(layer.post_attention_layernorm(states))
    hidden = language.norm(states[:, head:][labels != IGNORE])
    return model.lm_head(hidden), labels[labels != IGNORE]


def packed_attention(
    attention: nn.Module, states: Tensor, rotary: tuple[Tensor, Tensor], head: int, width: int
) -> Tensor:
    """Causal attention in which each row of `width` tokens attends to the first `head` tokens and to its own row."""
    size, length, _ = states.shape
    by_head = (size, length, -1, attention.head_dim)
    q, k, v = (
        projection(states).view(by_head).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *rotary)
    q, k, v = q.to(v.dtype), k.to(v.dtype), v
    image = F.scaled_dot_product_attention(q[:, :, :head], k[:, :, :head], v[:, :, :head], is_causal=True)
    rows = (size, q.shape[1], -1, width, attention.head_dim)
    q_rows, k_rows, v_rows = (t[:, :, head:].reshape(rows) for t in (q, k, v))  # [B, heads, Q, W, head_dim]
    to_image = q[:, :, head:] @ k[:, :, :head].transpose(-1, -2)  # [B, heads, Q * W, head]
    to_row = q_rows @ k_rows.transpose(-1, -2)
    future = torch.ones(width, width, dtype=torch.bool).triu(1)
    to_row = to_row.masked_fill(future, -torch.inf).flatten(2, 3)
    share = (torch.cat([to_image, to_row], dim=-1) * attention.scaling).softmax(dim=-1).to(v.dtype)
    from_image = share[..., :head] @ v[:, :, :head]
    from_row = share[..., head:].reshape(*rows[:4], width) @ v_rows
    text = from_image + from_row.flatten(2, 3)
    mixed = torch.cat([image, text], dim=2).transpose(1, 2).reshape(size, length, -1)
    return attention.o_proj(mixed)


def choose_kept(batch: Batch, schedule: Schedule, rng: random.Random) -> Tensor | None:
    """Choose the image tokens [B, K] of this step: 12 % to 60 % of them, or all (None), which becomes more frequent."""
    patches = batch.centres.shape[1]
    if rng.random() < 0.02:
        return torch.zeros(batch.centres.shape[0], 0, dtype=torch.int64)
    if rng.random() < 0.1 + 0.5 * schedule.progress():
        return None
    share = 0.12 * (0.6 / 0.12) ** rng.random()
    return keep_patches(batch, max(round(share * patches), MAX_OBJECTS + 4), rng)


def train_language(trainer: Trainer, schedule: Schedule, report: Callable[[], str]) -> None:
    """Stage 2: language model and projector, with the vision tower frozen."""
    model = trainer.model
    projector = model.model.multi_modal_projector
    model.model.vision_tower.requires_grad_(False)

    def step(batch: Batch, schedule: Schedule) -> dict[str, Tensor]:
        kept = choose_kept(batch, schedule, random.Random(schedule.step))
        with trainer.autocast():
            with torch.no_grad():
                states = vision_states(model, batch.pixels)[:, 1:]
            if kept is not None:
                states = states.gather(1, kept[:, :, None].expand(-1, -1, states.shape[-1]))
            logits, labels = packed_logits(model, trainer.packer, projector(states), batch)
        loss = F.cross_entropy(logits.float(), labels)
        right = (logits.argmax(-1) == labels).float().mean()
        return {"loss": loss, "tokens_right": right, "kept": torch.tensor(float(states.shape[1]))}

    def dataset(schedule: Schedule) -> SceneBatches:
        progress = schedule.progress()
        most = next(m for limit, m in ((0.04, 2), (0.10, 5), (0.20, 9), (2.0, MAX_OBJECTS)) if progress < limit)
        limits = EVENLY if progress < 0.55 else MOSTLY_COUNTING
        first, size = TRAIN_SEEDS.stop // 2, trainer.language_batch_size
        return _dataset(trainer, schedule, first=first, batch_size=size, limits=limits, objects=(1, most))

    modules = nn.ModuleDict({"model": model.model})
    groups: list[dict[str, object]] = [
        {"params": [*model.model.language_model.layers.parameters()], "lr": 2.5e-3, "matrices": True},
        {"params": [*model.model.language_model.norm.parameters()], "lr": 1.5e-3, "matrices": False},
        {"params": [model.get_input_embeddings().weight], "lr": 1e-3, "matrices": False},
        {"params": [*projector.parameters()], "lr": 7e-4, "matrices": True},
    ]
    trainer.run("language", schedule, modules, groups, step, dataset, report)


def make_trainer(
    model: LlavaForConditionalGeneration,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    image_size: int,
    vision_batch_size: int,
    language_batch_size: int,
    bf16: bool,
    workers: int,
) -> Trainer:
    """Make a trainer that saves its checkpoints in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(model, Packer(tokenizer), folder, image_size, vision_batch_size, language_batch_size, bf16, workers)
