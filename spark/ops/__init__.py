"""The maths of Spark Transformers: pure functions on arrays, and the oracle for every faster kernel."""
# ruff: noqa: F401

from spark.ops.activations import ACTIVATIONS, softcap
from spark.ops.lookup import dense_lookup, spark_lookup
from spark.ops.rope import rope, rotation
from spark.ops.topk import approx_topk, exact_topk, statistical_keep, statistical_threshold, statistical_topk
