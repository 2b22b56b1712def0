"""The maths of Spark Transformers: pure functions on arrays, and the oracle for every faster kernel."""

from spark.ops.activations import ACTIVATIONS, softcap
from spark.ops.lookup import added_lookup, dense_lookup, spark_lookup
from spark.ops.rope import rope, rotation
from spark.ops.topk import (
    approx_topk,
    exact_topk,
    in_groups,
    statistical_keep,
    statistical_threshold,
    statistical_topk,
)

__all__ = [
    'ACTIVATIONS', 'added_lookup', 'approx_topk', 'dense_lookup', 'exact_topk', 'in_groups', 'rope', 'rotation', 'softcap',
    'spark_lookup', 'statistical_keep', 'statistical_threshold', 'statistical_topk',
]  # fmt: skip
