"""Models whose experts are held in a backend's own layout: less memory, and nothing else that anybody could notice."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.utils import logging

import mxperts as mx
from mxperts.checkpoint import Checkpoint
from mxperts.integrations.transformers import mx_experts
from mxperts.nn.prepared import PreparedParameter
from mxperts.quantization import quantize_checkpoint

LAYERS = 3
CONFIG = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same model in one scheme with two sets of weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed in range(2):
        torch.manual_seed(seed)
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**CONFIG))
        model.save_pretrained(folder / f"dense{seed}")
        quantize_checkpoint(folder / f"dense{seed}", folder / f"mx{seed}", "w_mxfp6_e2m3_a_mxfp6_e2m3")
    return [folder / f"mx{seed}" for seed in range(2)]


def load(folder: Path, **kwargs: Any) -> Any:
    return mx.load(folder, **{"dtype": torch.float32, **kwargs})


def logits_of(model: Any) -> Tensor:
    tokens = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits: Tensor = model(tokens).logits
    return logits


def packed_parameters(model: Any) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if ".experts." in n}


def prepared(model: Any) -> list[bool]:
    """Of each experts module, whether its weights are in the backend's layout; all its parameters agree."""
    found = []
    for _, module in mx_experts(model):
        (is_prepared,) = {type(p) is PreparedParameter for p in module.parameters()}
        found.append(is_prepared)
    return found


def test_loading_prepares_layer_by_layer(checkpoints: list[Path], reversing: ModuleType) -> None:
    model = load(checkpoints[0])
    assert prepared(model) == [True] * LAYERS
    assert reversing.copies == [0] * LAYERS
    assert all(ref.expired() for given, _ in reversing.layers for ref in given)
    assert not any(ref.expired() for _, returned in reversing.layers for ref in returned)
    logits_of(model)
    assert len(reversing.layers) == LAYERS
    assert not reversing.canonical_calls


def test_what_is_asked_of_a_model_all_the_time_reads_no_weights(checkpoints: list[Path], reversing: ModuleType) -> None:
    model, plain = load(checkpoints[0]), load(checkpoints[0], backend="reference")
    assert prepared(plain) == [False] * LAYERS
    assert model.num_parameters() == plain.num_parameters()
    assert model.get_memory_footprint() == plain.get_memory_footprint()
    assert (model.device, model.dtype) == (plain.device, plain.dtype)
    shapes = [
        {n: (p.shape, p.dtype, p.nbytes, p.requires_grad) for n, p in m.named_parameters()} for m in (model, plain)
    ]
    assert shapes[0] == shapes[1]
    model.eval().requires_grad_(False)
    model.generate(torch.zeros(1, 2, dtype=torch.int64), max_new_tokens=2, do_sample=False, pad_token_id=0)
    model.zero_grad()
    str(model)
    assert prepared(model) == [True] * LAYERS
    assert not reversing.unprepared


def test_saving_writes_canonical_bytes(checkpoints: list[Path], reversing: ModuleType, tmp_path: Path) -> None:
    model = load(checkpoints[0])
    expected = logits_of(model)
    for folder, arguments in (("whole", {}), ("sharded", {"max_shard_size": "20KB"})):
        model.save_pretrained(tmp_path / folder, **arguments)
        before, after = Checkpoint.open(checkpoints[0]), Checkpoint.open(tmp_path / folder)
        assert set(before.names) == set(after.names)
        assert all(torch.equal(before.tensor(n), after.tensor(n)) for n in before.names)
        assert torch.equal(logits_of(load(tmp_path / folder)), expected)
        assert torch.equal(logits_of(model), expected)
        assert prepared(model) == [True] * LAYERS
    assert not any(reversing.copies)


def test_a_state_dict_has_canonical_bytes(checkpoints: list[Path], reversing: ModuleType) -> None:
    model, plain = load(checkpoints[0]), load(checkpoints[0], backend="reference")
    state, expected = model.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys()
    assert all(type(t) is Tensor and torch.equal(t, expected[n]) for n, t in state.items())
    assert torch.equal(logits_of(model), logits_of(plain))
    assert all(torch.equal(t, expected[n]) for n, t in state.items())


