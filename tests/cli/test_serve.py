"""The command's arguments, and, where `mxperts[serve]` is installed, a real server with OpenAI's client."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mxperts.cli import app
from mxperts.cli.serve import NOT_TAKEN
from mxperts.quantization import quantize_checkpoint

PROMPT = "KING RICHARD.\n"
MESSAGES = [{"role": "user", "content": "Who art thou?"}]
SIZE = {"temperature": 0, "max_tokens": 12}


@pytest.fixture
def forwarded(monkeypatch):
    """What the command hands on in place of a server: the arguments of ``serve``."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(
        "mxperts.integrations.transformers.serving.serve",
        lambda served, **options: found.update(options, served=served),
    )
    return found


def test_the_servers_options_are_the_commands(runner):
    shown = runner.invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).stdout
    for option in ("--host", "--port", "--continuous-batching", "--cb-num-blocks", "--reasoning", "--scheme"):
        assert option in shown
    for name in NOT_TAKEN:
        assert f"--{name.replace('_', '-')}" not in shown


def test_they_are_forwarded_and_the_model_is_loaded_packed(runner, checkpoint, forwarded):
    arguments = [
        "--cb-num-blocks",
        "64",
        str(checkpoint),
        "--port",
        "1234",
        "--continuous-batching",
        "--scheme",
        "w4a4",
    ]
    result = runner.invoke(app, ["serve", *arguments])
    assert result.exit_code == 0, result.stderr
    options = {name: forwarded[name] for name in ("port", "host", "continuous_batching", "cb_num_blocks", "log_level")}
    assert options == {
        "port": 1234,
        "host": "localhost",
        "continuous_batching": True,
        "cb_num_blocks": 64,
        "log_level": "warning",
    }
    assert not set(NOT_TAKEN) & set(forwarded)
    served = forwarded["served"]
    assert served.name == str(checkpoint)
    experts = served.load(attn_implementation="eager").model.layers[0].mlp.experts
    assert experts.mxperts.activation.name == "mxfp4"
    assert experts.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("arguments", "name"), [([], "shipped"), (["shipped"], "shipped"), (["--served-model-name", "will"], "will")]
)
def test_the_models_name(runner, forwarded, arguments, name):
    result = runner.invoke(app, ["serve", *arguments])
    assert result.exit_code == 0, result.stderr
    assert forwarded["served"].name == name
    assert f"{name} has no chat template" in result.stderr


def test_a_chat_template_is_given_to_the_tokenizer(runner, forwarded, template):
    result = runner.invoke(app, ["serve", "--chat-template", str(template)])
    assert (result.exit_code, result.stderr) == (0, "")
    assert forwarded["served"].tokenizer.chat_template == template.read_text()


@pytest.mark.parametrize("wrong", [["--prot", "80"], ["--port", "many"], ["--quantization", "bnb-4bit"]])
def test_what_the_server_does_not_know_is_a_usage_error(runner, wrong):
    result = runner.invoke(app, ["serve", *wrong])
    assert result.exit_code == 2
    assert wrong[0] in result.stderr


def test_a_broken_chat_template_is_an_error(runner, tmp_path):
    pytest.importorskip("fastapi")
    (tmp_path / "broken.jinja").write_text("{% for %}")
    result = runner.invoke(app, ["serve", "--port", "0", "--chat-template", str(tmp_path / "broken.jinja")])
    assert result.exit_code == 1
    assert "error: the chat template does not take a question: " in result.stderr


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("templates") / "chat.jinja"
    file.write_text("{% for m in messages %}{{ m['role'].upper() }}.\n{{ m['content'] }}\n\n{% endfor %}KING.\n")
    return file


