"""Weights in a backend's own layout: parameters without memory that behave as if they had it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import mxperts as mx
from mxperts.nn.prepared import PreparedParameter

E, H, INNER, T, K = 4, 40, 72, 3, 2
NAMES = ("gate_up_proj", "gate_up_proj_scale", "down_proj", "down_proj_scale")


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)])
    return torch.randn(T, H, generator=g).to(dtype), ids, torch.rand(T, K, generator=g)


def experts(seed: int = 1, scheme: str = "w4a4") -> mx.MXExperts:
    g = torch.Generator().manual_seed(seed)
    gate_up, down = torch.randn(E, 2 * INNER, H, generator=g), torch.randn(E, H, INNER, generator=g)
    return mx.MXExperts.quantize(gate_up, down, scheme, activation="swigluoai", interleaved=True)


def prepared(module: nn.Module) -> set[bool]:
    """Whether the parameters' values are in the backend's layout; either all or none may be."""
    return {type(module._parameters[n]) is PreparedParameter for n in NAMES if n in module._parameters}


@pytest.mark.parametrize("scheme", ["w4a4", "mxfp6_e2m3", "none"])
def test_the_first_forward_pass_prepares_and_frees(scheme: str, reversing: ModuleType) -> None:
    module = experts(scheme=scheme)
    values = {n: p.clone() for n, p in module.named_parameters()}
    parameters = dict(module.named_parameters())
    memory = {n: StorageWeakRef(p.untyped_storage()) for n, p in parameters.items()}
    out = module(*inputs())
    assert prepared(module) == {True}
    assert all(ref.expired() for ref in memory.values())
    assert torch.equal(module(*inputs()), out)
    assert len(reversing.layers) == 1
    assert not reversing.canonical_calls
    for name, p in module.named_parameters():
        assert p is parameters[name]
        v = values[name]
        assert (p.shape, p.dtype, p.device, p.numel(), p.nbytes) == (v.shape, v.dtype, v.device, v.numel(), v.nbytes)
    assert prepared(module) == {True}
    for name, p in module.named_parameters():
        assert p is parameters[name]
        assert torch.equal(p, values[name])
        assert prepared(module) == {False}
    assert type(module.gate_up_proj) is nn.Parameter
    assert reversing.in_two_copies() == 0
    assert len(reversing.unprepared) == 1
    assert torch.equal(module(*inputs()), out)
    assert prepared(module) == {True}


def test_memory_that_others_know_by_address_is_not_freed(reversing: ModuleType) -> None:
    module, values = experts(), experts().down_proj
    elsewhere, numbers = torch.from_dlpack(module.down_proj), module.down_proj_scale.numpy()
    out = module(*inputs())
    assert prepared(module) == {True}
    for _ in range(2):
        assert torch.equal(elsewhere, values)
        assert torch.equal(torch.from_numpy(numbers), experts().down_proj_scale)
        assert torch.equal(module.down_proj, values)
    elsewhere.zero_()
    assert not module.down_proj.any()
    assert not module(*inputs()).any()
    assert out.any()


@pytest.mark.usefixtures("reference")
def test_the_reference_has_no_layout_of_its_own() -> None:
    module = experts()
    module.prepare()
    module(*inputs())
    assert prepared(module) == {False}


READS: dict[str, Callable[[mx.MXExperts], Any]] = {
    "state_dict": lambda m: m.state_dict()["down_proj"],
    "data": lambda m: m.down_proj.data,
    "detach": lambda m: m.down_proj.detach(),
    "operator": lambda m: m.down_proj + 0,
    "view": lambda m: m.down_proj.view(-1).view(m.down_proj.shape),
    "function": lambda m: torch.cat([m.down_proj]),
    "list": lambda m: torch.stack([m.down_proj])[0],
    "overload": lambda m: torch.ops.aten.clone.default(m.down_proj),
    "keyword": lambda m: torch.clone(input=m.down_proj),
    "numpy": lambda m: torch.from_numpy(m.down_proj.numpy()),
    "dlpack": lambda m: torch.from_dlpack(m.down_proj),
    "storage": lambda m: torch.empty(0, dtype=torch.uint8).set_(m.down_proj.untyped_storage()).view(E, H, -1),
    "index": lambda m: torch.stack([m.down_proj[e] for e in range(E)]),
    "iteration": lambda m: torch.stack(list(m.down_proj)),
    "tolist": lambda m: torch.tensor(m.down_proj.tolist(), dtype=torch.uint8),
    "get_weight": lambda m: m.get_weight("down_proj", m.scheme.weight, INNER).packed.clone(),
    "codes": lambda m: (
        mx.MXTensor.from_codes(
            m.get_weight("down_proj", m.scheme.weight, INNER).codes(), m.down_proj_scale, m.scheme.weight
        ).packed
    ),
    "deepcopy": lambda m: copy.deepcopy(m).down_proj,
    "deepcopy of the parameter": lambda m: copy.deepcopy(m.down_proj),
    "copy of the parameter": lambda m: copy.copy(m.down_proj),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)).down_proj,
    "torch.save": lambda m: saved_and_loaded(m).down_proj,
    "torch.save of parameters": lambda m: saved_and_loaded(dict(m.named_parameters()))["down_proj"],
    "half": lambda m: m.half().down_proj,
    "cpu": lambda m: m.cpu().down_proj,
    "share_memory": lambda m: m.share_memory().down_proj,
}


def saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("read", READS)
def test_whatever_reads_a_parameter_sees_its_values(read: str, reversing: ModuleType) -> None:
    module, values = experts(), experts().down_proj
    out = module(*inputs())
    assert prepared(module) == {True}
    found = READS[read](module)
    assert torch.equal(found, values)
    assert type(found) in (Tensor, nn.Parameter)
    assert prepared(module) == {False}
    assert torch.equal(module(*inputs()), out)
    assert prepared(module) == {True}
    assert torch.equal(found, values)
    assert not reversing.canonical_calls


def test_copies_are_independent(reversing: ModuleType) -> None:
    module = experts()
    out = module(*inputs())
    twin = copy.deepcopy(module)
    assert torch.equal(twin(*inputs()), out)
    module(*inputs())
    module.down_proj.zero_()
    assert torch.equal(twin(*inputs()), out)
    assert not module(*inputs()).any()


WRITES: dict[str, Callable[[mx.MXExperts, mx.MXExperts], Any]] = {
    "load_state_dict": lambda m, new: m.load_state_dict(new.state_dict()),
    "assign": lambda m, new: m.load_state_dict(new.state_dict(), assign=True),
    "one by one": lambda m, new: [m.load_state_dict({n: t}, strict=False) for n, t in new.state_dict().items()],
    "set_weight": lambda m, new: [
        m.set_weight(n, new.get_weight(n, new.scheme.weight, k)) for n, k in (("gate_up_proj", H), ("down_proj", INNER))
    ],
    "copy_": lambda m, new: [p.copy_(new.get_parameter(n)) for n, p in m.named_parameters()],
    "data": lambda m, new: [setattr(p, "data", new.get_parameter(n).data) for n, p in m.named_parameters()],
    "rows": lambda m, new: [p[e].copy_(new.get_parameter(n)[e]) for n, p in m.named_parameters() for e in range(E)],
    "out": lambda m, new: [torch.add(new.get_parameter(n), 0, out=p) for n, p in m.named_parameters()],
    "attributes": lambda m, new: [setattr(m, n, p) for n, p in new.named_parameters()],
    "dictionary": lambda m, new: m._parameters.update(new._parameters),
}


@pytest.mark.parametrize("write", WRITES)
def test_whatever_writes_a_parameter_takes_effect(write: str, reversing: ModuleType) -> None:
    module, new = experts(), experts(2)
    old = dict(module.named_parameters())  # alive, as others may keep them
    before, expected = module(*inputs()), experts(2)(*inputs())
    WRITES[write](module, new)
    assert torch.equal(module(*inputs()), expected)
    assert not torch.equal(before, expected)
    for name, p in module.state_dict().items():
        assert torch.equal(p, experts(2).get_parameter(name))
    if write in ("assign", "set_weight", "attributes", "dictionary"):
        assert all(torch.equal(p, experts().get_parameter(n)) for n, p in old.items())


@pytest.mark.parametrize("name", NAMES)
def test_one_replaced_parameter_is_noticed(name: str, reversing: ModuleType) -> None:
    module, expected = experts(), experts()
    module(*inputs())
    for m in (module, expected):
        setattr(m, name, nn.Parameter(experts(2).get_parameter(name).data, requires_grad=False))
    assert torch.equal(module(*inputs()), expected(*inputs()))


def test_another_backend_is_noticed(reversing: ModuleType) -> None:
    module = experts()
    out = module(*inputs())
    module.backend = "reference"
    assert torch.equal(module(*inputs()), out)
    assert prepared(module) == {False}
    module.backend = "reversing"
    assert torch.equal(module(*inputs()), out)
    assert prepared(module) == {True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hidden_states_of_another_dtype(dtype: torch.dtype, reversing: ModuleType) -> None:
    module = experts()
    module.prepare()
    assert torch.equal(module(*inputs(dtype)), experts()(*inputs(dtype)))
    assert len(reversing.layers) == 2  # one of each module


ERRORS = [MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("can't allocate memory")]


@pytest.mark.parametrize("error", ERRORS, ids=[type(e).__name__ for e in ERRORS])
def test_short_of_memory_a_module_stays_as_it_was(error: BaseException, reversing: ModuleType) -> None:
    module, values = experts(), experts().state_dict()
    addresses = {n: p.data_ptr() for n, p in module.named_parameters()}
    reversing.errors[0] = error
    for attempt in (module.prepare, lambda: module(*inputs())):
        with pytest.raises(mx.BackendUnavailable, match=r"preparing MXExperts for its backend failed.*as they were"):
            attempt()
        assert prepared(module) == {False}
        assert {n: p.data_ptr() for n, p in module.named_parameters()} == addresses
        assert all(torch.equal(p, values[n]) for n, p in module.named_parameters())
    reversing.errors.clear()
    assert torch.equal(module(*inputs()), experts()(*inputs()))


def test_short_of_memory_for_parameters_the_weights_stay_prepared(
    reversing: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, values = experts(), experts().state_dict()
    module.prepare()
    unprepare = reversing.unprepare
    monkeypatch.setattr(reversing, "unprepare", raise_memory_error)
    with pytest.raises(MemoryError):
        module.state_dict()
    monkeypatch.setattr(reversing, "unprepare", unprepare)
    assert prepared(module) == {True}
    assert all(torch.equal(t, values[n]) for n, t in module.state_dict().items())


def raise_memory_error(*args: object) -> None:
    raise MemoryError


def test_inference_mode_leaves_no_trace(reversing: ModuleType) -> None:
    module = experts()
    with torch.inference_mode():
        module(*inputs())
        assert prepared(module) == {True}
        module.state_dict()
        assert prepared(module) == {False}
        module(*inputs())
    module.down_proj.zero_()
    assert not module.down_proj.is_inference()
    assert not module(*inputs()).any()


def test_modules_on_meta(reversing: ModuleType) -> None:
    module = mx.MXExperts(E, H, INNER, scheme="w4a4", device="meta")
    module.prepare()
    assert prepared(module) == {False}


def test_compiled(reversing: ModuleType) -> None:
    """Prepared before or not, and whatever happens to the parameters in between."""
    module = experts()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = experts()(*inputs())
    assert torch.equal(compiled(*inputs()), expected)
    assert prepared(module) == {False}
    assert len(reversing.canonical_calls) == 1
    module.prepare()
    assert torch.equal(compiled(*inputs()), expected)
    assert prepared(module) == {True}
    assert len(reversing.canonical_calls) == 1
    module.load_state_dict(experts(2).state_dict())
    assert torch.equal(compiled(*inputs()), experts(2)(*inputs()))
    module.prepare()
    module.set_weight("down_proj", mx.quantize(torch.zeros(E, H, INNER), "mxfp4"))
    assert not compiled(*inputs()).any()


@pytest.mark.parametrize("make", [experts, lambda scheme: mx.MXLinear(H, H, scheme=scheme)])
def test_a_state_dict_of_another_format_is_refused(make: Callable[..., nn.Module]) -> None:
    state = make(scheme="mxfp6_e2m3").state_dict()
    with pytest.raises(RuntimeError, match="codes of mxfp6_e2m3, but the module's format is mxfp6_e3m2"):
        make(scheme="mxfp6_e3m2").load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"0\.: the state dict holds codes of mxfp6_e2m3"):
        nn.Sequential(make(scheme="mxfp6_e3m2")).load_state_dict(nn.Sequential(make(scheme="mxfp6_e2m3")).state_dict())
    make(scheme="mxfp6_e3m2").load_state_dict(dict(state))  # nothing says what it holds
