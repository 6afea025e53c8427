"""``transformers serve`` with one model that mxperts has loaded, under one name."""

from __future__ import annotations

import errno
import json
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager
from transformers.cli.serving.utils import CBWorkerDeadError, get_response_template
from transformers.utils import logging
from transformers.utils.chat_parsing.response_templates import load_response_template
from transformers.utils.import_utils import is_serve_available

from mxperts.errors import ArgumentError, MxpertsError

GRACE = 5
"""Seconds that answers have to end when the server is stopped; the next token of each is its last."""
NEEDS_TEMPLATE = ("/v1/chat/completions", "/v1/responses")
"""What can be asked only of a model with a chat template."""

Handler = Callable[[dict[str, Any], str], Awaitable[Any]]
"""Answers the body of a request, given the request's id."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a server serves.

    Attributes:
        name: of the model, in requests and in ``/v1/models``.
        load: gives the model; called with ``attn_implementation``.
        tokenizer: with a chat template, if chats are to be answered.
    """

    name: str
    load: Callable[..., Any]
    tokenizer: Any


def serve(served: Served, *, host: str = "localhost", port: int = 8000, **options: Any) -> None:
    """Load a model and answer requests until the process is interrupted.

    Args:
        served: the model.
        host, port: where to listen.
        **options: other arguments of Transformers' ``Serve``, such as ``continuous_batching``.

    Raises:
        MxpertsError: FastAPI or uvicorn is not installed.
        ArgumentError: the address is in use, or there is no such address; or another argument is wrong.
        KeyboardInterrupt: the server was interrupted, and has stopped.
    """
    if not is_serve_available():
        raise MxpertsError("serving needs FastAPI, uvicorn and more; install them with: pip install 'mxperts[serve]'")
    if options.get("log_level", "warning") not in logging.log_levels:
        levels = ", ".join(logging.log_levels)
        raise ArgumentError(f"log_level must be one of {levels}, not {options['log_level']!r}")
    check_address(host, port)
    with _model_manager(partial(OneModel, served=served)):
        try:
            Server(force_model=served.name, host=host, port=port, non_blocking=True, **options)
        except ValueError as error:
            if isinstance(error, MxpertsError):
                raise
            what = f"{error.doc!r} is not JSON: " if isinstance(error, json.JSONDecodeError) else ""
            raise ArgumentError(f"{what}{error}") from error


class Server(Serve):  # type: ignore[misc]
    """Transformers' server, running in the thread that makes it, with answers as OpenAI's clients expect them."""

    def start_server(self) -> None:
        """Answer requests until the process is interrupted; ``Serve`` calls it when everything but the server runs."""
        from fastapi import HTTPException
        from jinja2 import TemplateError

        errors = {HTTPException: None, ValueError: 400, TemplateError: 400, Exception: 500}
        errors |= {CBWorkerDeadError: 503, Stopping: 503}
        for error, status in errors.items():
            self.server.config.app.add_exception_handler(error, partial(self.refuse, status=status))
        self._completion_handler.handle_request = partial(self.complete, self._completion_handler.handle_request)
        self._response_handler.handle_request = partial(self.respond, self._response_handler.handle_request)
        self._model_manager.stopping = lambda: self.server.should_exit
        self.server.config.timeout_graceful_shutdown = GRACE
        try:
            self.server.run()
        finally:
            self._generation_state.shutdown()  # or the thread of continuous batching keeps the process alive

    async def complete(self, answer: Handler, body: dict[str, Any], request_id: str) -> Any:
        """``/v1/completions``, where an empty prompt would end all continuous batching."""
        prompt = body.get("prompt", "")
        if isinstance(prompt, str) and not self._model_manager.served.tokenizer(prompt)["input_ids"]:
            raise ArgumentError("the prompt is empty; give at least one character")
        return await answer(body, request_id)

    async def respond(self, answer: Handler, body: dict[str, Any], request_id: str) -> Any:
        """``/v1/responses``, in one piece unless a stream is asked for; Transformers makes it a stream by default."""
        return await answer({"stream": False} | body, request_id)

    async def refuse(self, request: Any, error: Any, *, status: int | None) -> Any:
        """Say what went wrong as OpenAI does; Transformers' answers lack a reason, or have it where no client looks.

        Args:
            request: what was asked for.
            error: what answering it raised.
            status: of the answer; None: the error's own.
        """
        from fastapi.responses import JSONResponse

        message = f"{type(error).__name__}: {error}" if status == 500 else str(getattr(error, "detail", error))
        status = status or error.status_code
        served = self._model_manager.served
        if status == 400 and request.url.path in NEEDS_TEMPLATE and not served.tokenizer.chat_template:
            message = (
                f"{served.name!r} has no chat template: start the server with --chat-template FILE, or use "
                "/v1/completions, which continues a text"
            )
        kind = "server_error" if status >= 500 else "invalid_request_error"
        return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status_code=status)


