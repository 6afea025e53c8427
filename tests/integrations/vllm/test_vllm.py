"""vLLM itself on CPU, with the plugin as it is installed: offline and served, eager and compiled, with two workers.

Experts are compared by bits, layer by layer. Texts prove nothing: one unit in the last place of an embedding moves the
log-probabilities of a W4A4 model by 0.18 in the mean, in vLLM as in Transformers.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip("vllm.platforms")

import vllm_models as checkpoints
from vllm_engine import NEW_TOKENS, PROMPTS, SETTINGS, Run, by_transformers, distance, in_child, run

from mxperts import models
from mxperts.integrations.vllm import plugin

SCHEMES = (
    *("w_mxfp4", "w_mxfp4_a_mxfp4", "w_mxfp4_a_mxfp6_e2m3", "w_mxfp4_a_mxfp6_e3m2", "w_mxfp4_a_fp8"),
    *("w_mxfp6_e2m3_a_mxfp6_e2m3", "w_mxfp6_e3m2_a_mxfp6_e3m2"),
)
"""What vLLM's emulation runs."""
REFUSED = (
    *("w_mxfp6_e2m3", "w_mxfp6_e3m2", "w_mxfp4_a_fp8_dynamic", "w_mxfp6_e2m3_a_fp8_dynamic", "w_mxfp6_e3m2_a_fp8"),
    *("w_mxfp4_a_mxfp8_e4m3", "w_mxfp6_e2m3_a_mxfp4"),
)
"""What vLLM refuses without the plugin."""
TWO_WORKERS = {
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
}


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("these runs are for vLLM's build for CPUs")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint by the name of its scheme, or of how it is made; each is made once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def source(model):
        path = folder / f"{model}-bf16"
        return path if path.exists() else in_child(checkpoints.random_model, model, path)

    def made(name, model=None, **settings):
        path = folder / "-".join([name, model or "shipped", *settings])
        if not path.exists():
            in_child(checkpoints.quantized, name, path, source=None if model is None else source(model), **settings)
        return path

    return made


def good(ran: Run, scheme: str, *, workers: int = 1) -> Run:
    """Assert that every layer of every worker did what it should."""
    assert len(ran.workers) == workers
    for worker in ran.workers:
        assert worker.wrong == []
        assert worker.calls > 0
        assert worker.schemes == [scheme]
        assert worker.parameter_bytes == 0
        assert worker.deviation <= 2**-7  # a rounding of an input may fall otherwise; bounds are in tests/ops
    return ran


@pytest.mark.parametrize("scheme", [*SCHEMES, *REFUSED])
def test_experts_are_mxperts_bit_by_bit(checkpoint, scheme):
    path = checkpoint(scheme)
    ran = good(in_child(run, path, like=path), scheme)
    assert ran.workers[0].backends == ["cpu"]


@pytest.mark.parametrize("scheme", ["w_mxfp4", "w_mxfp4_a_mxfp4", "w_mxfp6_e2m3_a_fp8_dynamic"])
def test_compiled(checkpoint, scheme):
    path = checkpoint(scheme)
    good(in_child(run, path, like=path, enforce_eager=False), scheme)


@pytest.mark.parametrize("eager", [True, False])
def test_the_reference_runs_where_the_configuration_names_it(checkpoint, eager):
    path = checkpoint("w_mxfp4_a_mxfp4")
    ran = good(in_child(run, path, backend="reference", like=path, enforce_eager=eager), "w_mxfp4_a_mxfp4")
    assert ran.workers[0].backends == ["reference"]
    assert ran.workers[0].deviation == 0.0


@pytest.mark.parametrize("scheme", ["w_mxfp4", "w_mxfp4_a_mxfp4", "w_mxfp4_a_fp8", "w_mxfp6_e2m3"])
def test_as_near_to_transformers_as_its_own_attentions_are_to_each_other(checkpoint, scheme):
    path = checkpoint(scheme)
    ran = in_child(run, path)
    eager, sdpa = (in_child(by_transformers, path, ran.tokens, attention) for attention in ("eager", "sdpa"))
    assert distance(ran.logprobs, eager) <= 2 * distance(sdpa, eager)


