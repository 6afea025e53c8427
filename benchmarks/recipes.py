"""Reproduce the tables of docs/recipes.md: what each way of quantising costs a model in KL divergence, and in time.

    python benchmarks/recipes.py                                # the model that comes with mxperts
    python benchmarks/recipes.py larger --device cuda           # what training/train_source_code.py wrote
    python benchmarks/recipes.py --table                        # only print what has been measured, as Markdown

Every recipe is quantised by ``quantize_checkpoint``, loaded by ``mx.load`` and compared with the unquantised model on
the held-out text; calibration sees none of that, but excerpts of what the model was trained on, others for every seed.
Each result is one line of ``--save`` as soon as it is there. What that file has is not run again, so that a run whose
time was up goes on when the same command is given.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

import mxperts as mx
from mxperts import models
from mxperts.benchmark.report import conditions, save
from mxperts.evaluation import Evaluation, Report, Windows, evaluate, evaluate_base
from mxperts.evaluation.report import with_error
from mxperts.evaluation.statistics import Estimate
from mxperts.quantization import quantize_checkpoint
from mxperts.quantization.calibration import Calibration
from mxperts.quantization.calibration.text import TOKENS

RESULTS = Path(__file__).parent / "results" / "recipes.jsonl"
RTN = "round to nearest"
FACTS = ("model", "model_sha256", "layers", "experts", "device", "calibration_tokens", "max_tokens")
"""What measurements must have in common to be compared."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to quantise a model.

    Attributes:
        group: what the recipe is listed under.
        name: unique in the group.
        scheme: of what is quantised.
        against: the group whose rounding to nearest it is compared with.
        options: for ``quantize_checkpoint``, as JSON can hold them.
    """

    group: str
    name: str
    scheme: str
    against: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def calibrated(self) -> bool:
        """Whether it reads a text, which a seed chooses."""
        return any(name in self.options for name in ("method", "smooth", "bits"))


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A divergence to reach, as a multiple of that of rounding to nearest in the group ``against``."""

    what: str
    group: str
    recipe: str | None  # None: the best of the group
    against: str
    at_most: float


SCALES = {"method": "scale-search"}
GPTQ = {"method": "gptq"}
SMOOTH = {"smooth": True}
HADAMARD = {"rotation": "hadamard32"}
METHODS: Mapping[str, Mapping[str, Any]] = {
    RTN: {},
    "scale search": SCALES,
    "smoothing": SMOOTH,
    "GPTQ": GPTQ,
    "smoothing, GPTQ": SMOOTH | GPTQ,
    "Hadamard": HADAMARD,
    "Hadamard, GPTQ": HADAMARD | GPTQ,
}
MIXED = {"mixed": {"bits": 5.0}, "mixed, GPTQ": {"bits": 5.0} | GPTQ}
SCHEMES = {"W4A16": "w_mxfp4", "W4A4": "w_mxfp4_a_mxfp4", "W4A6": "w_mxfp4_a_mxfp6_e2m3"}

RECIPES = [
    *(
        Recipe(group=group, name=name, scheme=scheme, against=group, options=options)
        for group, scheme in SCHEMES.items()
        for name, options in METHODS.items()
    ),
    *(
        Recipe(group="5 bits, A16", name=name, scheme="w_mxfp4", against="W4A16", options=options)
        for name, options in MIXED.items()
    ),
]

GOALS = (
    Goal(what="W4A16", group="W4A16", recipe=None, against="W4A16", at_most=0.3),
    Goal(what="W4A4, Hadamard and GPTQ", group="W4A4", recipe="Hadamard, GPTQ", against="W4A4", at_most=0.5),
    Goal(what="W4A6 beside W4A4", group="W4A6", recipe=None, against="W4A4", at_most=0.3),
    Goal(what="mixed formats at 5 bits", group="5 bits, A16", recipe=None, against="W4A16", at_most=0.4),
)


