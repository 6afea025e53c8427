"""Arguments and options that several commands share, and what they mean."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mxperts import models
from mxperts.cli import processes
from mxperts.cli.output import Output
from mxperts.errors import ArgumentError

SHIPPED = "shipped"
"""What a model argument calls the model that comes with mxperts."""


class Layout(enum.StrEnum):
    """The layouts of MX checkpoints, by ``NAME`` of the modules in ``mxperts.checkpoint``."""

    QUARK = "quark"
    COMPRESSED_TENSORS = "compressed-tensors"
    GPT_OSS = "gpt-oss"


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        help="Folder or hub id. Default, or the word 'shipped': the model that comes with mxperts.", show_default=False
    ),
]
SchemeOption = Annotated[
    str | None,
    typer.Option("--scheme", help="Quantise an unquantised model on the fly, e.g. w_mxfp4_a_mxfp4 or w4a16."),
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="Of everything that is not quantised: auto, bfloat16, float16 or float32.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 …; auto takes a GPU if there is one.")]
BackendOption = Annotated[str, typer.Option("--backend", help="auto, cpu or reference; see `mxperts doctor`.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: PyTorch's choice.")]
TrustRemoteCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow Python code that comes with the model to run.")
]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0, help="Of sampling; 0 is greedy.")]
TopKOption = Annotated[int, typer.Option("--top-k", min=0, help="Sample among this many tokens; 0: all.")]
TopPOption = Annotated[
    float, typer.Option("--top-p", min=0, max=1, help="Sample among tokens of this total probability.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of sampling; the same seed gives the same text.")]
GreedyOption = Annotated[bool, typer.Option("--greedy", help="Take the most likely token instead of sampling.")]
ChatTemplateOption = Annotated[
    Path | None,
    typer.Option(
        "--chat-template",
        exists=True,
        dir_okay=False,
        help="A Jinja file that turns chats into prompts, instead of the model's own.",
    ),
]
OutputOption = Annotated[
    Output | None,
    typer.Option("--output", "-o", help="Default: a table on a terminal, Markdown into a pipe."),
]


def resolve_model(model: str | None) -> str:
    """A folder or hub id; nothing, or ``shipped`` where no such folder exists, is the model that comes with mxperts."""
    if model is None or (model == SHIPPED and not Path(SHIPPED).exists()):
        return str(models.shipped())
    return model


def use_threads(threads: int | None) -> None:
    """Let PyTorch use this many CPU threads."""
    if threads is not None:
        torch.set_num_threads(threads)


def load_tokenizer(model: str, *, trust_remote_code: bool, chat_template: Path | None = None) -> Any:
    """The tokenizer of a resolved model, with the chat template in this file if one is named."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
    return tokenizer


def read_config(path: str, *, trust_remote_code: bool) -> Any:
    """The configuration of a resolved model."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def context_limit(path: str, *, trust_remote_code: bool) -> int:
    """Tokens that a model can see at once, as its configuration says; 2^31 where it says nothing."""
    config = read_config(path, trust_remote_code=trust_remote_code).get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def load_model(
    model: str, *, scheme: str | None, dtype: str, device: str, backend: str, trust_remote_code: bool, **kwargs: Any
) -> Any:
    """A resolved model, loaded with ``mx.load``, which gets ``kwargs`` too, and moved to its device.

    Under torchrun its experts are spread over all processes.
    """
    import transformers

    import mxperts as mx

    messages: Any = transformers.utils.logging
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    options: dict[str, Any] = {"scheme": scheme, "dtype": dtype, "backend": backend, **kwargs}
    options["trust_remote_code"] = trust_remote_code
    if (spread := processes.distributed_config()) is not None:
        if device not in ("auto", "cuda" if torch.cuda.is_available() else "cpu"):
            raise ArgumentError(
                f"--device {device}: under torchrun each process takes a device of its own; leave it out"
            )
        return mx.load(model, distributed_config=spread, **options).eval()
    loaded = mx.load(model, **options)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return loaded.to(device).eval()
