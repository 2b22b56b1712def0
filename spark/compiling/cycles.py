"""The TPU compiler's own estimate of what a Spark FFN costs; no TPU is needed."""

import re

import jax
import jax.numpy as jnp
from flax.core import meta
from jax.sharding import SingleDeviceSharding

from spark.compiling import aot
from spark.config import FFNConfig
from spark.nn.ffn import FFN


def ffn_cycles(topology: str) -> list[dict]:
    """A benchmark row: estimated_cycles summed over the operations, forward and backward, of a Spark and of a gated FFN."""
    tokens, D, F = 8192, 2304, 9216
    device = aot.devices(topology)[0]
    x = jax.ShapeDtypeStruct((1, tokens, D), jnp.bfloat16)
    cfgs = {'spark': FFNConfig(kind='spark', d_ff=F * 3 // 2, k=1106, r=1024), 'gated': FFNConfig(kind='gated', d_ff=F)}
    cycles = {}
    for name, cfg in cfgs.items():
        module = FFN(cfg, jnp.bfloat16)
        variables = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x))

        def step(variables, x, cotangent, module=module):
            y, backward = jax.vjp(module.apply, variables, x)
            return y, backward(cotangent)

        on_device = jax.jit(step, in_shardings=SingleDeviceSharding(device))
        text = on_device.lower(variables, x, x).compile().as_text()
        cycles[name] = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
    return [{
        'name': f'ffn: estimated cycles on {topology}, Spark against gated',
        'backend': f'compiled for {device.device_kind}, not run',
        'ours_ms': cycles['spark'] / 1e6, 'baseline_ms': cycles['gated'] / 1e6, 'speedup': cycles['gated'] / cycles['spark'],
        'unit': 'million cycles, an estimate of the compiler, not a time', 'ratio': cycles['spark'] / cycles['gated'],
    }]  # fmt: skip
