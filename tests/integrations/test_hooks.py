import pytest
from transformers.quantizers import auto

import mxperts as mx
from mxperts.integrations import hooks
from mxperts.integrations.transformers.loading import TAKEN_OVER

HOOK = hooks.Hook(program="a", replaced="x", by="y", why="z")


@pytest.fixture(autouse=True)
def none_active(monkeypatch):
    monkeypatch.setattr(hooks, "_active", [])


def test_a_hook_is_active_once_it_is_recorded_and_only_once():
    assert hooks.active() == ()
    for _ in range(2):
        hooks.record(HOOK)
    assert hooks.active() == hooks.active("a") == (HOOK,)
    assert hooks.active("b") == ()


def test_install_records_each_entry_that_it_replaces(monkeypatch):
    table = dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    monkeypatch.setattr(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", table)
    before = dict(table)
    for _ in range(2):
        mx.install()
    replaced = {f"AUTO_QUANTIZATION_CONFIG_MAPPING[{method!r}]" for method in TAKEN_OVER}
    assert {hook.replaced for hook in hooks.active("transformers")} == replaced
    assert len(hooks.active()) == len(TAKEN_OVER)
    assert replaced >= {f"AUTO_QUANTIZATION_CONFIG_MAPPING[{m!r}]" for m in before if table[m] is not before[m]}