@contextlib.contextmanager
def server(command: Path, *arguments: str) -> Iterator[tuple[Any, subprocess.Popen[str]]]:
    """A client of a server that runs in a home without a hub cache, and its process."""
    openai = pytest.importorskip("openai")
    with socket.create_server(("localhost", 0)) as listening:
        port = listening.getsockname()[1]
    process = subprocess.Popen(
        [command, "serve", *arguments, "--port", str(port)],
        env={**os.environ, "HF_HOME": "/nonexistent", "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
    try:
        for _ in range(240):
            with contextlib.suppress(openai.APIConnectionError):
                client.models.list()
                break
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.5)
        yield client, process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The shipped model as a checkpoint in AMD Quark's layout."""
    from mxperts import models

    folder = tmp_path_factory.mktemp("checkpoints") / "w4a4"
    quantize_checkpoint(models.shipped(), folder, "w4a4")
    return str(folder)


@pytest.fixture(scope="module", params=["checkpoint", "on the fly", "continuous batching"])
def served(
    request: pytest.FixtureRequest, command: Path, packed: str, template: Path
) -> Iterator[tuple[Any, subprocess.Popen[str], str]]:
    pytest.importorskip("fastapi")
    how = {
        "checkpoint": (packed,),
        "on the fly": ("shipped", "--scheme", "w4a4"),
        "continuous batching": (packed, "--continuous-batching", "--cb-num-blocks", "64"),
    }[request.param]
    with server(command, *how, "--chat-template", str(template)) as (client, process):
        yield client, process, how[0]


def test_completions_are_what_generate_says(served, runner, packed):
    client, _, name = served
    said = runner.invoke(app, ["generate", packed, "--greedy", "--max-new-tokens", "12", "--prompt", PROMPT])
    assert said.exit_code == 0, said.stderr
    expected = said.stdout.removeprefix(PROMPT).rstrip("\n")
    whole = client.completions.create(model=name, prompt=PROMPT, **SIZE)
    assert whole.choices[0].text.rstrip("\n") == expected
    assert (whole.model, whole.usage.completion_tokens) == (name, 12)
    parts = client.completions.create(model=name, prompt=PROMPT, stream=True, **SIZE)
    pieces = [part.choices[0].text for part in parts if part.choices and part.choices[0].text]
    assert "".join(pieces).rstrip("\n") == expected
    assert len(pieces) > 1


def test_chats_and_responses_are_what_chat_says(served, runner, packed, template):
    client, _, name = served
    arguments = ["chat", packed, "--greedy", "--max-new-tokens", "12", "--chat-template", str(template)]
    expected = runner.invoke(app, arguments, input=MESSAGES[0]["content"]).stdout.rstrip("\n")
    whole = client.chat.completions.create(model=name, messages=MESSAGES, **SIZE)
    parts = client.chat.completions.create(model=name, messages=MESSAGES, stream=True, **SIZE)
    question = {"model": name, "input": MESSAGES[0]["content"], "temperature": 0, "max_output_tokens": 12}
    response = client.responses.create(**question)
    events = client.responses.create(**question, stream=True)
    texts = [
        whole.choices[0].message.content,
        "".join(part.choices[0].delta.content or "" for part in parts if part.choices),
        response.output_text,
        "".join(event.delta for event in events if event.type == "response.output_text.delta"),
    ]
    assert [text.strip() for text in texts] == [expected.strip()] * 4  # the server strips some of them


def test_several_at_once(served):
    client, _, name = served
    prompts = [PROMPT, "Now is the winter", "My lord,", "SCENE II."]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda p: client.completions.create(model=name, prompt=p, **SIZE), prompts))
    assert [answer.usage.completion_tokens for answer in answers] == [12] * 4


def test_only_the_served_model_is_known(served):
    import openai

    client, _, name = served
    assert [model.id for model in client.models.list()] == [name]
    with pytest.raises(openai.BadRequestError, match=f"{re.escape(name)}.*Qwen/Qwen3-0.6B"):
        client.completions.create(model="Qwen/Qwen3-0.6B", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match=re.escape(name)):
        client.post(
            "http://localhost:" + str(client.base_url.port) + "/load_model", cast_to=object, body={"model": "x"}
        )


def test_an_empty_prompt_is_refused_and_the_server_goes_on(served):
    import openai

    client, _, name = served
    with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
        client.completions.create(model=name, prompt="", **SIZE)
    assert client.completions.create(model=name, prompt=PROMPT, **SIZE).usage.completion_tokens == 12


def test_without_a_template_chats_are_refused_with_advice_and_interruption_ends_a_long_answer(command, packed):
    pytest.importorskip("fastapi")
    import openai

    with server(command, packed) as (client, process):
        for ask in (
            lambda: client.chat.completions.create(model=packed, messages=MESSAGES),
            lambda: client.responses.create(model=packed, input="Who art thou?"),
        ):
            with pytest.raises(
                openai.BadRequestError, match="has no chat template: start the server with --chat-templ"
            ):
                ask()
        with ThreadPoolExecutor(1) as pool:
            long = pool.submit(client.completions.create, model=packed, prompt=PROMPT, temperature=0, max_tokens=20000)
            time.sleep(2)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            with pytest.raises(openai.APIError, match="the server is stopping"):
                long.result()
