"""``mxperts generate``: continue a text."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from torch import Tensor

from mxperts.cli import processes
from mxperts.cli.options import (
    BackendOption,
    DeviceOption,
    DtypeOption,
    GreedyOption,
    ModelArgument,
    SchemeOption,
    SeedOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    TrustRemoteCodeOption,
    context_limit,
    load_model,
    load_tokenizer,
    resolve_model,
    use_threads,
)
from mxperts.cli.output import say
from mxperts.errors import ArgumentError


def generate(
    model: ModelArgument = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text to continue; default: read it from stdin.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to add.")] = 128,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = 50,
    top_p: TopPOption = 0.95,
    seed: SeedOption = 0,
    greedy: GreedyOption = False,
    scheme: SchemeOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    threads: ThreadsOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
) -> None:
    """Continue a text; prompt and continuation go to stdout as they come."""
    if prompt is None:
        if processes.count() > 1:
            raise typer.BadParameter("is needed under torchrun, whose processes share stdin", param_hint="--prompt")
        if sys.stdin.isatty():
            raise typer.BadParameter("is needed unless the prompt is piped in", param_hint="--prompt")
        prompt = sys.stdin.read().rstrip("\n")
    use_threads(threads)
    path = resolve_model(model)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    inputs = tokenizer(prompt, return_tensors="pt")
    prompt_tokens = inputs["input_ids"].shape[1]
    if prompt_tokens == 0:
        raise ArgumentError("the prompt is empty; give at least one character")
    limit = context_limit(path, trust_remote_code=trust_remote_code)
    if prompt_tokens + max_new_tokens > limit:
        raise ArgumentError(
            f"a prompt of {prompt_tokens} tokens and {max_new_tokens} new ones exceed the model's {limit}; "
            "shorten the prompt or lower --max-new-tokens"
        )
    loaded = load_model(
        path, scheme=scheme, dtype=dtype, device=device, backend=backend, trust_remote_code=trust_remote_code
    )

    from transformers import TextStreamer

    sampling = None if greedy or temperature == 0 else Sampling(temperature, top_k, top_p)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    start = time.perf_counter()
    output = continue_text(
        loaded, inputs, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, streamer=streamer
    )
    seconds = time.perf_counter() - start
    new_tokens = output.shape[1] - prompt_tokens
    say(f"{new_tokens} tokens in {seconds:.1f} s, {new_tokens / seconds:.1f} tokens/s")


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.95


def continue_text(
    model: Any,
    inputs: Mapping[str, Tensor],
    *,
    max_new_tokens: int,
    sampling: Sampling | None,
    seed: int = 0,
    streamer: Any = None,
) -> Tensor:
    """Prompt and continuation as token ids [1, tokens]; greedy without ``sampling``.

    Args:
        model: a causal language model of Transformers.
        inputs: what the tokenizer made of the prompt.
        max_new_tokens: fewer come if the model ends the text.
        sampling: None is greedy.
        seed: of sampling.
        streamer: gets every token as it comes.
    """
    from transformers import set_seed

    set_seed(seed)
    output: Tensor = model.generate(
        input_ids=inputs["input_ids"].to(model.device),
        attention_mask=inputs["attention_mask"].to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=sampling is not None,
        streamer=streamer,
        logits_processor=[processes.SameLogits()] if processes.count() > 1 else None,
        **(asdict(sampling) if sampling else {}),
    )
    return output
