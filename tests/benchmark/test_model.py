import pytest
import torch

import mxperts as mx
from mxperts import models
from mxperts.benchmark import Status, emulation
from mxperts.benchmark.model import (
    MODEL_PEERS,
    LoadedModel,
    ModelContender,
    bench_model,
    choose_models,
    parse_tests,
    subject_of,
    write_random_model,
)
from mxperts.benchmark.model.row import model_table
from mxperts.benchmark.model.run import logits_error
from mxperts.checkpoint import Checkpoint
from mxperts.errors import ArgumentError, BackendUnavailable, MxpertsError
from mxperts.integrations.transformers import mx_experts

TINY = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 96}
TINY_OF = {
    "gpt-oss-20b": {**TINY, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3-30b-a3b": {**TINY, "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 4}
    | {"num_experts_per_tok": 2},
}


def random_model(folder, name="qwen3-30b-a3b", scheme="w_mxfp4", layers=2):
    write_random_model(name, folder, layers=layers, scheme=scheme, **TINY_OF[name])
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("random") / "tiny")


class Scripted(LoadedModel):
    """Gives the same logits always, and takes no time."""

    def __init__(self, scale=1.0):
        self.scale, self.decoded = scale, []

    def logits(self, tokens):
        return torch.ones(len(tokens), 8) * self.scale

    def prefill(self, tokens):
        pass

    def decode(self, tokens, until):
        self.decoded.append(len(tokens))
        return len(tokens)


def scripted(name, scale=1.0, **more):
    return ModelContender(name=name, load=lambda: Scripted(scale), **more)


@pytest.mark.parametrize(
    ("name", "scheme"), [("gpt-oss-20b", "w_mxfp4"), ("qwen3-30b-a3b", "w4a8"), ("qwen3-30b-a3b", "w6a6")]
)
def test_random_models_are_checkpoints_that_load_packed(name, scheme, tmp_path):
    model = mx.load(random_model(tmp_path / "model", name, scheme), backend="reference")
    logits = model(torch.arange(5).unsqueeze(0)).logits
    assert logits.shape == (1, 5, 96)
    assert bool(logits.isfinite().all())
    assert model.config.num_hidden_layers == 2


def test_random_models_may_be_unquantised(tmp_path):
    model = mx.load(random_model(tmp_path / "model", "qwen3-30b-a3b", None), backend="reference")
    assert not list(mx_experts(model))
    assert bool(model(torch.arange(5).unsqueeze(0)).logits.isfinite().all())


def test_random_models_have_the_real_sizes_and_a_share_of_the_vocabulary(monkeypatch):
    from mxperts.benchmark.model import ARCHITECTURES
    from mxperts.benchmark.model.random_weights import _config

    config = _config(ARCHITECTURES["qwen3-30b-a3b"], 4, {})
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (128, 8, 768)
    assert config.vocab_size == 12672  # 151936 * 4 / 48, up to a multiple of 64
    assert (_config(ARCHITECTURES["gpt-oss-20b"], 24, {}).vocab_size, 201088 % 64) == (201088, 0)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("qwen4", {}, "unknown model"),
        ("gpt-oss-20b", {"scheme": "w4a4"}, "stored as w_mxfp4"),
        ("gpt-oss-20b", {"scheme": None}, "stored as w_mxfp4"),
        ("qwen3-30b-a3b", {"scheme": "none"}, "stored as w_mxfp4"),
        ("qwen3-30b-a3b", {"scheme": "w_mxfp4_a_fp8"}, "calibrated"),
        ("qwen3-30b-a3b", {"layers": 0}, "at least one layer"),
    ],
)
def test_random_models_that_cannot_be_are_refused(name, more, message, tmp_path):
    with pytest.raises(ArgumentError, match=message):
        write_random_model(name, tmp_path / "model", **{"layers": 1, **more})
    assert not list(tmp_path.iterdir())


def test_a_model_in_a_benchmark(tiny):
    subject = subject_of(str(tiny))
    tests = parse_tests(subject, "6,4", "3")
    assert (subject.name, subject.scheme, subject.vocabulary) == ("tiny", "w_mxfp4", 96)
    checkpoint = Checkpoint.open(tiny)
    assert subject.bytes == sum(checkpoint.info(name).nbytes for name in checkpoint.names)
    with emulation.registered():
        contenders = choose_models(subject, [emulation.NAME, "reference"], ["installed"])
        rows = bench_model(subject, contenders, tests, repetitions=1, time_budget=0.5)
    peers = list(MODEL_PEERS)
    assert [(r.contender, r.test) for r in rows] == [
        (name, test) for name in ("dequantise-first", "mxperts reference", *peers) for test in ("pp6", "pp4", "tg3")
    ]
    timed = {r.contender: r for r in rows if r.test == "tg3"}
    assert timed["dequantise-first"].error is None
    assert timed["dequantise-first"].speedup == 1.0
    assert 0 < timed["mxperts reference"].error < 0.1
    assert timed["mxperts reference"].mean > 0
    assert timed["mxperts reference"].tokens == 3
    assert timed["bf16"].status is Status.SKIPPED
    assert "no unquantised experts" in timed["bf16"].note


