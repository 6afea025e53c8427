"""``mxperts chat``: talk to a model on a terminal or through a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from torch import Tensor

from mxperts.cli.generate import Sampling, continue_text
from mxperts.cli.options import (
    BackendOption,
    ChatTemplateOption,
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

HELP = "/clear forgets what was said; /exit or Ctrl-D leaves; Ctrl-C stops an answer"
LONGEST = 512
"""Tokens of an answer where the option does not say; in small models half of the context."""


def chat(
    model: ModelArgument = None,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told before everything.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", "-n", min=1, help=f"Of an answer; default: {LONGEST}, or half the context."),
    ] = None,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = 50,
    top_p: TopPOption = 0.95,
    seed: SeedOption = 0,
    greedy: GreedyOption = False,
    chat_template: ChatTemplateOption = None,
    scheme: SchemeOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    threads: ThreadsOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
) -> None:
    """Talk to a model: each line is a message, and the answers go to stdout as they come.

    A model without a chat template continues the text that lines and answers make up. When the model's context is full,
    the oldest messages are forgotten. /clear forgets all, /exit leaves.
    """
    use_threads(threads)
    path = resolve_model(model)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code, chat_template=chat_template)
    limit = context_limit(path, trust_remote_code=trust_remote_code)
    longest = max_new_tokens or min(LONGEST, limit // 2)
    if longest >= limit:
        raise ArgumentError(
            f"answers of {longest} tokens leave no room for questions in the model's {limit}; lower --max-new-tokens"
        )
    loaded = load_model(
        path, scheme=scheme, dtype=dtype, device=device, backend=backend, trust_remote_code=trust_remote_code
    )
    sampling = None if greedy or temperature == 0 else Sampling(temperature, top_k, top_p)

    def answer(prompt: Mapping[str, Tensor], turn: int) -> str:
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        tokens = continue_text(
            loaded, prompt, max_new_tokens=longest, sampling=sampling, seed=seed + turn, streamer=streamer
        )
        return str(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))

    if not tokenizer.chat_template:
        say("The model has no chat template: it continues the text. --chat-template FILE gives it one.")
    if sys.stdin.isatty():
        say(HELP)
    converse(typed(), Conversation(tokenizer=tokenizer, system=system), answer, room=limit - longest)


@dataclass(kw_only=True)
class Conversation:
    """What was said, and the prompt that it makes.

    Attributes:
        tokenizer: with a chat template; without one, the messages make up a text, a line or more each.
        system: what stands before everything.
        messages: the user's and the model's by turns.
    """

    tokenizer: Any
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def add(self, role: str, content: str) -> None:
        """Append a message of the "user" or the "assistant"."""
        self.messages.append({"role": role, "content": content})

    def prompt(self, room: int) -> Mapping[str, Tensor]:
        """Token ids and attention mask [1, <= room], after the oldest messages are forgotten if it takes that.

        Raises:
            ArgumentError: the last message alone does not fit, or the chat template takes no such conversation.
        """
        for forgotten in range(0, len(self.messages), 2):
            tokens = self.tokens(self.messages[forgotten:])
            found = tokens["input_ids"].shape[1]
            if found <= room:
                break
        else:
            raise ArgumentError(f"the message makes {found} tokens where {room} fit; send less")
        if forgotten:
            say(f"(the context is full: the {forgotten} oldest messages are forgotten)")
            del self.messages[:forgotten]
        return tokens

    def tokens(self, messages: Sequence[Mapping[str, str]]) -> Mapping[str, Tensor]:
        """Token ids and attention mask [1, tokens] of these messages."""
        from jinja2 import TemplateError

        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, *messages]
        if not self.tokenizer.chat_template:
            text = "".join(m["content"].removesuffix("\n") + "\n" for m in messages)
            return dict(self.tokenizer(text, return_tensors="pt"))
        try:
            return dict(
                self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
                )
            )
        except TemplateError as error:
            raise ArgumentError(f"the chat template does not take this conversation: {error}") from None


def converse(
    lines: Iterable[str],
    conversation: Conversation,
    answer: Callable[[Mapping[str, Tensor], int], str],
    *,
    room: int,
) -> None:
    """Answer line after line until there are no more, or one says /exit.

    Args:
        lines: messages and commands.
        conversation: is added to.
        answer: shows and returns the answer to a prompt; it also gets the number of answers so far.
        room: tokens a prompt may have.
    """
    turn = 0
    for line in lines:
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/clear":
                conversation.messages.clear()
                continue
            case command if command.startswith("/"):
                say(HELP if command == "/help" else f"there is no command {command.split()[0]}; {HELP}")
                continue
        conversation.add("user", line)
        try:
            conversation.add("assistant", answer(conversation.prompt(room), turn))
            turn += 1
        except (ArgumentError, KeyboardInterrupt) as error:
            if not sys.stdin.isatty():
                raise  # who is not there cannot say it otherwise
            conversation.messages.pop()
            say(f"error: {error}" if str(error) else "\n(stopped; message and answer are forgotten)")


def typed() -> Iterator[str]:
    """Lines from stdin; a terminal's can be edited, and show a prompt."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it lets input() edit lines
    while True:
        try:
            yield input("> " if sys.stdout.isatty() else "")
        except EOFError:
            return
