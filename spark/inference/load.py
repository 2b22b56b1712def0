"""Loading a trained model to generate with: its parameters go straight from the checkpoint into the layout for decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from spark import config
from spark.checkpoints.manager import open_checkpoint
from spark.data import pipeline
from spark.inference.layout import Serving, lay_out, serving_for
from spark.nn.transformer import Transformer, compute_dtype
from spark.runtime import freed_at_once


@dataclasses.dataclass(frozen=True)
class Served:
    """A trained model laid out for generation, on the devices of `mesh`."""

    cfg: config.ExperimentConfig
    step: int
    tokenizer: object
    serving: Serving
    weights: dict
    mesh: jax.sharding.Mesh


def load(workdir, step=None, dtype='auto', serve=None, tick=lambda n, total: None):
    """The `Served` model of a run directory, its parameters read layer by layer straight into the layout that decoding wants.

    Args:
      workdir, step: as of `load`.
      dtype: of the weights, one of `inference.layout.DTYPES`, or 'auto': float32 on CPUs, else bfloat16.
      serve: changes to the run's ServeConfig, a dict.
      tick: called with the number of parameters of each piece that was read, and of all.

    Raises:
      ConfigError, CheckpointError: as of `load`; and ConfigError: the kernels asked for are not here.
    """
    cfg = config.load(workdir / 'config.json')
    tokenizer, cfg = pipeline.tokenizer_for(cfg.model_copy(update={'serve': cfg.serve.model_copy(update=serve or {})}))
    checkpoints, step = open_checkpoint(workdir, step)
    devices = jax.devices()
    platform = devices[0].platform
    if dtype == 'auto':
        dtype = np.dtype(compute_dtype(cfg.model.model_copy(update={'dtype': 'auto'}), platform)).name
    serving = serving_for(cfg.model, dtype, platform, len(devices), cfg.serve)
    mesh = jax.make_mesh((len(devices),), ('devices',), axis_types=(AxisType.Auto,), devices=devices)

    def split(x, axis):
        """Over all devices along an axis, where that goes."""
        axes = [None] * x.ndim
        if x.ndim and x.shape[axis] % len(devices) == 0:
            axes[axis] = 'devices'
        return NamedSharding(mesh, PartitionSpec(*axes))

    token = jnp.zeros((1, 1), jnp.int32)
    shapes = meta.unbox(jax.eval_shape(Transformer(cfg.model).init, jax.random.key(0), token, token, token))
    narrow = jnp.float32 if dtype == 'int8' else jnp.dtype(dtype)
    as_read = lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype if path[-1].key == 'scale' else narrow)
    tick = functools.partial(tick, total=sum(x.size for x in jax.tree.leaves(shapes)))
    stored = checkpoints.stored(step, jax.tree_util.tree_map_with_path(as_read, shapes), tick=tick)
    leaf = lambda *path: functools.reduce(lambda node, name: node[name], ('params', *path), stored)
    with freed_at_once():
        weights = lay_out(serving, leaf, lambda x: jax.device_put(x, split(x, 0)))
    checkpoints.close()
    return Served(cfg, step, tokenizer, serving, weights, mesh)
