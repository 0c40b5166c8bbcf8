"""How good the alphas of a running server are, against masks: the field's measures, by the field's implementation."""

from matteserve_bench.evaluation.masks import load_mask, load_trimap
from matteserve_bench.evaluation.measures import MEASURES, Measure, Scores, score
from matteserve_bench.evaluation.pairs import Pair, Pairing, find_pairs
from matteserve_bench.evaluation.run import Row, evaluate
from matteserve_bench.evaluation.summary import Difference, Summary, bootstrap_difference, summarise

__all__ = [
    "MEASURES",
    "Difference",
    "Measure",
    "Pair",
    "Pairing",
    "Row",
    "Scores",
    "Summary",
    "bootstrap_difference",
    "evaluate",
    "find_pairs",
    "load_mask",
    "load_trimap",
    "score",
    "summarise",
]
