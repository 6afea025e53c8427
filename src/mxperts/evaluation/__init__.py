"""How good a quantised model is: perplexity, divergence from its base, errors by layer, router agreement, size."""

from mxperts.evaluation.base_file import BaseFile
from mxperts.evaluation.baseline import Baseline
from mxperts.evaluation.compare import compare
from mxperts.evaluation.divergence import Divergence
from mxperts.evaluation.environment import environment
from mxperts.evaluation.evaluate import Evaluation, evaluate, evaluate_base
from mxperts.evaluation.identity import model_digest
from mxperts.evaluation.layers import LayerErrors, layer_errors
from mxperts.evaluation.page import write_report
from mxperts.evaluation.plot import plot
from mxperts.evaluation.report import Report
from mxperts.evaluation.size import Size
from mxperts.evaluation.statistics import Estimate
from mxperts.evaluation.tasks import TaskEvaluation, TaskReport, compare_on_tasks
from mxperts.evaluation.windows import Windows

__all__ = [
    "BaseFile",
    "Baseline",
    "Divergence",
    "Estimate",
    "Evaluation",
    "LayerErrors",
    "Report",
    "Size",
    "TaskEvaluation",
    "TaskReport",
    "Windows",
    "compare",
    "compare_on_tasks",
    "environment",
    "evaluate",
    "evaluate_base",
    "layer_errors",
    "model_digest",
    "plot",
    "write_report",
]