class Stopping(MxpertsError):
    """Ends a generation when the server is stopped: a thread in the midst of one would keep the process alive."""


class OneModel(model_manager.ModelManager):  # type: ignore[misc]
    """Transformers' model manager with a single model, which ``Served`` loads.

    Transformers' own would load whatever ``/load_model`` names, and list what is in the hub's cache: an error where
    there is no cache, and never a folder.
    """

    def __init__(self, *, served: Served, **kwargs: Any) -> None:
        self.served = served
        self.stopping: Callable[[], bool] = lambda: False
        super().__init__(**kwargs)

    def process_model_name(self, model_id: str) -> str:
        """The name itself, if it is the model's."""
        from fastapi import HTTPException

        if model_id != self.served.name:
            raise HTTPException(400, f"this server has the model {self.served.name!r} only, not {model_id!r}")
        return model_id

    def get_gen_models(self) -> list[dict[str, Any]]:
        """What ``/v1/models`` lists."""
        return [{"id": self.served.name, "object": "model", "created": int(time.time()), "owned_by": "mxperts"}]

    def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
        return self.served.tokenizer

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        verbosity = logging.get_verbosity()
        try:
            loaded = self.served.load(attn_implementation=self.attn_implementation)
        finally:
            logging.set_verbosity(verbosity)  # of the server's messages, which loading may have changed
        loaded.register_forward_pre_hook(self._check_stopping)
        parse_answers(self.served.tokenizer, loaded)
        return loaded

    def _check_stopping(self, *args: Any) -> None:
        if self.stopping():
            raise Stopping("the server is stopping")


def parse_answers(tokenizer: Any, model: Any) -> None:
    """Have answers taken as they are where the chat template is not of the kind that Transformers takes it for.

    Answers of models such as Qwen's are searched for tool calls from where the assistant's turn begins. Where a
    template begins it with other words, Transformers searches the prompt too, and answers with all of it.

    Raises:
        ArgumentError: the chat template does not take a question.
    """
    from jinja2 import TemplateError

    stock = get_response_template(tokenizer, model)
    if stock is None or not tokenizer.chat_template:
        return
    question = [{"role": "user", "content": "?"}]
    try:
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ArgumentError(f"the chat template does not take a question: {error}") from error
    if load_response_template(stock).start_anchor_re.search(prompt) is None:
        content = {"close": tokenizer.eos_token} if tokenizer.eos_token else {}
        tokenizer.response_template = {"start_anchor_pattern": r"\Z", "fields": {"content": content}}


@contextmanager
def _model_manager(stand_in: Callable[..., Any]) -> Iterator[None]:
    """``Serve`` makes its model manager itself; here it makes ours."""
    stock = model_manager.ModelManager
    model_manager.ModelManager = stand_in
    try:
        yield
    finally:
        model_manager.ModelManager = stock


def check_address(host: str, port: int) -> None:
    """Find out before a model is loaded whether a server can listen.

    Raises:
        ArgumentError: the address is in use, not this machine's, or not allowed.
    """
    if not 0 <= port < 2**16:
        raise ArgumentError(f"port must be between 0 and {2**16 - 1}, not {port}")
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ArgumentError(f"no address is called {host!r}: {error.strerror or error}") from None
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(address)
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and len(addresses) > 1:
                continue  # a name stands for IPv6 too where there is none
            raise ArgumentError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
