"""What a benchmark of models runs: one model, and tests of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mxperts.checkpoint import Checkpoint, is_mx, parse
from mxperts.errors import ArgumentError
from mxperts.formats import Scheme

DEFAULT_LENGTHS = {"pp": 512, "tg": 128}
"""Those of llama-bench."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model that all contenders run.

    Attributes:
        name: for the table.
        path: its folder.
        scheme: of its experts, as the table has it.
        on_the_fly: the scheme in which it is to be quantised while it loads, if it is not quantised yet.
        bytes: of the checkpoint's tensors.
        vocabulary: token ids are below it.
        context: tokens that it can see at once.
        dtype: of what is not quantised, by name.
    """

    name: str
    path: Path
    scheme: str
    on_the_fly: Scheme | None
    bytes: int
    vocabulary: int
    context: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class ModelTest:
    """Prompt processing (``pp``) or generation (``tg``) of so many tokens."""

    kind: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.kind}{self.tokens}"


def subject_of(path_or_id: str, scheme: str | None = None, *, name: str | None = None) -> Subject:
    """A model to run.

    Args:
        path_or_id: a folder, or a hub id, which is downloaded.
        scheme: for a model that is not quantised; default: ``w_mxfp4``.
        name: for the table; default: the folder's, or the id.

    Raises:
        ArgumentError: a scheme for a model that has one.
        CheckpointError: the checkpoint is incomplete or damaged.
    """
    folder = Path(path_or_id)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(path_or_id, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]))
    checkpoint = Checkpoint.open(folder)
    quantization = checkpoint.config.get("quantization_config")
    on_the_fly = None
    found = parse(quantization) if quantization is not None and is_mx(quantization) else None
    if found is not None:
        if scheme is not None:
            raise ArgumentError(f"{path_or_id} is quantised already; leave scheme out")
        text = ", ".join(dict.fromkeys(rule.scheme.name for rule in found.rules if rule.scheme.weight))
        text += f" rotated by {found.rotation}" if found.rotation else ""
    else:
        on_the_fly = Scheme(scheme or "w_mxfp4")
        text = on_the_fly.name
    config = checkpoint.config.get("text_config", checkpoint.config)
    return Subject(
        name=name or (Path(path_or_id).resolve().name if Path(path_or_id).is_dir() else path_or_id),
        path=folder,
        scheme=text,
        on_the_fly=on_the_fly,
        bytes=sum(checkpoint.info(tensor).nbytes for tensor in checkpoint.names),
        vocabulary=int(config["vocab_size"]),
        context=int(config.get("max_position_embeddings") or 2**31),
        dtype=str(config.get("dtype", config.get("torch_dtype", "float32"))),
    )


def parse_tests(subject: Subject, prompts: str | None = None, generated: str | None = None) -> list[ModelTest]:
    """Tests of a model from two lists of lengths, separated by commas.

    Args:
        subject: the model.
        prompts, generated: 0 or nothing leaves a kind out; None takes ``DEFAULT_LENGTHS``, as far as the model can see.

    Raises:
        ArgumentError: something that is no length, nothing to do, or more than the model can see.
    """
    tests = []
    for kind, text in (("pp", prompts), ("tg", generated)):
        if text is None:
            text = str(min(DEFAULT_LENGTHS[kind], subject.context))
        for length in filter(None, (part.strip() for part in text.split(","))):
            if not length.isdigit():
                raise ArgumentError(f"{length!r} is no number of tokens")
            if int(length) > subject.context:
                raise ArgumentError(f"{length} tokens exceed the {subject.context} that {subject.name} can see")
            if int(length):
                tests.append(ModelTest(kind=kind, tokens=int(length)))
    if not tests:
        raise ArgumentError("nothing to time: give lengths of prompts or of texts to generate")
    return tests
