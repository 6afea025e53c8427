from __future__ import annotations

import socket

import pytest
from transformers.cli.serving import model_manager

from mxperts.errors import ArgumentError, MxpertsError
from mxperts.integrations.transformers import serving
from mxperts.integrations.transformers.serving import OneModel, Served, check_address, serve


@pytest.fixture
def taken():
    """A port on which something listens."""
    with socket.create_server(("localhost", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.fixture
def served():
    def load(**kwargs: object) -> object:
        raise AssertionError("nothing is to be loaded")

    return Served(name="mine", load=load, tokenizer=object())


def test_an_address_in_use_is_an_error(taken):
    with pytest.raises(ArgumentError, match=f"cannot listen on localhost:{taken}: .*choose another --port"):
        check_address("localhost", taken)


def test_a_free_address_is_none(taken):
    with socket.create_server(("localhost", 0)) as listening:
        free = listening.getsockname()[1]
    check_address("localhost", free)


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("localhost", 2**16, "port must be between 0 and 65535, not 65536"),
        ("no.such.host.invalid", 80, "no address is called 'no.such.host.invalid'"),
        ("192.0.2.1", 8000, r"cannot listen on 192\.0\.2\.1:8000"),  # for documentation: nobody's (RFC 5737)
    ],
)
def test_impossible_addresses(host, port, message):
    with pytest.raises(ArgumentError, match=message):
        check_address(host, port)


def test_what_is_missing_is_named(served, monkeypatch):
    monkeypatch.setattr(serving, "is_serve_available", lambda: False)
    with pytest.raises(MxpertsError, match=r"pip install 'mxperts\[serve\]'"):
        serve(served)


def test_errors_come_before_the_model_is_loaded(served, monkeypatch, taken):
    monkeypatch.setattr(serving, "is_serve_available", lambda: True)
    with pytest.raises(ArgumentError, match="cannot listen"):
        serve(served, port=taken)
    with pytest.raises(ArgumentError, match="log_level must be one of detail, debug, info"):
        serve(served, log_level="loud")


def test_transformers_keeps_its_own_model_manager(served, monkeypatch):
    stock = model_manager.ModelManager

    def server(**options: object) -> None:
        assert options == {"force_model": "mine", "host": "localhost", "port": 0, "non_blocking": True, "compile": True}
        assert model_manager.ModelManager is not stock
        raise ValueError("stop here")

    monkeypatch.setattr(serving, "is_serve_available", lambda: True)
    monkeypatch.setattr(serving, "Server", server)
    with pytest.raises(ArgumentError, match="stop here"):
        serve(served, port=0, compile=True)
    assert model_manager.ModelManager is stock


def test_one_model_is_listed_and_no_other_loaded(served):
    fastapi = pytest.importorskip("fastapi")
    manager = OneModel(served=served)
    (listed,) = manager.get_gen_models()
    assert (listed["id"], listed["object"]) == ("mine", "model")
    assert manager.process_model_name("mine") == "mine"
    with pytest.raises(fastapi.HTTPException) as refused:
        manager.process_model_name("Qwen/Qwen3-0.6B")
    assert refused.value.status_code == 400
    assert "'mine' only" in refused.value.detail