# ------------------------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model, and what every row says of it."""

    path: Path
    heldout: Path
    calibration: Path
    device: str
    backend: str
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, args: argparse.Namespace) -> Subject:
        name = args.model or "shipped"
        path = models.shipped() if name == "shipped" else Path(name)
        config = AutoConfig.from_pretrained(path)
        digest = hashlib.sha256()
        for file in sorted(path.glob("*.safetensors")):
            digest.update(file.read_bytes())
        facts = {
            "model": name if name == "shipped" else path.resolve().name,
            "model_sha256": digest.hexdigest(),
            "layers": config.num_hidden_layers,
            "experts": config.num_experts,
            "device": args.device,
            "calibration_tokens": args.calibration_tokens,
            "max_tokens": args.max_tokens,
        }
        return cls(
            path=path,
            heldout=args.text or path / "heldout.txt",
            calibration=args.calibration or path / "calibration.txt",
            device=args.device,
            backend=args.backend,
            facts=facts,
        )

    def load(self, folder: Path) -> Any:
        return mx.load(folder, backend=self.backend).to(self.device).eval()

    def windows(self) -> Windows:
        config, tokenizer = AutoConfig.from_pretrained(self.path), AutoTokenizer.from_pretrained(self.path)
        context = min(512, config.max_position_embeddings)
        text = self.heldout.read_text(encoding="utf-8")
        return Windows.of_text(text, tokenizer, context=context, max_tokens=self.facts["max_tokens"])


def quantise(subject: Subject, recipe: Recipe, seed: int, folder: Path) -> float:
    """Write the quantised model to ``folder``; the seconds that it took, the least of three if it takes no text."""
    calibration = None
    if recipe.calibrated:
        tokens = subject.facts["calibration_tokens"]
        calibration = Calibration(text=subject.calibration, tokens=tokens, seed=seed, device=subject.device)
    took = []
    for _ in range(1 if recipe.calibrated else 3):
        shutil.rmtree(folder, ignore_errors=True)
        begin = time.perf_counter()
        quantize_checkpoint(subject.path, folder, recipe.scheme, calibration=calibration, **recipe.options)
        took.append(time.perf_counter() - begin)
    return min(took)


def measure(args: argparse.Namespace) -> int:
    """Run what has no row yet; how many recipes failed."""
    deadline = time.monotonic() + args.minutes * 60 if args.minutes else float("inf")
    subject = Subject.of(args)
    done = {key(row) for row in rows_of(args.save) if subject.facts.items() <= row.items()}
    missing = [
        (recipe, seed) for recipe, seed in plan(args.only, args.seeds) if (recipe.group, recipe.name, seed) not in done
    ]
    say(f"{len(missing)} measurements to make, {len(done)} are there")
    if not missing:
        return 0
    windows = subject.windows()
    model = subject.load(subject.path)
    parameters = sum(p.numel() for p in model.parameters())
    base_row, base = evaluate_base(model, windows, batch_size=args.batch_size)
    del model
    say(f"base: {base_row.summary()}, {windows.scored} tokens")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="mxperts-recipes-") as scratch:
        quantise(subject, RECIPES[0], 0, Path(scratch, "first"))  # compiles, loads: in no one's time
        for recipe, seed in missing:
            if time.monotonic() > deadline:
                say("the time is up; the same command goes on from here")
                break
            row = {
                **subject.facts,
                "parameters": parameters,
                "base_perplexity": base_row.perplexity.value,
                "group": recipe.group,
                "recipe": recipe.name,
                "scheme": recipe.scheme,
                "options": dict(recipe.options),
                "seed": seed,
            }
            folder = Path(scratch, "quantised")
            try:
                seconds = quantise(subject, recipe, seed, folder)
                model = subject.load(folder)
                evaluation = evaluate(model, windows, base, name=recipe.name, batch_size=args.batch_size)
                del model
                row |= {"quantize_seconds": seconds, **figures(base_row, evaluation)}
                save(args.save, [row], conditions())
                say(f"{recipe.group}, {recipe.name}, seed {seed}: {evaluation.summary()}; quantised in {seconds:.1f} s")
            except Exception:  # the other recipes are worth having all the same
                failed += 1
                say(f"{recipe.group}, {recipe.name}, seed {seed} failed:\n{traceback.format_exc()}")
            shutil.rmtree(folder, ignore_errors=True)
            if subject.device.startswith("cuda"):
                torch.cuda.empty_cache()
    return failed


def plan(only: Sequence[str], seeds: int) -> Iterator[tuple[Recipe, int]]:
    """Every recipe once before any has its second seed; what reads no text needs no more than one."""
    for seed in range(seeds):
        for recipe in RECIPES:
            wanted = any(fnmatchcase(f"{recipe.group}, {recipe.name}", pattern) for pattern in only)
            if wanted and (recipe.calibrated or not seed):
                yield recipe, seed


