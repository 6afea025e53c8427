"""Files for llama.cpp, read with its own package."""

import pytest
import torch

import mxperts as mx
from mxperts.benchmark.model import subject_of, write_random_model
from mxperts.benchmark.model.gguf_file import why_not, write_gguf
from mxperts.benchmark.model.llama_cpp import llama_cpp
from mxperts.checkpoint import Checkpoint

gguf = pytest.importorskip("gguf")

TINY = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 96}
TINY_OF = {
    "gpt-oss-20b": {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3-30b-a3b": {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module", params=["gpt-oss-20b", "qwen3-30b-a3b"])
def converted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    write_random_model(request.param, folder / "model", layers=1, **TINY, **TINY_OF[request.param])
    write_gguf(folder / "model", folder / "model.gguf")
    reader = gguf.GGUFReader(folder / "model.gguf")
    return request.param, Checkpoint.open(folder / "model"), reader


def values(tensor):
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())


def test_experts_have_the_same_values(converted):
    name, checkpoint, reader = converted
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    prefix = "model.layers.0.mlp.experts"
    if name == "gpt-oss-20b":
        gate_up = mx.dequantize(checkpoint.mx_tensor(f"{prefix}.gate_up_proj"), torch.float32)
        expected = {"gate": gate_up[:, ::2], "up": gate_up[:, 1::2]}
        expected["down"] = mx.dequantize(checkpoint.mx_tensor(f"{prefix}.down_proj"), torch.float32)
    else:
        expected = {
            kind: torch.stack(
                [mx.dequantize(checkpoint.mx_tensor(f"{prefix}.{e}.{kind}_proj"), torch.float32) for e in range(4)]
            )
            for kind in ("gate", "up", "down")
        }
    for kind, weight in expected.items():
        tensor = tensors[f"blk.0.ffn_{kind}_exps.weight"]
        assert tensor.tensor_type is gguf.GGMLQuantizationType.MXFP4
        assert torch.equal(values(tensor), weight)


def test_everything_else_has_the_same_values(converted):
    name, checkpoint, reader = converted
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    sources = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
    sources |= {f"blk.0.attn_{x}": f"model.layers.0.self_attn.{x}_proj" for x in "qkv"}
    sources["blk.0.ffn_gate_inp"] = f"model.layers.0.mlp.{'router' if name == 'gpt-oss-20b' else 'gate'}"
    for target, source in sources.items():
        assert torch.equal(values(tensors[f"{target}.weight"]), checkpoint.tensor(f"{source}.weight").float())
    numbers = sum(checkpoint.info(n).values for n in checkpoint.names if ".experts." not in n)
    assert numbers == sum(int(t.n_elements) for t in reader.tensors if "_exps" not in t.name)


def test_settings(converted):
    name, _, reader = converted
    architecture = "gpt-oss" if name == "gpt-oss-20b" else "qwen3moe"
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == architecture
    assert fields[f"{architecture}.expert_count"] == 4
    assert fields[f"{architecture}.expert_used_count"] == 2
    assert fields[f"{architecture}.expert_feed_forward_length"] == 32
    assert fields[f"{architecture}.attention.key_length"] == 32
    assert fields[f"{architecture}.vocab_size"] == 96


def test_other_models_and_schemes_are_not_converted():
    assert "only qwen3_moe" in why_not({"model_type": "mixtral"}, "w_mxfp4")
    assert "not w_mxfp4_a_mxfp4" in why_not({"model_type": "gpt_oss"}, "w_mxfp4_a_mxfp4")
    assert why_not({"model_type": "gpt_oss"}, "w_mxfp4") == ""


def test_without_its_packages_it_says_what_to_install(converted, monkeypatch):
    monkeypatch.setattr("mxperts.benchmark.model.llama_cpp.package_folder", lambda module: None)
    contender = llama_cpp(subject_of(str(converted[1].path)))
    assert contender.why_not == "not installed: pip install llama-cpp-python gguf"
