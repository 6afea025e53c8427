"""vLLM with the plugin, in a process of its own for each model, and what it did there beside what it should have done.

Processes are forked after vLLM is imported, which takes ten seconds. In the parent no kernel may run, since a fork does
not take its threads along.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions of this file are sent to vLLM's workers
}
PROMPTS = ([5, 9, 17, 30, 2, 11, 28], [3, 30, 31, 22, 23, 17, 9, 5, 4, 13, 21, 7])
NEW_TOKENS = 6


def in_child(function: Callable[..., Any], *args: Any, env: dict[str, str] | None = None, **kwargs: Any) -> Any:
    """What a function returns in a process of its own, with these environment variables; its error is raised here."""
    os.environ.update(SETTINGS)
    import vllm.entrypoints.llm
    import vllm.v1.engine.llm_engine  # noqa: F401

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, env or {}, function, args, kwargs))
    child.start()
    sender.close()
    try:
        ok, value = receiver.recv()
    except EOFError:
        ok, value = False, "the child died"
    child.join()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # vLLM's own processes, if it has not ended them
    if not ok:
        raise AssertionError(value)
    return value


def _child(sender: Any, env: dict[str, str], function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    os.setsid()
    os.environ.update(env)
    try:
        answer = (True, function(*args, **kwargs))
    except BaseException:
        answer = (False, traceback.format_exc())
    sender.send(answer)
    sender.close()
    os._exit(0)  # without vLLM's long farewell


@dataclass
class Checked:
    """What one worker's experts did.

    Attributes:
        schemes, backends: of all layers.
        calls: how many calls of layers were compared.
        wrong: what was not as it should be.
        deviation: of all calls from the reference's results, relative to the largest number of a call.
        packed_bytes, parameter_bytes: of the prepared weights; of what the layers' own parameters still hold.
        signatures: how layers were called, once each; see ``signature``.
    """

    schemes: list[str] = field(default_factory=list)
    backends: list[str] = field(default_factory=list)
    calls: int = 0
    wrong: list[str] = field(default_factory=list)
    deviation: float = 0.0
    packed_bytes: int = 0
    parameter_bytes: int = 0
    signatures: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Run:
    """What a run of vLLM gave.

    Attributes:
        tokens, logprobs: of each prompt: the new tokens; the log-probabilities of all tokens at each of them.
        workers: what was checked in each worker.
    """

    tokens: list[list[int]]
    logprobs: list[list[list[float]]]
    workers: list[Checked]


def run(path: Path, *, backend: str | None = None, like: Path | None = None, **settings: Any) -> Run:
    """Generate with vLLM; compare every call of its experts, bit for bit, with the public ``mx.fused_experts``.

    Args:
        path: a checkpoint.
        backend: what ``additional_config`` names.
        like: a checkpoint whose experts, as ``mx.load`` reads them, vLLM's must have, bit for bit.
        settings: of ``vllm.LLM``.
    """
    from vllm import LLM, SamplingParams

    vocabulary = int(json.loads((path / "config.json").read_text())["vocab_size"])
    if backend is not None:
        settings["additional_config"] = {"mxperts": {"backend": backend}}
    if "tensor_parallel_size" not in settings:
        settings["distributed_executor_backend"] = "uni"
    llm = LLM(
        model=str(path),
        skip_tokenizer_init=True,
        max_logprobs=vocabulary,
        **{"enforce_eager": True, "dtype": "bfloat16", "max_model_len": 64, "max_num_seqs": 4, "seed": 0} | settings,
    )
    llm.apply_model(start_recording)
    answers = llm.generate(
        [{"prompt_token_ids": p} for p in PROMPTS],
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=vocabulary, detokenize=False),
        use_tqdm=False,
    )
    found = llm.apply_model(functools.partial(check, like=like))
    llm.llm_engine.engine_core.shutdown()
    return Run(
        tokens=[list(a.outputs[0].token_ids) for a in answers],
        logprobs=[[[row[i].logprob for i in range(vocabulary)] for row in a.outputs[0].logprobs] for a in answers],
        workers=[Checked(**worker) for worker in found],
    )


_recorded: list[tuple[Any, Any, list[Any]]] = []
"""Calls of layers: the call, its result, and copies of hidden states, ids and router weights."""


def start_recording(model: Any) -> None:
    """In a worker: keep what is computed from here on, behind the operator, where compiled code comes along too."""
    from mxperts.ops import experts

    execute = experts._execute

    def recording(call: Any, out: Any, backend: str) -> None:
        given = [t.clone() for t in (call.hidden_states, call.top_k_index, call.top_k_weights)]
        execute(call, out, backend)
        _recorded.append((call, out.clone(), given))

    experts._execute = recording


def check(model: Any, like: Path | None) -> dict[str, Any]:
    """In a worker: compare what was recorded, and the weights; what ``Checked`` takes, as vLLM can send it."""
    import torch

    layers = expert_layers(model)
    ours = {name: layer.quant_method.moe_kernel.fused_experts for name, layer in layers.items()}
    weights = {name: experts.prepared.unprepare() for name, experts in ours.items()}
    recorded, found = list(_recorded), Checked(calls=len(_recorded))
    found.schemes = sorted({experts.scheme.name for experts in ours.values()})
    found.backends = sorted({experts.prepared.backend for experts in ours.values()})
    found.packed_bytes = sum(experts.prepared.nbytes for experts in ours.values())
    for layer in layers.values():
        for parameter in ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"):
            tensor = getattr(layer, parameter)
            found.parameter_bytes += 0 if tensor.is_meta else tensor.nbytes
    if like is not None:
        found.wrong += different_weights(like, list(weights.values()))
    for call, out, given in recorded:
        if (described := signature(call, given)) not in found.signatures:
            found.signatures.append(described)
        at = call.weights[0].data_ptr()
        name = next(n for n, e in ours.items() if e.prepared.weights[0].data_ptr() == at)
        again = by_hand(call, given, weights[name], ours[name].prepared.backend)
        if not torch.equal(again.view(torch.int16), out.view(torch.int16)):
            found.wrong.append(f"{name}: {int((again != out).sum())} of {out.numel()} are not mx.fused_experts'")
        reference = by_hand(call, given, weights[name], "reference").double()
        deviation = (reference - out).abs().max() / reference.abs().max().clamp(min=1e-30)
        found.deviation = max(found.deviation, float(deviation))
    return asdict(found)


def expert_layers(model: Any) -> dict[str, Any]:
    """vLLM's layers that our experts run, by name."""
    from mxperts.integrations.vllm.experts import MXExperts

    def runs_ours(module: Any) -> bool:
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        return kernel is not None and isinstance(kernel.fused_experts, MXExperts)

    return {name: module for name, module in model.named_modules() if runs_ours(module)}