def figures(base: Evaluation, evaluation: Evaluation) -> dict[str, Any]:
    _, record = Report(base=base, others=[evaluation], conditions={}).records()
    del record["scheme"]
    return record


def key(row: Mapping[str, Any]) -> tuple[str, str, int]:
    return row["group"], row["recipe"], row["seed"]


def facts_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in FACTS)


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The measurements in a file, of each kind the latest."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return list({(facts_of(row), key(row)): row for row in map(json.loads, lines)}.values())


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------- table


def sections(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What was measured under the same conditions, and of what model and where it was."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(facts_of(row), []).append(row)
    for part in found.values():
        row = part[0]
        where = (
            ", ".join(row["conditions"]["accelerators"]) if row["device"] != "cpu" else row["conditions"]["processor"]
        )
        yield (
            f"{row['model']}: {row['parameters'] / 1e6:.1f} million parameters in {row['layers']} layers of "
            f"{row['experts']} experts, perplexity {row['base_perplexity']:.2f}; {row['calibration_tokens']} tokens to "
            f"calibrate on, {row['max_tokens']} to evaluate on; {where}\n\n{table(part)}"
        )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one line a recipe, seeds together, and what became of the goals."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["group"], row["recipe"]), []).append(row)
    kl = {name: statistics.fmean(row["kl"] for row in seeds) for name, seeds in found.items()}
    lines = [
        "| | recipe | bits a weight | KL divergence | between seeds | to nearest = 1 | same top-1 % | time a layer |",
        "| --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for recipe in RECIPES:
        seeds = found.get((recipe.group, recipe.name))
        if seeds is None:
            continue
        reference = kl.get((recipe.against, RTN))
        plain = found.get((recipe.against, RTN))
        cells = [
            recipe.group,
            recipe.name,
            f"{statistics.fmean(row['expert_bits'] for row in seeds):.2f}",
            with_error(Estimate(kl[recipe.group, recipe.name], statistics.fmean(row["kl_stderr"] for row in seeds))),
            f"{min(row['kl'] for row in seeds):.3g} to {max(row['kl'] for row in seeds):.3g}" if len(seeds) > 1 else "",
            f"{kl[recipe.group, recipe.name] / reference:.2f}" if reference else "",
            f"{statistics.fmean(row['same_top'] for row in seeds) * 100:.1f}",
            f"{seconds(seeds):.2f} s, {seconds(seeds) / seconds(plain):.1f}x" if plain else f"{seconds(seeds):.2f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| goal | at most | reached | with |", "| --- | --: | --: | --- |"]
    for goal in GOALS:
        names = [name for name in kl if name[0] == goal.group and goal.recipe in (None, name[1])]
        if names and (goal.against, RTN) in kl:
            best = min(names, key=kl.__getitem__)
            lines.append(f"| {goal.what} | {goal.at_most} | {kl[best] / kl[goal.against, RTN]:.3f} | {best[1]} |")
    return "\n".join(lines)


def seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    """A layer, in the run that was disturbed least."""
    return min(float(row["quantize_seconds"]) / row["layers"] for row in rows)


# ----------------------------------------------------------------------------------------------------------------- main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="'shipped', which is the default, or a folder of an unquantised model")
    parser.add_argument("--text", type=Path, help="to evaluate on; default: heldout.txt in the model's folder")
    parser.add_argument("--calibration", type=Path, help="default: calibration.txt in the model's folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where all is run")
    parser.add_argument("--backend", default="auto", help="what runs the quantised layers in the evaluation")
    parser.add_argument("--seeds", type=int, default=3, help="choices of calibration text")
    parser.add_argument("--calibration-tokens", type=int, default=TOKENS, help="tokens of it")
    parser.add_argument("--max-tokens", type=int, default=32768, help="tokens of the text to evaluate on")
    parser.add_argument("--batch-size", type=int, default=8, help="windows a forward pass of the evaluation")
    parser.add_argument("--only", nargs="+", default=["*"], help="recipes whose 'group, name' matches such a glob")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin nothing new after so long; 0: no bound")
    parser.add_argument("--save", type=Path, default=RESULTS, help="file of results, one JSON line each")
    parser.add_argument(
        "--table", action="store_true", help="measure nothing; print what there is of the model, or of all"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    transformers.utils.logging.disable_progress_bar()
    failed = 0 if args.table else measure(args)
    model = Path(args.model).name if args.model else None if args.table else "shipped"
    print("\n\n".join(sections([row for row in rows_of(args.save) if model in (None, row["model"])])))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
