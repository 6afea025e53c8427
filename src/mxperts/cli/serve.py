"""``mxperts serve``: a model behind an OpenAI-compatible server, which is ``transformers serve``."""

from __future__ import annotations

from functools import cache, partial
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from mxperts.cli.options import (
    SHIPPED,
    BackendOption,
    ChatTemplateOption,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    SchemeOption,
    ThreadsOption,
    TrustRemoteCodeOption,
    load_model,
    load_tokenizer,
    resolve_model,
    use_threads,
)
from mxperts.cli.output import say

NOT_TAKEN = ("force_model", "model_timeout", "non_blocking", "quantization")
"""Arguments of ``transformers serve`` that have no use here: there is one model, it stays, and mxperts quantises it."""
PANEL = "Options of `transformers serve`"
_SERVER = "mxperts.server"


class ServeCommand(TyperCommand):
    """A command that has the options of ``transformers serve`` besides its own.

    They are read off Transformers when the command line is parsed or help is shown, and so are those of the version
    that is installed.
    """

    def get_params(self, ctx: Any) -> list[Any]:
        """Our options, then the server's that are not among them."""
        ours = super().get_params(ctx)
        return [*ours, *(p for p in server_options() if p.name not in {o.name for o in ours})]

    def invoke(self, ctx: Any) -> Any:
        """Run the command; it finds the server's options under ``ctx.meta``."""
        ours = {p.name for p in super().get_params(ctx)}
        ctx.meta[_SERVER] = {name: ctx.params.pop(name) for name in list(ctx.params) if name not in ours}
        return super().invoke(ctx)


@cache
def server_options() -> tuple[Any, ...]:
    """The options of ``transformers serve``, as they are parsed there."""
    from transformers.cli.serve import Serve

    server = typer.Typer(add_completion=False)
    server.command()(Serve)
    found: Any = typer.main.get_command(server)
    options = tuple(p for p in found.params if p.name not in NOT_TAKEN)
    for option in options:
        option.rich_help_panel = PANEL
    return options


def serve(
    ctx: typer.Context,
    model: ModelArgument = None,
    scheme: SchemeOption = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(
            "--served-model-name", help="What requests call the model; default: MODEL as given.", show_default=False
        ),
    ] = None,
    chat_template: ChatTemplateOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    threads: ThreadsOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
) -> None:
    """Serve a model with its weights packed: chat completions, completions and responses as OpenAI has them.

    The server is `transformers serve`, which has to be installed: pip install 'mxperts\\[serve]'.
    """
    from mxperts.integrations.transformers.serving import Served, serve

    use_threads(threads)
    path = resolve_model(model)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code, chat_template=chat_template)
    name = served_model_name or model or SHIPPED
    if not tokenizer.chat_template:
        say(f"{name} has no chat template: /v1/completions works, chats need --chat-template")
    if ctx.meta[_SERVER]["continuous_batching"]:
        say("continuous batching: how the first request is sampled is how all are (a limit of Transformers)")
    load = partial(
        load_model,
        path,
        scheme=scheme,
        dtype=dtype,
        device=device,
        backend=backend,
        trust_remote_code=trust_remote_code,
    )
    serve(Served(name=name, load=load, tokenizer=tokenizer), **ctx.meta[_SERVER])
