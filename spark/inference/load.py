"""Loading a trained model to generate with: its parameters go straight from the checkpoint into the layout for decoding."""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from spark import config
from spark.checkpoints.manager import field_of_params, open_checkpoint
from spark.data.tokenizer import tokenizer_for
from spark.inference.layout import Serving, from_params, serving_for
from spark.nn.runs import at_step
from spark.nn.transformer import abstract_params
from spark.progress import tqdm
from spark.runtime import freed_at_once


class Served(NamedTuple):
    """A trained model, laid out for generation on the devices of `mesh`."""

    cfg: config.ExperimentConfig
    step: int
    tokenizer: Any
    serving: Serving
    weights: dict
    mesh: jax.sharding.Mesh


def load(
    workdir: epath.Path | pathlib.Path, step: int | None = None, dtype: str = 'auto', serve: dict | None = None, ema: bool = False
) -> Served:
    """The model of a run directory, from its newest checkpoint by default; `serve` has changes to the run's ServeConfig.

    `ema`: with the mean of the parameters in their place.

    The dtype of the weights is one of `layout.DTYPES`, or 'auto': float32 on CPUs, else bfloat16.

    Raises a ConfigError if there is no run, its kernels are not available, or its model has parameters that generation does not
    use, and a CheckpointError if there is no such checkpoint, or it cannot be read.
    """
    cfg = config.load(workdir / 'config.json')
    field = field_of_params(cfg, ema)
    tokenizer, cfg = tokenizer_for(cfg.model_copy(update={'serve': cfg.serve.model_copy(update=serve or {})}))
    checkpoints, step = open_checkpoint(workdir, step)
    cfg = cfg.model_copy(update={'model': at_step(cfg.model, step)})
    devices = jax.devices()
    platform = devices[0].platform
    if dtype == 'auto':
        dtype = 'float32' if platform == 'cpu' else 'bfloat16'
    serving = serving_for(cfg.model, dtype, platform, len(devices), cfg.serve)
    mesh = jax.make_mesh((len(devices),), ('devices',), axis_types=(AxisType.Auto,), devices=devices)

    def place(x):
        """Splits the first axis over all devices, if it divides; else every device has a copy."""
        divides = x.ndim and x.shape[0] % len(devices) == 0
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec('devices') if divides else PartitionSpec()))

    shapes = abstract_params(cfg.model)
    narrow = jnp.float32 if dtype == 'int8' else jnp.dtype(dtype)
    as_read = lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype if path[-1].key == 'scale' else narrow)
    size = sum(x.size for x in jax.tree.leaves(shapes))
    with freed_at_once(), tqdm(total=size, desc='weights', unit='', unit_scale=True, leave=False) as bar:
        stored = checkpoints.stored(step, jax.tree_util.tree_map_with_path(as_read, shapes), bar.update, field)
        weights = from_params(serving, stored, place)
    checkpoints.close()
    return Served(cfg, step, tokenizer, serving, weights, mesh)
