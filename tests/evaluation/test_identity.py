import json
import shutil

import pytest

from mxperts.errors import CheckpointError
from mxperts.evaluation import identity, model_digest


@pytest.fixture
def folder(make_model, tmp_path):
    make_model(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_copy_is_the_same_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("a copy")
    assert model_digest(tmp_path / "copy") == model_digest(str(folder))


def test_a_model_on_the_hub_is_brought_here(folder, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.append(name) or folder)
    assert model_digest("who/what") == model_digest(folder)
    assert asked == ["who/what"]


def test_another_config_or_weight_is_another_model(folder):
    before = model_digest(folder)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    changed = model_digest(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert len({before, changed, model_digest(folder)}) == 3


def test_of_large_files_the_ends_and_samples_between_are_read(folder, monkeypatch):
    monkeypatch.setattr(identity, "SAMPLES", 16)
    monkeypatch.setattr(identity, "SAMPLE", 64)
    file = folder / "model.safetensors"
    data, size = file.read_bytes(), file.stat().st_size
    found = {model_digest(folder)}
    places = [size - 1, 5 * (size - 64) // 15, 5 * (size - 64) // 15 + 63]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1
        file.write_bytes(changed)
        found.add(model_digest(folder))
    assert len(found) == 1 + len(places)


def test_what_is_no_checkpoint_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither"):
        model_digest(folder)