@pytest.mark.parametrize("model", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("scheme", ["w_mxfp4_a_mxfp4", "w_mxfp6_e3m2"])
def test_other_models(checkpoint, model, scheme):
    path = checkpoint(scheme, model)
    good(in_child(run, path, like=path), scheme)


@pytest.mark.parametrize("settings", [{}, {"enforce_eager": False}, {"moe_backend": "emulation"}])
def test_gpt_oss_as_it_is_published_is_weight_only(tmp_path, settings):
    path = in_child(checkpoints.gpt_oss_as_published, tmp_path / "gpt_oss")
    good(in_child(run, path, like=path, **settings), "w_mxfp4")


@pytest.mark.parametrize("scheme", ["w_mxfp4", "w_mxfp4_a_mxfp4"])
def test_compressed_tensors_is_what_the_same_bytes_are_in_quarks_layout(checkpoint, tmp_path, scheme):
    twin = checkpoint(scheme)
    path = in_child(checkpoints.quantized, scheme, tmp_path / "compressed")
    checkpoints.as_compressed_tensors(path)
    ran = good(in_child(run, path, like=twin), scheme)
    assert ran.logprobs == in_child(run, twin).logprobs


def test_online_quantisation_gives_the_same_experts_as_ours(checkpoint):
    ran = in_child(run, models.shipped(), like=checkpoint("w_mxfp4_a_mxfp4"), quantization="mxfp4")
    good(ran, "w_mxfp4_a_mxfp4")


@pytest.mark.parametrize("scheme", ["w_mxfp4", "w_mxfp4_a_mxfp4", "w_mxfp6_e3m2_a_mxfp6_e3m2", "w_mxfp4_a_fp8"])
@pytest.mark.parametrize("eager", [True, False])
def test_linear_layers_too(checkpoint, scheme, eager):
    path = checkpoint(scheme, exclude=["lm_head", "*mlp.gate"])
    ran = good(in_child(run, path, like=path, enforce_eager=eager), scheme)
    eager_, sdpa = (in_child(by_transformers, path, ran.tokens, attention) for attention in ("eager", "sdpa"))
    assert distance(ran.logprobs, eager_) <= 2 * distance(sdpa, eager_)


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("eager", [True, False])
def test_two_workers(checkpoint, expert_parallel, eager):
    path = checkpoint("w_mxfp4_a_mxfp4")
    ran = in_child(
        run,
        path,
        env=TWO_WORKERS,
        tensor_parallel_size=2,
        enable_expert_parallel=expert_parallel,
        enforce_eager=eager,
    )
    good(ran, "w_mxfp4_a_mxfp4", workers=2)


def test_served(checkpoint):
    """The server gives the tokens that the same weights give offline."""
    path = checkpoint("w_mxfp4_a_mxfp4")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{(port := s.getsockname()[1])}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--enforce-eager", "--dtype", "bfloat16", "--max-model-len", "64"]
    server = subprocess.Popen(command, env=os.environ | SETTINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    try:
        end = time.monotonic() + 500
        while server.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            time.sleep(1)
        question = {"model": str(path), "prompt": list(PROMPTS), "max_tokens": NEW_TOKENS, "temperature": 0}
        question |= {"ignore_eos": True, "return_token_ids": True}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(question).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=120) as answer:
            choices = json.load(answer)["choices"]
    finally:
        server.terminate()
        server.wait(60)
    assert [choice["token_ids"] for choice in choices] == in_child(run, path).tokens


def test_the_switch_leaves_vllm_as_it_is(checkpoint):
    with pytest.raises(AssertionError, match="kernel requires amd-quark package"):
        in_child(run, checkpoint("w_mxfp4_a_mxfp4"), env={plugin.SWITCH: "0"})


UNKNOWN = """
import multiprocessing
from mxperts.integrations import hooks
from mxperts.integrations.vllm import plugin

plugin.KNOWN = ("0.1",)
for _ in range(2):
    plugin.register()
worker = multiprocessing.get_context("fork").Process(target=plugin.register)
worker.start()
worker.join()
print(worker.exitcode, hooks.active())
"""


def test_an_unknown_version_is_left_as_it_is_with_one_warning():
    """In the process that was started, and none in its workers."""
    result = subprocess.run([sys.executable, "-c", UNKNOWN], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 ()"
    assert result.stderr.count("is none of the versions that the plugin knows") == 1


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({}, "weights of this checkpoint are rotated by 'hadamard32', and vLLM does not rotate inputs: serve it with"),
        ({plugin.SWITCH: "0"}, "Unknown quantization method: mxperts"),
    ],
)
def test_rotated_weights_are_refused_before_they_are_loaded(env, message, tmp_path):
    """By the plugin in words that say what to do, and by vLLM alone."""
    path = tmp_path / "model"
    in_child(checkpoints.quantized, "w_mxfp4_a_mxfp4", path, rotation="hadamard32")
    with pytest.raises(AssertionError, match=message):
        in_child(run, path, env=env)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "gpu"}, r"mxperts .* in vllm.*preparing the experts of .*backend 'gpu' cannot run"),
        ({"additional_config": {"mxperts": {"backed": "cpu"}}}, r"must be a dict with backend; found 'backed'"),
        ({"moe_backend": "marlin"}, r"moe_backend='marlin' cannot run w_mxfp6_e2m3: expected auto or emulation"),
    ],
)
def test_errors_say_what_to_do(checkpoint, settings, message):
    with pytest.raises(AssertionError, match=message):
        in_child(run, checkpoint("w_mxfp6_e2m3"), **settings)
