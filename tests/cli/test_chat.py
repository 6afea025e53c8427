from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import pytest
import torch

from mxperts.cli import app, chat
from mxperts.cli.chat import Conversation, converse
from mxperts.errors import ArgumentError


class Words:
    """A tokenizer whose tokens are words; lines end in one of their own."""

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template
        self.seen: list[str] = []

    def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        self.seen.append(text)
        ids = torch.arange(len(text.replace("\n", " | ").split()))[None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **kwargs: object) -> dict[str, torch.Tensor]:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        return self(ImmutableSandboxedEnvironment().from_string(self.chat_template).render(messages=messages), "pt")


TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture
def conversation():
    return Conversation(tokenizer=Words(TEMPLATE))


@pytest.fixture
def terminal(monkeypatch):
    stdin = io.StringIO()
    stdin.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", stdin)


def ask(conversation, *lines, room=100, answer=lambda prompt, turn: f"answer {turn}"):
    converse(lines, conversation, answer, room=room)
    return [m["content"] for m in conversation.messages]


def test_messages_and_answers_make_the_next_prompt(conversation):
    assert ask(conversation, "one", "two") == ["one", "answer 0", "two", "answer 1"]
    assert conversation.tokenizer.seen[-1] == "user: one\nassistant: answer 0\nuser: two\nassistant:"


def test_without_a_template_they_make_a_text():
    conversation = Conversation(tokenizer=Words(), system="Act I")
    ask(conversation, "one", "two", answer=lambda prompt, turn: " goes on\n")
    assert conversation.tokenizer.seen[-1] == "Act I\none\n goes on\ntwo\n"


def test_the_system_message_comes_first():
    conversation = Conversation(tokenizer=Words(TEMPLATE), system="be brief")
    ask(conversation, "one")
    assert conversation.tokenizer.seen[-1] == "system: be brief\nuser: one\nassistant:"


def test_commands(conversation, capsys):
    assert ask(conversation, "one", "", "/clear", "two", "/help", "/what", "/exit", "three") == ["two", "answer 1"]
    said = capsys.readouterr().err
    assert "there is no command /what; /clear forgets" in said
    assert said.count(chat.HELP) == 2


def test_the_oldest_messages_are_forgotten_when_the_context_is_full(conversation, capsys):
    # an exchange of one word and two makes 7 tokens, a question and the last word 4
    assert ask(conversation, "one", "two", "three", room=11) == ["two", "answer 1", "three", "answer 2"]
    assert "(the context is full: the 2 oldest messages are forgotten)" in capsys.readouterr().err


@pytest.mark.usefixtures("terminal")
def test_a_message_alone_too_long_is_an_error_on_a_terminal_and_the_talk_goes_on(conversation, capsys):
    assert ask(conversation, "one", "a b c d e f g h i j", "two", room=11) == ["one", "answer 0", "two", "answer 1"]
    assert "error: the message makes 13 tokens where 11 fit; send less" in capsys.readouterr().err


def test_it_ends_the_talk_where_nobody_sits(conversation, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(ArgumentError, match="13 tokens where 11 fit"):
        ask(conversation, "a b c d e f g h i j", room=11)


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_stops_an_answer_and_not_the_talk(conversation, capsys):
    def answer(prompt: object, turn: int) -> str:
        if len(conversation.messages) == 1:
            return "fine"
        raise KeyboardInterrupt

    assert ask(conversation, "one", "two", answer=answer) == ["one", "fine"]
    assert "(stopped; message and answer are forgotten)" in capsys.readouterr().err


def test_a_template_that_refuses_says_why():
    conversation = Conversation(tokenizer=Words("{{ messages[0].nothing.at_all }}"))
    conversation.add("user", "one")
    with pytest.raises(ArgumentError, match="the chat template does not take this conversation"):
        conversation.prompt(100)


def joined(text: str) -> str:
    return "".join(text.split())  # the tiny model's tokens are characters, joined with blanks


def test_through_a_pipe_answers_are_what_generate_says(runner, checkpoint):
    arguments = [str(checkpoint), "--greedy", "--max-new-tokens", "12"]
    talked = runner.invoke(app, ["chat", *arguments], input="Now is\n/clear\nNow is\n")
    generated = runner.invoke(app, ["generate", *arguments, "--prompt", "Now is\n"])
    assert talked.exit_code == generated.exit_code == 0, talked.stderr
    assert "no chat template" in talked.stderr
    first, second = talked.stdout.splitlines()
    assert first == second
    assert joined(generated.stdout) == "Nowis" + joined(first)


def test_chat_template_and_scheme(runner, checkpoint, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    arguments = ["chat", str(checkpoint), "--greedy", "--max-new-tokens", "12", "--chat-template", str(template)]
    texts = [
        runner.invoke(app, [*arguments, *extra], input="Now is\n")
        for extra in ([], ["--system", "winter"], ["--scheme", "w4a4"])
    ]
    assert [t.exit_code for t in texts] == [0, 0, 0], texts[0].stderr
    assert len({t.stdout for t in texts}) == 3
    assert "no chat template" not in texts[0].stderr


def test_answers_leave_room_for_questions(runner, checkpoint):
    result = runner.invoke(app, ["chat", str(checkpoint), "--max-new-tokens", "64"], input="Now\n")
    assert result.exit_code == 1
    assert "answers of 64 tokens leave no room for questions in the model's 64" in result.stderr
