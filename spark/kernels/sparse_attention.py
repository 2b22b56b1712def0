"""Spark attention for training on CPUs, in linear memory: forward and backward compute surviving keys only, but for the scores.

It computes what `blockwise.attention` does, by C++ kernels (cpu/attention_training.h). Backward scores the keys again, and has
saved what picks the survivors and makes their softmax: the threshold and log Z of each query. No remat policy saves these by a
name: a threshold may be a score itself, and must come from the same pass as the queries and keys.
"""

import functools

import jax
import numpy as np

from spark.kernels import cpu
from spark.kernels.blockwise import Keys, Outputs, PerQuery, Queries, Spec, Starts, Values


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(q: Queries, k: Keys, v: Values, starts_BxL: Starts, spec: Spec) -> tuple[Outputs, PerQuery]:
    """Spark attention of each query to the keys start_i … i of its row, in float32: y, and how many keys were attended.

    Where scores are not finite, y is not finite either.
    """
    return _forward(q, k, v, starts_BxL, spec)[0]


def _forward(q, k, v, starts, spec):
    shapes = cpu.floats(q.shape, *[q.shape[:-1]] * 3)
    call = cpu.call('spark_attention_forward', shapes, r=np.int64(spec.r), keep=np.int64(spec.k), cap=np.float32(spec.logit_cap))
    y, theta, log_z, attended = call(starts, q, k, v, cpu.quantiles(spec.k, k.shape[2]))
    return (y, attended), (starts, q, k, v, theta, log_z, y)


def _backward(spec, saved, gradients):
    shapes = cpu.floats(*(x.shape for x in saved[1:4]))
    call = cpu.call('spark_attention_backward', shapes, r=np.int64(spec.r), cap=np.float32(spec.logit_cap))
    return *call(*saved, gradients[0]), None


attention.defvjp(_forward, _backward)
