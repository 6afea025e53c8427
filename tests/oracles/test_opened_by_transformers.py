"""Stock Transformers, with no mxperts in its process, opens what conversion and quantisation write.

It dequantises experts in gpt-oss's layout and, with compressed-tensors, in that of compressed-tensors.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mxperts as mx
from mxperts.checkpoint import Checkpoint, convert_checkpoint
from mxperts.checkpoint.names import split_expert
from mxperts.quantization import quantize_checkpoint

pytest.importorskip("compressed_tensors")

FIXTURES = Path(__file__).parent.parent / "fixtures" / "checkpoints"
OPEN = """
import json, sys
import torch, transformers
from safetensors.torch import save_file

transformers.utils.logging.set_verbosity_error()
for folder in sys.argv[1:]:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    print(json.dumps({key: sorted(map(str, value)) for key, value in info.items()}))
    found = {name: p.detach().contiguous() for name, p in model.named_parameters() if "experts" in name}
    with torch.no_grad():
        found["logits"] = torch.nn.Module.float(model)(torch.arange(24).view(2, 12) % 32).logits
    save_file(found, folder + "/opened.st")
assert "mxperts" not in sys.modules
"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of every way to these two layouts that stock Transformers follows, opened by one process."""
    work = tmp_path_factory.mktemp("opened")
    gpt_oss = FIXTURES / "bf16-gpt_oss"
    quantize_checkpoint(gpt_oss, work / "gpt_oss-quark", "w_mxfp4")
    convert_checkpoint(work / "gpt_oss-quark", work / "gpt_oss-from-quark", "gpt-oss", max_shard_size="8KB")
    convert_checkpoint(FIXTURES / "gpt_oss-gpt_oss-mxfp4", work / "gpt_oss-ct", "compressed-tensors")
    convert_checkpoint(work / "gpt_oss-ct", work / "gpt_oss-from-ct", "gpt-oss")
    quantize_checkpoint(gpt_oss, work / "gpt_oss-quantized", "w_mxfp4", format="gpt-oss")
    for name in ("qwen3_moe-mxfp4_weight_only", "qwen3_moe-mxfp6_e2m3", "mixtral-mxfp4", "olmoe-mxfp4"):
        convert_checkpoint(FIXTURES / f"quark-{name}", work / name, "compressed-tensors")
    quantize_checkpoint(FIXTURES / "bf16-mixtral", work / "mixtral-quantized", "w_mxfp4", format="compressed-tensors")
    tie(FIXTURES / "quark-qwen3_moe-mxfp4_weight_only", work / "tied-quark")
    convert_checkpoint(work / "tied-quark", work / "tied", "compressed-tensors")
    folders = {p.name: p for p in sorted(work.iterdir()) if p.name not in ("gpt_oss-quark", "gpt_oss-ct", "tied-quark")}
    command = [sys.executable, "-c", OPEN, *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(said) == len(folders)
    for folder, info in zip(folders, said, strict=True):
        assert not any(info.values()), (folder, info)
    return folders


def tie(source: Path, folder: Path) -> None:
    """The checkpoint of a model whose output layer shares the embedding's weight, which has no tensor of its own."""
    tensors = load_file(source / "model.safetensors")
    del tensors["lm_head.weight"]
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    config["quantization_config"]["exclude"].remove("lm_head")
    (folder / "config.json").write_text(json.dumps(config))


CASES = [
    "gpt_oss-from-ct",
    "gpt_oss-from-quark",
    "gpt_oss-quantized",
    "mixtral-mxfp4",
    "mixtral-quantized",
    "olmoe-mxfp4",
    "qwen3_moe-mxfp4_weight_only",
    "qwen3_moe-mxfp6_e2m3",
    "tied",
]
WEIGHT_ONLY = [name for name in CASES if name.startswith("gpt_oss") or name in ("mixtral-quantized", "tied", CASES[-3])]


@pytest.mark.parametrize("name", CASES)
def test_experts_are_decoded_to_the_same_values(opened: dict[str, Path], name: str) -> None:
    assert sorted(opened) == CASES
    found = load_file(opened[name] / "opened.st")
    expected = decoded(Checkpoint.open(opened[name]))
    assert expected.keys() == {key for key in found if not key.endswith("_bias") and key != "logits"}
    for key, weight in expected.items():
        assert torch.equal(found[key], weight), key


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_logits_are_those_of_mxperts(opened: dict[str, Path], name: str) -> None:
    """In float32, where they differ by the order of sums; Transformers does not quantise the inputs of experts."""
    assert {module.scheme.activation for module in Checkpoint.open(opened[name]).mx.values()} == {None}
    found = load_file(opened[name] / "opened.st")["logits"]
    with torch.no_grad():
        expected = mx.load(opened[name], dtype=torch.float32)(torch.arange(24).view(2, 12) % 32).logits
    assert (found - expected).abs().max() <= 16 * torch.finfo(torch.float32).eps * expected.abs().max()


def decoded(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The experts' parameters in a model of Transformers, as mxperts decodes them."""
    parts: dict[str, dict[int, Tensor]] = {}
    for name, t in checkpoint.mx_tensors():
        weight = mx.dequantize(t, torch.bfloat16)
        if (expert := split_expert(name)) is None:
            parts[name] = dict(enumerate(weight.mT))
        else:
            parts.setdefault(f"{expert[0].replace('block_sparse_moe', 'mlp')}.{expert[2]}", {})[expert[1]] = weight
    stacked = {name: torch.stack([experts[e] for e in range(4)]) for name, experts in parts.items()}
    experts = "model.layers.0.mlp.experts."
    for gate, up, down in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")):
        if f"{experts}{gate}" in stacked:
            both = [stacked[f"{experts}{name}"] for name in (gate, up)]
            down_proj = stacked[f"{experts}{down}"]
            return {f"{experts}gate_up_proj": torch.cat(both, dim=1), f"{experts}down_proj": down_proj}
    return stacked
