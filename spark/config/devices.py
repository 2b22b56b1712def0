"""Dividing a run over devices."""

import math

from spark.config.schema import ExperimentConfig, require
from spark.errors import ConfigError


def check_devices(cfg: ExperimentConfig, n_devices: int) -> dict[str, int]:
    """The sizes of the mesh axes on n_devices; a ConfigError names the field that does not divide over its axes."""
    mesh = cfg.mesh
    sizes = {axis: getattr(mesh, axis) for axis in ('data', 'fsdp', 'context', 'model')}
    rest = mesh.fsdp * mesh.context * mesh.model
    if mesh.data == -1:
        sizes['data'] = max(n_devices // rest, 1)
    if sizes['data'] * rest != n_devices:
        product = ' × '.join(f'{axis} {n}' for axis, n in sizes.items())
        raise ConfigError(f'mesh = {product}: that is {sizes["data"] * rest} devices, but there are {n_devices}')
    require(sizes['data'] % mesh.slices == 0, 'mesh.slices', mesh.slices, f'a divisor of mesh.data = {sizes["data"]}')
    model, shards = cfg.model, sizes['data'] * mesh.fsdp
    rows = cfg.data.batch_size // cfg.train.accumulate
    require(rows % shards == 0, 'data.batch_size', cfg.data.batch_size,
            f'a multiple of {shards * cfg.train.accumulate} = data × fsdp × train.accumulate')  # fmt: skip
    for axis, name, value in [
        ('fsdp × context', 'model.d_model', model.d_model),
        ('fsdp × context', 'model.ffn.r', model.ffn.r),
        ('context', 'data.seq_len', cfg.data.seq_len),
        ('model', 'model.ffn.d_ff', model.ffn.d_ff),
        ('model', 'model.attention.n_heads', model.attention.n_heads),
        ('model', 'model.attention.n_kv_heads', model.attention.n_kv_heads),
        ('model', 'model.vocab_size', model.vocab_size),
    ]:
        parts = math.prod(sizes[a] for a in axis.split(' × '))
        require(value % parts == 0, name, value, f'a multiple of mesh.{axis} = {parts}')
    if mesh.context > 1:
        a, local = model.attention, cfg.data.seq_len // mesh.context
        require(a.impl != 'full', 'model.attention.impl', 'full', "'auto', 'blockwise' or 'pallas': mesh.context splits the rows")
        require(local % min(local, a.block) == 0, 'model.attention.block', a.block,
                f'a divisor of data.seq_len / mesh.context = {local}, or at least that')  # fmt: skip
        require(a.impl != 'pallas' or local % 128 == 0 == min(local, a.block) % 128, 'data.seq_len / mesh.context', local,
                "a multiple of 128, as model.attention.block, for model.attention.impl = 'pallas'")  # fmt: skip
    return sizes