def signature(call: Any, given: list[Any]) -> dict[str, Any]:
    """All that tells calls of layers apart but for the numbers, as JSON has it."""

    def describe(tensor: Any) -> list[Any] | None:
        return None if tensor is None else [str(tensor.dtype).removeprefix("torch."), *tensor.shape]

    return {
        "layout": call.layout.encode(),
        "activation": call.activation.encode(),
        "activation_format": None if call.activation_format is None else str(call.activation_format),
        "hidden_states": describe(given[0]),
        "top_k_index": describe(given[1]),
        "top_k_weights": describe(given[2]),
        "gate_up_bias": describe(call.gate_up_bias),
        "down_bias": describe(call.down_bias),
        "input_scales": None if call.input_scales is None else [describe(s) for s in call.input_scales],
        "expert_map": None if call.expert_map is None else call.expert_map.tolist(),
        "router_weight_on_input": call.router_weight_on_input,
    }


def by_hand(call: Any, given: list[Any], weights: Any, backend: str) -> Any:
    """A recorded call, made through the public function."""
    import mxperts as mx

    function = call.activation
    return mx.fused_experts(
        given[0],
        *weights,
        *given[1:],
        activation=function.name,
        activation_format=call.activation_format,
        gate_up_bias=call.gate_up_bias,
        down_bias=call.down_bias,
        interleaved=call.layout.interleaved,
        swiglu_limit=function.limit,
        swiglu_alpha=function.alpha,
        swiglu_beta=function.beta,
        swiglu_linear_beta=function.linear_beta,
        input_scales=call.input_scales,
        expert_map=call.expert_map,
        backend=backend,
    )


def different_weights(path: Path, weights: list[Any]) -> list[str]:
    """What is different between weights and those of a checkpoint, layer by layer."""
    import torch

    import mxperts as mx
    from mxperts.integrations.transformers.experts import mx_experts, mx_weight

    model = mx.load(path, backend="reference")
    expected = [(mx_weight(m, m.mxperts.up), mx_weight(m, m.mxperts.down)) for _, m in mx_experts(model)]
    if len(expected) != len(weights):
        return [f"{len(weights)} layers, and mx.load finds {len(expected)}"]
    return [
        f"layer {i}: {name} is not the checkpoint's"
        for i, pair in enumerate(zip(weights, expected, strict=True))
        for name, a, b in zip(("gate_up_proj", "down_proj"), *pair, strict=True)
        if not (torch.equal(a.packed, b.packed) and torch.equal(a.scales, b.scales))
    ]


def by_transformers(path: Path, tokens: list[list[int]], attention: str) -> list[list[list[float]]]:
    """The log-probabilities of the same checkpoint in Transformers, after the tokens that vLLM chose."""
    import torch

    import mxperts as mx

    model: Any = mx.load(path, dtype=torch.bfloat16, attn_implementation=attention)
    found = []
    for prompt, new in zip(PROMPTS, tokens, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + new[:-1]])).logits[0, len(prompt) - 1 :]
        found.append(logits.float().log_softmax(-1).tolist())
    return found


def distance(a: list[list[list[float]]], b: list[list[list[float]]]) -> float:
    """The mean distance of log-probabilities."""
    import torch

    return float(
        torch.cat([(torch.tensor(x) - torch.tensor(y)).abs().flatten() for x, y in zip(a, b, strict=True)]).mean()
    )
