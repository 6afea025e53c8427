"""One of the processes of ``test_expert_parallel``: loads every case with its experts spread, and keeps the logits."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

import mxperts as mx
from mxperts.distributed import traffic
from mxperts.integrations.transformers import mx_experts

FIXTURES = Path(__file__).parents[1] / "fixtures" / "checkpoints"


def tokens(batch: int = 2, vocabulary: int = 32) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, 11), generator=torch.Generator().manual_seed(batch))


def logits_of(model: Any, batch: int = 2) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(tokens(batch)).logits
    return logits


def one_case(name: str, scheme: str | None, config: transformers.DistributedConfig) -> dict[str, Any]:
    traffic.reset()
    model = mx.load(FIXTURES / name, distributed_config=config, **({"scheme": scheme} if scheme else {}))
    found: dict[str, Any] = {"logits": logits_of(model), "one token": logits_of(model, 1)[:, :1]}
    found["traffic"] = traffic.record()
    found["experts"] = [module.num_experts for _, module in mx_experts(model)]
    found["bytes"] = sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n)
    return found


def main(out: Path, cases: list[tuple[str, str | None]]) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    n = int(os.environ["WORLD_SIZE"])
    experts_only = transformers.DistributedConfig(tp_size=n, ep_size=n, tp_plan={})
    results: dict[Any, Any] = {case: one_case(*case, experts_only) for case in cases}
    batches = transformers.DistributedConfig(fsdp_size=n, ep_size=n)
    results["rotated"] = logits_of(mx.load(out.parent / "rotated", distributed_config=experts_only))
    results["fsdp"] = one_case("quark-qwen3_moe-mxfp4", None, batches)

    mx.install()
    named = transformers.DistributedConfig(fsdp_size=n, ep_size=n, ep_implementation="mxperts")
    folder = FIXTURES / "quark-qwen3_moe-mxfp4"
    results["install"] = logits_of(transformers.AutoModelForCausalLM.from_pretrained(folder, distributed_config=named))

    model = mx.load(folder, distributed_config=experts_only)
    results["with gradients"] = model(tokens()).logits.detach()
    try:
        model(tokens()).logits.sum().backward()
    except RuntimeError as error:
        results["backward"] = str(error)
    generated = model.generate(tokens(), max_new_tokens=5, do_sample=False)
    results["generate"] = generated
    try:
        model.save_pretrained(out.parent / "saved")
    except mx.ArgumentError as error:
        results["save"] = str(error)
    if dist.get_rank() == 0:
        torch.save(results, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [tuple(case) for case in json.loads(sys.argv[2])])
