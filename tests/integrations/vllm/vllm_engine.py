"""vLLM with the plugin, in a child process for each model; what its experts were called with; and the same model by
``mx.load``.

A child is forked after vLLM is imported, which takes ten seconds; the parent runs no kernel, whose threads a fork would
not take along.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
PROMPTS = ([5, 9, 17, 30, 2, 11, 28], [3, 30, 31, 22, 23, 17, 9, 5, 4, 13, 21, 7])
NEW_TOKENS = 6


def in_child(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function returns in a process of its own; its error, as text, is raised here."""
    import vllm.entrypoints.llm
    import vllm.v1.engine.llm_engine  # noqa: F401

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, function, args, kwargs))
    child.start()
    sender.close()
    try:
        ok, value = receiver.recv()
    except EOFError:
        ok, value = False, "the child died"
    child.join()
    if not ok:
        raise AssertionError(value)
    return value


def _child(sender: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    os.environ.update(SETTINGS)
    try:
        answer = (True, function(*args, **kwargs))
    except BaseException:
        answer = (False, traceback.format_exc())
    sender.send(answer)
    sender.close()
    os._exit(0)  # without vLLM's long farewell


@dataclass
class Run:
    """What a run of vLLM gave.

    Attributes:
        tokens, logprobs: of each prompt: the new tokens, and the log-probabilities of all tokens at each of them.
        schemes: of the experts.
        calls, wrong: how many calls of layers were compared, and what was different.
        deviation: the largest relative deviation of a layer from the reference, by the largest number in it.
        packed_bytes, parameter_bytes: of all experts' prepared weights; of what the layers' parameters still hold.
    """

    tokens: list[list[int]]
    logprobs: list[Any]
    schemes: set[str]
    calls: int
    wrong: list[str]
    deviation: float
    packed_bytes: int
    parameter_bytes: int


def run(path: Path, *, backend: str | None = None, compare: bool = True, **settings: Any) -> Run:
    """Generate with vLLM, and compare every call of its experts with ``mx.fused_experts`` on the checkpoint's weights.

    Args:
        path: a checkpoint.
        backend: what ``additional_config`` names.
        compare: whether the weights are to be those that ``mx.load`` gives.
        settings: of ``vllm.LLM``.
    """
    import torch
    from vllm import LLM, SamplingParams

    from mxperts.ops import experts as ops

    recorded: list[tuple[Any, torch.Tensor]] = []
    execute = ops._execute

    def recording(call: Any, out: torch.Tensor, name: str) -> None:
        execute(call, out, name)
        recorded.append((call, out.clone(), call.hidden_states.clone(), call.top_k_index.clone(), call.top_k_weights.clone()))

    ops._execute = recording
    if backend is not None:
        settings["additional_config"] = {"mxperts": {"backend": backend}}
    settings = {"enforce_eager": True, "dtype": "bfloat16", "max_model_len": 64, "max_num_seqs": 4} | settings
    vocabulary = _vocabulary(path)
    llm = LLM(
        model=str(path),
        seed=0,
        max_logprobs=vocabulary,
        skip_tokenizer_init=True,
        distributed_executor_backend="uni",
        **settings,
    )
    layers = llm.apply_model(experts_of)[0]
    recorded.clear()  # vLLM's own trial runs
    answers = llm.generate(
        [{"prompt_token_ids": p} for p in PROMPTS],
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=vocabulary, detokenize=False),
        use_tqdm=False,
    )
    ops._execute = execute
    weights = {key: experts.prepared.unprepare() for key, experts in layers.items()}
    wrong = compare_weights(path, list(weights.values())) if compare else []
    deviation = 0.0
    by_tensor = {id(e.prepared.weights[0]): key for key, e in layers.items()}
    for call, out, *inputs in recorded:
        key = next(k for k, e in layers.items() if e.prepared.weights[0].data_ptr() == call.weights[0].data_ptr())
        again = by_hand(call, inputs, weights[key], layers[key].prepared.backend)
        if not torch.equal(again.view(torch.int16), out.view(torch.int16)):
            wrong.append(f"{key}: {(again != out).sum()} of {out.numel()} differ from mx.fused_experts")
        reference = by_hand(call, inputs, weights[key], "reference")
        deviation = max(deviation, float((reference.double() - out.double()).abs().max() / reference.abs().max()))
    parameters = [p for n in ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale") for m in llm.apply_model(modules_of)[0] for p in [getattr(m, n)]]
    return Run(
        tokens=[list(a.outputs[0].token_ids) for a in answers],
        logprobs=[[[row[i].logprob for i in range(vocabulary)] for row in a.outputs[0].logprobs] for a in answers],
        schemes={e.scheme.name for e in layers.values()},
        calls=len(recorded),
        wrong=wrong,
        deviation=deviation,
        packed_bytes=sum(e.prepared.nbytes for e in layers.values()),
        parameter_bytes=sum(0 if p.is_meta else p.nbytes for p in parameters),
    )


def by_hand(call: Any, inputs: Any, weights: Any, backend: str) -> Any:
    """A recorded call, made through the public function."""
    import mxperts as mx

    function = call.activation
    return mx.fused_experts(
        inputs[0],
        *weights,
        inputs[1],
        inputs[2],
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


def modules_of(model: Any) -> list[Any]:
    """vLLM's expert layers that mxperts runs."""
    from mxperts.integrations.vllm.experts import MXExperts

    found = []
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None and isinstance(kernel.fused_experts, MXExperts):
            found.append(module)
    return found


def experts_of(model: Any) -> dict[str, Any]:
    """Our experts by the name of their layer."""
    return {m.layer_name: m.quant_method.moe_kernel.fused_experts for m in modules_of(model)}


def compare_weights(path: Path, weights: list[Any]) -> list[str]:
    """What is different between vLLM's weights and the checkpoint's as ``mx.load`` reads them, layer by layer."""
    import torch

    import mxperts as mx
    from mxperts.integrations.transformers.experts import mx_experts, mx_weight

    model = mx.load(path, backend="reference")
    expected = [(mx_weight(m, m.mxperts.up), mx_weight(m, m.mxperts.down)) for _, m in mx_experts(model)]
    if len(expected) != len(weights):
        return [f"{len(weights)} layers, and mx.load finds {len(expected)}"]
    wrong = []
    for i, (ours, theirs) in enumerate(zip(weights, expected, strict=True)):
        for name, a, b in zip(("gate_up_proj", "down_proj"), ours, theirs, strict=True):
            if not (torch.equal(a.packed, b.packed) and torch.equal(a.scales, b.scales)):
                wrong.append(f"layer {i}: {name} is not the checkpoint's")
    return wrong


def logprobs_by_transformers(path: Path, tokens: list[list[int]], attention: str, backend: str = "auto") -> list[Any]:
    """The log-probabilities that the same checkpoint has in Transformers, for the tokens that vLLM chose."""
    import torch

    import mxperts as mx

    model = mx.load(path, backend=backend, dtype=torch.bfloat16, attn_implementation=attention)
    found = []
    for prompt, new in zip(PROMPTS, tokens, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + new[:-1]])).logits[0, len(prompt) - 1 :]
        found.append(logits.float().log_softmax(-1).tolist())
    return found


def _vocabulary(path: Path) -> int:
    import json

    return int(json.loads((path / "config.json").read_text())["vocab_size"])
