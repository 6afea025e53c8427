"""Train a Mixture-of-Experts language model of 110 million parameters, in five minutes of one large GPU.

    python training/train_source_code.py --out larger --minutes 4

It is what the recipes of ``docs/recipes.md`` are measured on beside the model that ships. Its weights are not kept:
whoever wants them runs this. The text is what every machine with Python has: the source code and the documentation of
the standard library and of the packages installed beside it. So the text depends on the machine; ``training.json`` has
the folders, the number of files and a hash over names and contents.

What it does, in order:

1. Read the files; each is held out, kept for validation or trained on by the hash of its name. Held-out files and
   those for validation are left out where much of them is in a training file too.
2. Train a byte-level BPE tokenizer on a part of the training files.
3. Train, for as long as the clock or ``--steps`` allows, with the learning rate following the share that is done.
   Several times on the way the averaged weights are measured on the validation text, and written if they are the best
   yet: whatever happens after that, the folder is there.
4. Load the folder as a user would, and measure it.

The folder is like that of the model that ships: bf16 weights, tokenizer, ``heldout.txt``, ``calibration.txt`` (of
training files) and ``training.json``. The model, its optimiser and its measures are those of ``train_shakespeare.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import sysconfig
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from train_shakespeare import (
    EXPERTS_IMPLEMENTATIONS,
    Recipe,
    Run,
    Settings,
    Shape,
    Tokens,
    Weights,
    build_model,
    device_name,
    encode,
    evaluate,
    expert_loads,
    learning_rate,
    load_folder,
    losses,
    model_config,
    parameter_counts,
    sample_batch,
    save_model,
    score_text,
    train_tokenizer,
    versions,
    working_experts_implementation,
)

SUFFIXES = (".py", ".rst", ".md")
SKIPPED_FOLDERS = ("__pycache__", "site-packages", "dist-packages", "node_modules")
SMALLEST_FILE, LARGEST_FILE = 200, 200_000  # bytes; what is larger is mostly tables
HELD_OUT_SHARE, VALIDATION_SHARE = 0.03, 0.02
HELD_OUT_BYTES, CALIBRATION_BYTES, VALIDATION_BYTES = 700_000, 1_000_000, 700_000
EXCERPT_BYTES = 20_000  # of one file, so that these texts are of many
TOKENIZER_BYTES = 24_000_000
MOST_COPIED = 0.1  # of the long lines of a held-out file may be in a training file too
LONG_LINE = 40  # characters; shorter lines of a program are too often equal by chance

SHAPE = Shape(
    vocab_size=8192,
    hidden_size=512,
    layers=8,
    heads=8,
    kv_heads=2,
    head_dim=64,
    experts=32,
    experts_per_token=4,
    moe_intermediate_size=256,
    context=512,
)


@dataclass(frozen=True)
class File:
    """One text; its name begins with that of its folder, and does not depend on where the folder is."""

    name: str
    text: str

    @property
    def use(self) -> float:
        """In [0, 1): which part of the text the file belongs to."""
        return rank(f"use of {self.name}")


@dataclass(frozen=True)
class Split:
    """The files by their use; each list has an order without meaning, that of the names' hashes."""

    train: list[File]
    validation: list[File]
    held_out: list[File]


@dataclass(frozen=True)
class Schedule:
    """How much of the training is done: by steps, or by the clock where there is no number of them."""

    steps: int
    seconds: float
    begin: float

    def done(self, step: int) -> float:
        return step / self.steps if self.steps else min(1.0, (time.perf_counter() - self.begin) / self.seconds)


# ---------------------------------------------------------------------------------------------------------------- texts


