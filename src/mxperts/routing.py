"""Routing: which experts a token goes to, and with what weights, from the router's logits.

Every function takes ``router_logits`` [T, E] of any float dtype and returns ``(top_k_weights, top_k_index)``, float32
and int64 [T, k], as ``fused_experts`` takes them; all arithmetic is float32. The order of a token's experts, and the
choice between equal scores, is that of ``torch.topk``. All raise ``ArgumentError`` for arguments that do not fit
together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxperts.errors import ArgumentError
from mxperts.formats.naming import suggest

EPSILON = 1e-20
"""Added to the sum that sigmoid and softplus scores are divided by, as in DeepSeek's code: it may underflow to 0."""


def softmax_topk(router_logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """The largest of the softmax over all experts, divided by their sum if ``renormalize``.

    Qwen-MoE, OLMoE, Mixtral (renormalised); vLLM's ``Default`` and ``RenormalizeNaive``.
    """
    weights, index = torch.softmax(_logits(router_logits, top_k), dim=-1).topk(top_k)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), index


def topk_softmax(router_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The softmax over the largest logits alone. gpt-oss; vLLM's ``Renormalize``."""
    values, index = _logits(router_logits, top_k).topk(top_k)
    return torch.softmax(values, dim=-1), index


def topk(router_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The largest logits themselves. vLLM's ``TopK``."""
    weights, index = _logits(router_logits, top_k).topk(top_k)
    return weights, index


def sigmoid_topk(router_logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """The sigmoid of the largest logits, divided by their sum if ``renormalize``.

    vLLM's ``Sigmoid`` and ``SigmoidRenorm``.
    """
    values, index = _logits(router_logits, top_k).topk(top_k)
    weights = torch.sigmoid(values)
    return (_normalized(weights) if renormalize else weights), index


def llama4(router_logits: Tensor, top_k: int = 1) -> tuple[Tensor, Tensor]:
    """``sigmoid_topk``, for ``apply_router_weight_on_input=True``. Llama 4."""
    return sigmoid_topk(router_logits, top_k)


def grouped_topk(
    router_logits: Tensor,
    top_k: int,
    *,
    num_groups: int,
    top_k_groups: int,
    scoring: str = "sigmoid",
    bias: Tensor | None = None,
    renormalize: bool = True,
    scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The largest scores within the best groups of experts. DeepSeek-V3 and, with softmax and no bias, DeepSeek-V2.

    Args:
        router_logits, top_k: see above.
        num_groups: groups of consecutive experts, equally large.
        top_k_groups: groups that a token may choose from: those with the largest sum of their two best biased scores
            or, without a bias, the largest score.
        scoring: "sigmoid" or "softmax" (over all experts).
        bias: float [E], added to the scores for the choice only (``e_score_correction_bias``).
        renormalize: whether the weights, which are unbiased, are divided by their sum.
        scaling_factor: what they are multiplied by at last (``routed_scaling_factor``).
    """
    logits = _logits(router_logits, top_k)
    experts = logits.shape[1]
    if not 1 <= num_groups <= experts or experts % num_groups:
        raise ArgumentError(f"num_groups must divide the {experts} experts, not be {num_groups}")
    size = experts // num_groups
    if not 1 <= top_k_groups <= num_groups or top_k_groups * size < top_k:
        raise ArgumentError(
            f"top_k_groups must lie in 1..{num_groups} and give top_k = {top_k} experts to choose from, "
            f"{size} a group; it is {top_k_groups}"
        )
    match scoring:
        case "sigmoid":
            scores = torch.sigmoid(logits)
        case "softmax":
            scores = torch.softmax(logits, dim=-1)
        case _:
            raise ArgumentError(f"unknown scoring {scoring!r}; {suggest(str(scoring), ['sigmoid', 'softmax'])}")
    biased = _biased(scores, bias).unflatten(1, (num_groups, size))  # [T, groups, E / groups]
    group_score = biased.amax(-1) if bias is None else biased.topk(min(2, size)).values.sum(-1)
    chosen = torch.zeros_like(group_score, dtype=torch.bool)
    chosen = chosen.scatter(1, group_score.topk(top_k_groups).indices, True)
    candidates = biased.masked_fill(~chosen.unsqueeze(-1), -torch.inf).flatten(1)
    return _weights_of(scores, candidates.topk(top_k).indices, renormalize, scaling_factor)


def minimax2(
    router_logits: Tensor, top_k: int, *, bias: Tensor | None = None, scaling_factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The sigmoids whose biased values are largest, divided by their sum and scaled. MiniMax-M2; vLLM's ``MiniMax2``.

    ``bias`` and ``scaling_factor`` are as in ``grouped_topk``.
    """
    scores = torch.sigmoid(_logits(router_logits, top_k))
    return _weights_of(scores, _biased(scores, bias).topk(top_k).indices, True, scaling_factor)


def deepseek_v4(
    router_logits: Tensor,
    top_k: int,
    *,
    bias: Tensor | None = None,
    top_k_index: Tensor | None = None,
    scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """As ``minimax2`` with scores ``sqrt(softplus(logit))``. DeepSeek-V4.

    Args:
        router_logits, top_k, bias, scaling_factor: as in ``grouped_topk``.
        top_k_index: integer [T, k], experts that are chosen already, by token id: its hash routing.
    """
    scores = torch.nn.functional.softplus(_logits(router_logits, top_k)).sqrt()
    if top_k_index is None:
        top_k_index = _biased(scores, bias).topk(top_k).indices
    elif bias is not None:
        raise ArgumentError("bias decides which experts are chosen, but top_k_index says it already; leave one out")
    elif tuple(top_k_index.shape) != (scores.shape[0], top_k):
        raise ArgumentError(f"top_k_index must have shape {(scores.shape[0], top_k)}, not {tuple(top_k_index.shape)}")
    return _weights_of(scores, top_k_index.to(torch.int64), True, scaling_factor)


def _logits(router_logits: Tensor, top_k: int) -> Tensor:
    """Checked logits as float32."""
    if router_logits.ndim != 2 or not router_logits.is_floating_point():
        raise ArgumentError(
            f"router_logits must be a float tensor [T, E], not {router_logits.dtype} of shape "
            f"{tuple(router_logits.shape)}"
        )
    if not 1 <= top_k <= router_logits.shape[1]:
        raise ArgumentError(f"top_k must lie in 1..{router_logits.shape[1]}, the number of experts, not be {top_k}")
    return router_logits.to(torch.float32)


def _biased(scores: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return scores
    if tuple(bias.shape) != (scores.shape[1],):
        raise ArgumentError(f"bias must have shape {(scores.shape[1],)}, one for each expert, not {tuple(bias.shape)}")
    return scores + bias.to(torch.float32)


def _weights_of(scores: Tensor, index: Tensor, renormalize: bool, scaling_factor: float) -> tuple[Tensor, Tensor]:
    weights = scores.gather(1, index)
    return (_normalized(weights) if renormalize else weights) * scaling_factor, index


def _normalized(weights: Tensor) -> Tensor:
    return weights / (weights.sum(-1, keepdim=True) + EPSILON)