def test_parameters_themselves_may_be_saved(checkpoints: list[Path], reversing: ModuleType, tmp_path: Path) -> None:
    """Not through a state dict, which could be taken care of, but by the parameters: no file can get anything else."""
    from safetensors.torch import load_file, save_file

    expected = packed_parameters(load(checkpoints[0], backend="reference"))
    save_file(dict(packed_parameters(load(checkpoints[0]))), tmp_path / "x.safetensors")
    torch.save(packed_parameters(load(checkpoints[0])), tmp_path / "x.pt")
    for saved in (load_file(tmp_path / "x.safetensors"), torch.load(tmp_path / "x.pt", weights_only=True)):
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[n], p) for n, p in expected.items())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_loaded_weights_take_effect(
    assign: bool, compiled: bool, checkpoints: list[Path], reversing: ModuleType
) -> None:
    model, other = load(checkpoints[0]), load(checkpoints[1])
    run = torch.compile(model, backend="aot_eager") if compiled else model
    before, expected = logits_of(run), logits_of(other)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(logits_of(run), expected)
    assert not torch.equal(before, expected)
    assert torch.equal(logits_of(model), expected)
    assert prepared(model) == [True] * LAYERS


def test_converting_and_moving(checkpoints: list[Path], reversing: ModuleType) -> None:
    model = load(checkpoints[0], dtype=torch.bfloat16)
    expected = load(checkpoints[0], dtype=torch.bfloat16, backend="reference")
    values = {n: p.clone() for n, p in packed_parameters(expected).items()}
    for convert in (lambda m: m.to(torch.float32), lambda m: m.to(torch.float16), lambda m: m.to("cpu", torch.float32)):
        convert(model)
        assert torch.equal(logits_of(model), logits_of(convert(expected)))
        assert prepared(model) == [True] * LAYERS
        assert all(torch.equal(p, values[n]) for n, p in packed_parameters(model).items())
    logits_of(model)
    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_copies(checkpoints: list[Path], reversing: ModuleType) -> None:
    model = load(checkpoints[0])
    expected = logits_of(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert prepared(twin) == [False] * LAYERS
        assert torch.equal(logits_of(twin), expected)
        assert prepared(twin) == [True] * LAYERS
        for p in packed_parameters(twin).values():
            p.zero_()
        assert not torch.equal(logits_of(twin), expected)
        assert torch.equal(logits_of(model), expected)


def test_a_deleted_model_frees_its_memory_at_once(checkpoints: list[Path], reversing: ModuleType) -> None:
    model = load(checkpoints[0])
    weights = [
        StorageWeakRef(t.untyped_storage()) for _, m in mx_experts(model) for t in m.mxperts.prepared.experts.weights
    ]
    assert not any(ref.expired() for ref in weights)
    experts = [module for _, module in mx_experts(model)]
    del model
    for module in experts:
        module.__dict__.clear()
    del module, experts
    assert all(ref.expired() for ref in weights)


def test_short_of_memory_loading_fails_with_one_clear_error(checkpoints: list[Path], reversing: ModuleType) -> None:
    reversing.errors[1] = MemoryError()
    with pytest.raises(mx.BackendUnavailable, match=r"preparing Qwen3MoeExperts for its backend failed: MemoryError"):
        load(checkpoints[0])


def test_short_of_memory_a_model_stays_usable(checkpoints: list[Path], reversing: ModuleType) -> None:
    model = load(checkpoints[0])
    expected, values = logits_of(model), {n: t.clone() for n, t in model.state_dict().items()}
    reversing.errors[len(reversing.layers) + 1] = MemoryError()
    with pytest.raises(mx.BackendUnavailable, match="weights are as they were"):
        logits_of(model)
    assert prepared(model) == [True, False, False]
    assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())
    reversing.errors.clear()
    assert torch.equal(logits_of(model), expected)
    assert prepared(model) == [True] * LAYERS


def test_a_bar_shows_the_preparation(
    checkpoints: list[Path], reversing: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    load(checkpoints[0])
    assert "Preparing" not in capsys.readouterr().err
    logging.enable_progress_bar()
    load(checkpoints[0], backend="reference")
    assert "Preparing" not in capsys.readouterr().err
    load(checkpoints[0])
    captured = capsys.readouterr()
    assert f"Preparing experts: 100%|██████████| {LAYERS}/{LAYERS}" in captured.err
    assert not captured.out


def test_weights_that_are_offloaded_stay_as_they_are(checkpoints: list[Path], reversing: ModuleType) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = load(checkpoints[0])
    expected, prepared_layers = logits_of(model), len(reversing.layers)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert {p.device.type for p in packed_parameters(model).values()} == {"meta"}
    assert torch.equal(logits_of(model), expected)
    assert len(reversing.layers) == prepared_layers
    assert len(reversing.canonical_calls) == LAYERS