def default_folders() -> list[Path]:
    """The standard library and the installed packages of the Python that runs this."""
    paths = (Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib"))
    return [path for path in dict.fromkeys(paths) if path.is_dir()]


def rank(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def find(folder: Path) -> Iterator[tuple[str, Path, int]]:
    """Name, path and bytes of every file to consider; packages inside the standard library's folder are not it."""
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith("."))
        for name in sorted(names):
            path = Path(at, name)
            if path.suffix in SUFFIXES and path.is_file() and SMALLEST_FILE <= path.stat().st_size <= LARGEST_FILE:
                yield f"{folder.name}/{path.relative_to(folder).as_posix()}", path, path.stat().st_size


def read_files(folders: Sequence[Path], limit: int) -> list[File]:
    """Files in the order of their names' hashes, up to ``limit`` bytes; of files of one content only the first."""
    found = sorted({name: (path, size) for folder in folders for name, path, size in find(folder)}.items())
    found.sort(key=lambda item: rank(item[0]))
    total = list(itertools.accumulate(size for _, (_, size) in found))
    chosen = [item for item, end in zip(found, total, strict=True) if end <= limit]

    def read(item: tuple[str, tuple[Path, int]]) -> File | None:
        name, (path, _) = item
        try:
            return File(name, clean(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError):
            return None

    with ThreadPoolExecutor(16) as pool:
        files = [file for file in pool.map(read, chosen) if file is not None]
    return list({file.text: file for file in reversed(files)}.values())[::-1]


def clean(text: str) -> str:
    lines = [line.rstrip() for line in unicodedata.normalize("NFC", text).replace("\ufeff", "").splitlines()]
    return "\n".join(lines).strip() + "\n"


def split_files(files: Sequence[File]) -> Split:
    first, second = HELD_OUT_SHARE, HELD_OUT_SHARE + VALIDATION_SHARE
    train = [file for file in files if file.use >= second]
    split = Split(
        train=train,
        validation=original([file for file in files if first <= file.use < second], train),
        held_out=original([file for file in files if file.use < first], train),
    )
    for name, part in vars(split).items():
        if not part:
            raise SystemExit(
                f"{len(files)} files are too few: none is there for {name.replace('_', ' ')}; name more --folders"
            )
    return split


def excerpts(files: Sequence[File], limit: int) -> str:
    """Beginnings of files, each ending with a whole line, up to about ``limit`` bytes."""
    texts: list[str] = []
    for file in files:
        head = file.text.encode()[:EXCERPT_BYTES].decode(errors="ignore")
        texts.append(head[: head.rfind("\n") + 1] or head + "\n")
        if sum(len(text.encode()) for text in texts) >= limit:
            break
    return "\n".join(texts)


def fingerprint(files: Sequence[File]) -> str:
    """Of names and contents, in the order of the names."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        digest.update(f"{file.name}\0{hashlib.sha256(file.text.encode()).hexdigest()}\n".encode())
    return digest.hexdigest()


def long_lines(text: str) -> Iterator[str]:
    return (line for raw in text.splitlines() if len(line := raw.strip()) >= LONG_LINE)


def copied(files: Sequence[File], others: Sequence[File]) -> list[float]:
    """For each file, the share of its long lines that one of the others has too."""
    wanted = {line for file in files for line in long_lines(file.text)}
    seen = {line for file in others for line in long_lines(file.text) if line in wanted}

    def share(file: File) -> float:
        lines = list(long_lines(file.text))
        return sum(line in seen for line in lines) / max(1, len(lines))

    return [share(file) for file in files]


def original(files: Sequence[File], others: Sequence[File]) -> list[File]:
    """The files that are no copies of others, in part or altogether, as much of a large package is."""
    return [file for file, share in zip(files, copied(files, others), strict=True) if share <= MOST_COPIED]


# ------------------------------------------------------------------------------------------------------------ tokenizer


def tokenizer_texts(files: Sequence[File]) -> Iterator[str]:
    used = 0
    for file in files:
        if used >= TOKENIZER_BYTES:
            return
        used += len(file.text)
        yield file.text


def stream(tokenizer: Any, files: Sequence[File], at_once: int = 512) -> torch.Tensor:
    """Every file, each closed by an end-of-text token; int64 [tokens]. On all processors, and without offsets."""
    backend, parts = tokenizer.backend_tokenizer, []
    for begin in range(0, len(files), at_once):
        texts = [file.text for file in files[begin : begin + at_once]]
        for encoding in backend.encode_batch_fast(texts, add_special_tokens=False):
            parts.append(torch.tensor([*encoding.ids, tokenizer.eos_token_id], dtype=torch.int32))
    return torch.cat(parts).long()


def tokenise(tokenizer: Any, split: Split, device: torch.device) -> Tokens:
    train = stream(tokenizer, split.train).to(device)
    text = excerpts(split.validation, VALIDATION_BYTES)
    validation = torch.tensor(encode(tokenizer, text), device=device)
    return Tokens(train, len(train), validation, len(text.encode()))


# ------------------------------------------------------------------------------------------------------------- training


def experts_implementation(config: Any, tokens: Tokens, settings: Settings, recipe: Recipe, requested: str) -> str:
    """The first implementation of the experts with which a training step works here."""

    def attempt(name: str) -> None:
        model = build_model(config, tokens.train.device, settings.seed)
        model.set_experts_implementation(name)
        model.train()
        weights = Weights(model, recipe, settings)
        generator = torch.Generator(tokens.train.device).manual_seed(settings.seed)
        for step in range(2):
            loss = training_step(model, weights, tokens, recipe, settings, generator, step, 0.0)
        if not math.isfinite(loss.item()):
            raise ArithmeticError("the loss is not finite")

    return working_experts_implementation(attempt, requested)


def training_step(
    model: Any,
    weights: Weights,
    tokens: Tokens,
    recipe: Recipe,
    settings: Settings,
    generator: torch.Generator,
    step: int,
    done: float,
) -> torch.Tensor:
    context = model.config.max_position_embeddings
    inputs, targets = sample_batch(tokens, settings.batch_size, context, 0, recipe.token_noise, generator)
    loss, balance = losses(model, inputs, targets)
    objective: Any = loss + settings.router_aux_loss_coef * balance
    objective.backward()
    weights.step(step, rate(done, recipe, settings))
    return loss.detach()


def rate(done: float, recipe: Recipe, settings: Settings) -> float:
    """The learning rate once this share of the training is done."""
    return learning_rate(round(done * 1e6), 10**6, recipe.learning_rate, settings)


def train(
    run: Run,
    model: Any,
    tokens: Tokens,
    settings: Settings,
    schedule: Schedule,
    save: Callable[[Run], None],
) -> None:
    """Train until the schedule ends, saving the best on the way; what happened goes into ``run``."""
    weights = Weights(model, run.recipe, settings)
    generator = torch.Generator(tokens.train.device).manual_seed(settings.seed)
    recent: list[torch.Tensor] = []
    model.train()
    step, done, measured = 0, 0.0, 0
    while done < 1:
        recent.append(training_step(model, weights, tokens, run.recipe, settings, generator, step, done))
        step, done = step + 1, schedule.done(step + 1)
        run.steps, run.seconds = step, time.perf_counter() - schedule.begin
        if step % 50 == 0 or done >= 1:
            # Reading the loss waits for the device, so that the clock and the device agree here.
            loss = torch.stack(recent).mean().item()
            recent.clear()
            if not math.isfinite(loss):
                raise ArithmeticError(f"the loss is not finite at step {step}")
            tokens_seen = step * settings.batch_size * model.config.max_position_embeddings
            run.curve.append(
                {
                    "step": step,
                    "tokens": tokens_seen,
                    "done": round(done, 4),
                    "learning_rate": round(rate(done, run.recipe, settings), 8),
                    "train_loss": round(loss, 4),
                    "tokens_per_second": round(tokens_seen / (time.perf_counter() - schedule.begin)),
                }
            )
            print(" ".join(f"{key} {value:.8g}" for key, value in run.curve[-1].items()), flush=True)
        if done * settings.evaluations >= measured + 1:
            measured = int(done * settings.evaluations)
            weights.load(weights.average)
            measure(run, model, tokens, step)
            if run.best_step == step:
                save(run)
            weights.load(weights.masters)
            model.train()


def measure(run: Run, model: Any, tokens: Tokens, step: int) -> None:
    """The validation loss, and how evenly the experts are used; keep the weights if they are the best yet."""
    score = evaluate(model, tokens.validation, tokens.validation_bytes, model.config.eos_token_id)
    loads = expert_loads(model, tokens.validation)
    least, most = min(load["min"] for load in loads), max(load["max"] for load in loads)
    if score.nats_per_token < run.best_loss:
        run.best_score, run.best_step = score, step
        run.best_weights = {
            name: value.detach().to("cpu", torch.bfloat16, copy=True) for name, value in model.named_parameters()
        }
    run.curve.append({"step": step, "validation_loss": round(score.nats_per_token, 4)})
    print(
        f"step {step}: validation loss {score.nats_per_token:.4f}, {score.bits_per_byte:.4f} bits a byte; an expert "
        f"has between {least} and {most} times its fair share of the tokens",
        flush=True,
    )


# ----------------------------------------------------------------------------------------------------------------- main


def make(args: argparse.Namespace, shape: Shape, device: torch.device) -> None:
    begin = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begin:6.1f} s] {text}", flush=True)

    settings = Settings(
        seed=args.seed,
        batch_size=args.batch_size,
        max_steps=args.steps,
        router_aux_loss_coef=0.05 * shape.layers,  # of the mean over layers: with less, experts are never used
        initializer_range=0.03,
        evaluations=args.evaluations,
    )
    recipe = Recipe(
        "source-code", dropout=0.0, token_noise=0.0, weight_decay=0.1, folio_share=0.0, learning_rate=args.learning_rate
    )
    folders = args.folders or default_folders()
    files = read_files(folders, round(args.max_megabytes * 1e6))
    size = sum(len(file.text.encode()) for file in files)
    say(f"{len(files)} files, {size / 1e6:.1f} MB, of {', '.join(map(str, folders))}")
    split = split_files(files)
    tokenizer = train_tokenizer(tokenizer_texts(split.train), shape.vocab_size, shape.context)
    say(f"tokenizer of {len(tokenizer)} tokens")
    tokens = tokenise(tokenizer, split, device)
    say(f"{tokens.modern_count} training tokens, {len(tokens.validation)} for validation")
    held_out = excerpts(split.held_out, HELD_OUT_BYTES)
    calibration = excerpts(split.train, CALIBRATION_BYTES)
    if tokenizer.decode(encode(tokenizer, held_out)) != held_out:
        raise SystemExit("the tokenizer does not give the text back")

    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "heldout.txt").write_text(held_out, encoding="utf-8")
    (out / "calibration.txt").write_text(calibration, encoding="utf-8")
    config = model_config(shape, settings, int(tokenizer.eos_token_id))
    implementation = experts_implementation(config, tokens, settings, recipe, args.experts_implementation)
    model = build_model(config, device, settings.seed)
    model.set_experts_implementation(implementation)
    record: dict[str, Any] = {
        "settings": asdict(settings),
        "shape": asdict(shape),
        "parameters": parameter_counts(model),
        "folders": [folder.name for folder in folders],
        "files": {name: len(part) for name, part in vars(split).items()},
        "bytes": size,
        "text_sha256": fingerprint(files),
        "train_tokens": tokens.modern_count,
        "most_lines_of_a_held_out_file_also_in_training": MOST_COPIED,
        "experts_implementation": implementation,
        "device": device_name(device),
        "versions": versions(),
    }
    say(f"{record['parameters']['total'] / 1e6:.1f} million parameters on {record['device']}")

    run = Run(recipe, args.steps)
    schedule = Schedule(args.steps, args.minutes * 60, time.perf_counter())

    def save(run: Run) -> None:
        save_model(run, config, tokenizer, out)
        write_record(out, record | {"run": run.record()})
        say(f"written: {out}, as of step {run.best_step}")

    try:
        train(run, model, tokens, settings, schedule, save)
    except Exception as error:  # what was written before it is a model all the same
        traceback.print_exc()
        if run.best_score is None:
            raise SystemExit("the training failed before anything was saved") from error
        record["ended_early"] = f"{type(error).__name__}: {error}"
        run.stopped_early = True
    del model
    record |= {"run": run.record(), "seconds": round(time.perf_counter() - begin, 1)}
    write_record(out, record)

    loaded, reloaded = load_folder(out, device)
    if encode(reloaded, held_out) != encode(tokenizer, held_out):
        raise SystemExit("the saved tokenizer splits the text otherwise than the trained one")
    scores = {
        "train": score_text(loaded, reloaded, calibration),
        "validation": evaluate(loaded, tokens.validation, tokens.validation_bytes, config.eos_token_id),
        "held_out": score_text(loaded, reloaded, held_out),
    }
    record |= {
        "figures": {name: score.figures() for name, score in scores.items()},
        "expert_load_by_layer": expert_loads(loaded, tokens.validation),
        "seconds": round(time.perf_counter() - begin, 1),
    }
    write_record(out, record)
    shown = ("figures", "expert_load_by_layer", "seconds")
    print(json.dumps({name: record[name] for name in shown}, indent=1))


def write_record(out: Path, record: dict[str, Any]) -> None:
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, Shape]:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--folders", type=Path, nargs="+", help="where to look for text; default: this Python's library and packages"
    )
    parser.add_argument("--max-megabytes", type=float, default=280.0, help="use this much text, chosen by file names")
    parser.add_argument("--minutes", type=float, default=4.0, help="time for the training itself, by the clock")
    parser.add_argument("--steps", type=int, default=0, help="train this many steps instead, whatever the clock says")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    parser.add_argument("--seed", type=int, default=1991, help="seed of weights and batches")
    parser.add_argument("--batch-size", type=int, default=64, help="windows in a batch")
    parser.add_argument("--learning-rate", type=float, default=1.2e-3, help="at its peak")
    parser.add_argument("--evaluations", type=int, default=4, help="times to measure, and to save what is the best yet")
    parser.add_argument(
        "--experts-implementation",
        choices=("auto", *EXPERTS_IMPLEMENTATIONS),
        default="auto",
        help="how transformers computes the experts; auto: the first that works",
    )
    sizes = parser.add_argument_group("sizes of the model")
    for name, default in asdict(SHAPE).items():
        sizes.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="size")
    args = parser.parse_args(arguments)
    if args.steps < 0 or (not args.steps and args.minutes <= 0):
        parser.error("either --minutes or --steps must be positive")
    for folder in args.folders or ():
        if not folder.is_dir():
            parser.error(f"--folders: {folder} is no folder")
    return args, Shape(**{name: getattr(args, name) for name in asdict(SHAPE)})


def main() -> None:
    args, shape = parse_arguments()
    make(args, shape, torch.device(args.device))


if __name__ == "__main__":
    main()
