"""Whole models: prompt processing, generation, memory."""

from mxperts.benchmark.model.choose import MODEL_PEERS, choose_models
from mxperts.benchmark.model.contenders import LoadedModel, ModelContender
from mxperts.benchmark.model.random_weights import ARCHITECTURES, write_random_model
from mxperts.benchmark.model.row import ModelRow
from mxperts.benchmark.model.run import bench_model
from mxperts.benchmark.model.subject import ModelTest, Subject, parse_tests, subject_of

__all__ = [
    "ARCHITECTURES",
    "MODEL_PEERS",
    "LoadedModel",
    "ModelContender",
    "ModelRow",
    "ModelTest",
    "Subject",
    "bench_model",
    "choose_models",
    "parse_tests",
    "subject_of",
    "write_random_model",
]
