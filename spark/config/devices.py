"""Dividing a run over devices."""

import math

from spark.config.convert import fields
from spark.config.schema import ExperimentConfig
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
    shards = sizes['data'] * mesh.fsdp * cfg.train.accumulate
    a, local = cfg.model.attention, cfg.data.seq_len // mesh.context
    values = fields(cfg) | {'data.seq_len / mesh.context': local}

    def require(condition, name, want):
        if not condition:
            raise ConfigError(f'{name} = {values[name]!r}: want {want}')

    require(sizes['data'] % mesh.slices == 0, 'mesh.slices', f'a divisor of mesh.data = {sizes["data"]}')
    require(cfg.data.batch_size % shards == 0, 'data.batch_size', f'a multiple of {shards} = data × fsdp × train.accumulate')
    for axis, *names in [
        ('fsdp × context', 'model.d_model', 'model.ffn.r'),
        ('context', 'data.seq_len'),
        ('model', 'model.ffn.d_ff', 'model.attention.n_heads', 'model.attention.n_kv_heads', 'model.vocab_size'),
    ]:
        parts = math.prod(sizes[a] for a in axis.split(' × '))
        for name in names:
            want = f'a multiple of mesh.{axis} = {parts}'
            require(values[name] % parts == 0, name, want)
            of_layers = (fields(layer, 'model.').get(name, 0) for layer in cfg.model.per_layer)
            require(all(n % parts == 0 for n in of_layers), 'model.layers', f'{name} in all layers {want}')
    whole = lambda f: f.groups == 1 or f.groups % mesh.model == 0  # a group that several devices share would be gathered
    want = f'1, or a multiple of mesh.model = {mesh.model}'
    require(whole(cfg.model.ffn), 'model.ffn.groups', want)
    require(all(whole(layer.ffn) for layer in cfg.model.per_layer), 'model.layers', f'model.ffn.groups in all layers {want}')
    require(cfg.model.ffn.impl != 'pallas' or mesh.model == 1, 'mesh.model', "1 for model.ffn.impl = 'pallas'")
    if mesh.context > 1:
        want = "'auto', 'blockwise' or 'pallas': mesh.context splits the rows"
        require(a.impl not in ('full', 'sparse'), 'model.attention.impl', want)
        divisor = f'a divisor of data.seq_len / mesh.context = {local}, or at least that'
        require(local % min(local, a.block) == 0, 'model.attention.block', divisor)
        tiled = local % 128 == 0 == min(local, a.block) % 128
        want = "a multiple of 128, as model.attention.block, for model.attention.impl = 'pallas'"
        require(a.impl != 'pallas' or tiled, 'data.seq_len / mesh.context', want)
    return sizes