def test_unquantised_models_are_quantised_while_they_load_and_run_as_they_are_too():
    subject = subject_of(str(models.shipped()), "w4a4")
    tests = parse_tests(subject, "4", "0")
    contenders = choose_models(subject, ["reference"], ["bf16"])
    rows = bench_model(subject, contenders, tests, repetitions=1, time_budget=0)
    assert [(r.contender, r.scheme, r.status.value) for r in rows] == [
        ("mxperts reference", "w_mxfp4_a_mxfp4", "ok"),
        ("bf16", "w_mxfp4_a_mxfp4", "ok"),
    ]
    assert rows[1].error > 0.01


@pytest.fixture
def subject(tiny):
    return subject_of(str(tiny))


def test_a_wrong_model_is_refused(subject):
    rows = bench_model(
        subject,
        [scripted("first"), scripted("wrong", 1.5), scripted("other", 1.5, error_limit=None)],
        parse_tests(subject, "4", "2"),
        repetitions=2,
        time_budget=5,
    )
    assert [r.status for r in rows] == [Status.OK] * 2 + [Status.WRONG] * 2 + [Status.OK] * 2
    assert rows[2].error == rows[4].error == pytest.approx(0.5)
    assert "exceeds 0.1" in rows[2].note
    header, cells, note = model_table(rows)
    assert all(len(row) == len(header) for row in cells)
    assert cells[2][header.index("tokens/s")] == "wrong"
    assert "wrong: wrong: relative error of logits" in note


def test_generation_that_runs_out_of_time_says_how_far_it_came(subject):
    class Slow(Scripted):
        def decode(self, tokens, until):
            return min(2, len(tokens))

    slow = ModelContender(name="slow", load=Slow)
    (row,) = bench_model(subject, [slow], parse_tests(subject, "0", "9"), repetitions=1, time_budget=5)
    assert (row.test, row.tokens) == ("tg9", 2)
    assert "slow, tg9: stopped after 2 tokens" in model_table([row])[2]


def test_records_have_the_same_keys(subject):
    contenders = [scripted("first"), scripted("absent", why_not="not installed")]
    records = [r.record() for r in bench_model(subject, contenders, parse_tests(subject, "4", "2"), repetitions=1)]
    assert len({tuple(record) for record in records}) == 1
    assert records[0]["benchmark"] == "model"
    assert records[2]["status"] == "skipped"
    assert records[2]["mean"] is None


def test_errors_of_logits_are_those_of_most_tokens():
    expected = torch.ones(3, 4)
    found = torch.stack([expected[0], expected[1] * 1.1, expected[2] * 9])
    assert logits_error(found, expected) == pytest.approx(0.1)
    assert logits_error(expected * torch.nan, expected) == float("inf")


def test_lengths_make_tests(subject):
    assert [str(test) for test in parse_tests(subject, "512, 64", "128")] == ["pp512", "pp64", "tg128"]
    assert [str(test) for test in parse_tests(subject, "0", "8")] == ["tg8"]
    assert [str(test) for test in parse_tests(subject)] == ["pp512", "tg128"]
    shipped = subject_of(str(models.shipped()))
    assert [str(test) for test in parse_tests(shipped)] == [f"pp{shipped.context}", "tg128"]
    with pytest.raises(ArgumentError, match="no number of tokens"):
        parse_tests(subject, "many", "8")
    with pytest.raises(ArgumentError, match="nothing to time"):
        parse_tests(subject, "0", "")


def test_subjects_are_checked(tiny):
    with pytest.raises(ArgumentError, match="quantised already"):
        subject_of(str(tiny), "w4a4")
    with pytest.raises(ArgumentError, match="exceed"):
        parse_tests(subject_of(str(models.shipped())), "999999", "0")


def test_the_baseline_is_a_backend_only_while_it_is_registered(subject):
    with emulation.registered() as name:
        assert mx.explain(backend=name).backend.name == name
        assert mx.explain().backend.name != name
    with pytest.raises(MxpertsError, match="unknown backend"):
        mx.explain(backend=name)


def test_peers_and_backends_of_models_are_checked(subject):
    with pytest.raises(ArgumentError, match="unknown peer"):
        choose_models(subject, ["reference"], ["bf61"])
    with pytest.raises(MxpertsError, match="no unquantised experts"):
        choose_models(subject, ["reference"], ["bf16"])
    with pytest.raises(BackendUnavailable):
        choose_models(subject, ["gpu"], [])
