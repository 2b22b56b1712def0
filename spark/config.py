"""The typed, validated, frozen view of a ConfigDict: every option of spark, its type, its default, what it means.

`configs/*.py` build an ml_collections ConfigDict with these fields; `validate` turns it into an `ExperimentConfig` or
raises a ConfigError of one line that names the field, the value and what would be right.
"""

import difflib
import importlib.util
import math
import pathlib
from typing import Literal

import pydantic
from ml_collections import ConfigDict, config_dict
from pydantic import Field

from spark.errors import ConfigError

# Per kind: does it have a second key matrix (a gate), a top-k, a predictor?
FFN_KINDS = {
    'gated': (True, False, False),
    'relu': (False, False, False),
    'relu2': (False, False, False),
    'topk': (False, True, False),
    'gaussian_topk': (True, True, False),
    'spark': (True, True, True),
}


# How a run is run, not what it trains: the command that goes on with one may change these fields and sections.
HOW = (
    *('mesh', 'sample', 'serve', 'data.threads', 'data.prefetch', 'data.cache_dir'),
    *('train.log_every', 'train.save_every', 'train.keep', 'train.keep_every', 'train.stall_seconds', 'train.cache'),
    *('train.profile_step', 'train.profile_steps'),
    *('train.max_skips', 'train.spike'),  # what a run that diverged may want to go on with
)


class _Frozen(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra='forbid', strict=True, allow_inf_nan=False)


class FFNConfig(_Frozen):
    """A lookup in a table of d_ff neurons."""

    kind: Literal['gated', 'relu', 'relu2', 'topk', 'gaussian_topk', 'spark'] = 'gated'
    d_ff: int = Field(gt=0)  # neurons; 1.5 × the gated width at equal parameters for kinds without a second d_model × d_ff matrix
    k: int = Field(0, ge=0)  # neurons kept per token, about; 0 for kinds without top-k
    r: int = Field(0, ge=0)  # predictor rank: leading dimensions of the token that score the neurons; 0 for kinds without
    topk: Literal['statistical', 'exact', 'approx'] = 'statistical'  # how the k are found
    huber: float = Field(0.0, ge=0)  # width of the smoothed threshold (Theorem 3.2); 0: a plain soft threshold


class AttentionConfig(_Frozen):
    """A lookup in a table of tokens."""

    kind: Literal['dense', 'spark'] = 'dense'
    n_heads: int = Field(gt=0)
    n_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    k: int = Field(0, ge=0)  # keys kept per query, about; 0 for dense
    r: int = Field(0, ge=0)  # predictor rank: leading dimensions of a head that score the keys; 0 for dense
    window: int = Field(0, ge=0)  # tokens that a query of a local layer sees, itself included; 0 if no layer is local
    logit_cap: float = Field(0.0, ge=0)  # soft-cap of the softmax's logits; 0: none
    rope_base: float = Field(10_000.0, gt=0)
    # All scores at once (full), or in linear memory: in XLA (blockwise), or in Pallas for TPU (interpreted elsewhere, slowly).
    # auto: full up to one block, and above that the best there is for the platform.
    impl: Literal['auto', 'full', 'blockwise', 'pallas'] = 'auto'
    block: int = Field(512, gt=0)  # tokens in a block of those in linear memory; on TPU a multiple of 128
    query_dim: float = Field(0.0, ge=0)  # queries are scaled by 1/sqrt(this); 0: head_dim
    # A packed row holds documents that do not see each other (apart), or one text in which they follow each other (joined).
    documents: Literal['apart', 'joined'] = 'apart'


class ModelConfig(_Frozen):
    """A decoder with Gemma-2's block."""

    vocab_size: int = Field(0, ge=0)  # 0: the tokenizer's
    d_model: int = Field(gt=0)
    n_layers: int = Field(gt=0)
    pattern: tuple[Literal['local', 'global'], ...] = ('local', 'global')  # repeated n_layers / len times
    ffn: FFNConfig
    attention: AttentionConfig
    logit_cap: float = Field(0.0, ge=0)  # soft-cap of the output logits; 0: none
    remat: Literal['none', 'full', 'dots', 'dots_no_batch'] = 'none'  # what backward recomputes; see transformer.REMAT
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of the computation; auto: float32 on CPU, else bfloat16


class DataConfig(_Frozen):
    """What to train on; `spark.data` documents the strings."""

    source: str = 'stdlib'  # stdlib | text:GLOB | tfds:NAME | array_record:GLOB, or a mixture: '0.7 stdlib + 0.3 text:a/*.txt'
    eval_source: str = ''  # held-out text; empty: the held-out splits of `source`
    holdout: float = Field(0.05, gt=0, lt=0.5)  # share held out twice (validation, test) of sources without splits
    tokenizer: str = 'bytes'  # bytes | sentencepiece:FILE | hf:FILE
    seq_len: int = Field(gt=0)  # tokens in a row
    batch_size: int = Field(gt=0)  # rows in an optimizer step, over all devices
    shuffle_rows: int = Field(0, ge=0)  # window in which packed rows are shuffled, so that a long document is spread; 0: off
    epochs: int = Field(0, ge=0)  # passes over the training data before it counts as exhausted; 0: no limit
    threads: int = Field(8, gt=0)  # that read and tokenize; the order does not depend on it
    prefetch: int = Field(4, gt=0)  # batches made ahead
    cache_dir: str = ''  # of prepared corpora; empty: $SPARK_CACHE or ~/.cache/spark


class MeshConfig(_Frozen):
    """Devices along each mesh axis; the product is the number of devices."""

    data: int = Field(-1, ge=-1)  # replicas; -1: all that are left
    fsdp: int = Field(1, gt=0)  # parameters, optimizer state and batch are split
    context: int = Field(1, gt=0)  # parameters, optimizer state and the tokens of a row are split; keys and values are gathered
    model: int = Field(1, gt=0)  # heads, neurons and vocabulary are split
    slices: int = Field(1, gt=0)  # groups of devices with a fast network of their own, that `data` is spread over


class OptimizerConfig(_Frozen):
    """AdamW, linear warm-up, cosine decay."""

    lr: float = Field(gt=0)  # peak
    final_lr: float = Field(0.1, ge=0, le=1)  # at the last step, as a share of the peak
    warmup_steps: int = Field(0, ge=0)
    b1: float = Field(0.9, ge=0, lt=1)
    b2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)  # of matrices; norms and scales are exempt
    clip: float = Field(1.0, ge=0)  # global gradient norm; 0: no clipping
    z_loss: float = Field(0.0, ge=0)  # weight of log²Z in the loss


class TrainConfig(_Frozen):
    """The loop."""

    steps: int = Field(gt=0)
    accumulate: int = Field(1, gt=0)  # microbatches that a step's batch is split into
    loss_pieces: int = Field(1, gt=0)  # that the vocabulary is cut into; logits exist for one piece at a time
    log_every: int = Field(10, gt=0)
    eval_every: int = Field(0, ge=0)  # steps; 0: only at the end
    eval_batches: int = Field(0, ge=0)  # of the validation split, while training; 0: all of it
    save_every: int = Field(100, gt=0)
    keep: int = Field(2, gt=0)  # newest checkpoints to keep
    keep_every: int = Field(0, ge=0)  # and every checkpoint at a multiple of this; 0: no more
    # Updates whose loss or gradient is not finite are left out, so many in a row; the next one stops the run (0: the first).
    max_skips: int = Field(0, ge=0)
    # … and updates whose gradient norm is more than so many times its running mean; 0: none.
    spike: float = Field(0.0, ge=0)
    # Without a sign of life for so long the run ends with the stacks of all threads; compiling and the like may take ten times as
    # long, and a step 20 times the usual one. 0: never.
    stall_seconds: float = Field(300.0, ge=0)
    # A run directory, or one of its checkpoints/STEP, whose parameters a new run starts from; optimizer and data are new.
    restore_from: str = ''
    activity: bool = True  # log active neurons and attended keys with the loss
    profile_step: int = Field(0, ge=0)  # first step of a profiler trace into workdir/profile; 0: none
    profile_steps: int = Field(3, gt=0)  # of that trace, and of one that SIGUSR1 asks for
    # Compiled programs stay in workdir/xla_cache, or $JAX_COMPILATION_CACHE_DIR, so that a restart does not compile again.
    # auto: on accelerators.
    cache: Literal['auto', 'on', 'off'] = 'auto'


class SampleConfig(_Frozen):
    """The continuation shown when training ends."""

    prompt: str = ''
    tokens: int = Field(64, ge=0)  # 0: no sample
    temperature: float = Field(0.8, ge=0)  # 0: greedy


class ServeConfig(_Frozen):
    """How the trained model is run by scripts/generate.py."""

    # cpu, tpu, gpu: kernels for that platform; gather: plain JAX that reads what is active; masked: plain JAX that computes
    # everything. auto: the best that is here.
    kernels: Literal['auto', 'cpu', 'tpu', 'gpu', 'gather', 'masked'] = 'auto'
    # Of kernels gather, tpu and gpu: room per token for so many times k neurons, or keys; and whether a token that needs more is
    # computed in full, or loses the rest. Either is counted and reported.
    capacity: float = Field(1.5, gt=0)
    overflow: Literal['masked', 'drop'] = 'masked'


class ExperimentConfig(_Frozen):
    """One training run."""

    seed: int = Field(0, ge=0, lt=2**31)
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()
    sample: SampleConfig = SampleConfig()
    serve: ServeConfig = ServeConfig()


def template(section=ExperimentConfig):
    """A ConfigDict with every field at its default; those without one are placeholders of their type.

    A config file starts from it and states what differs, and any field can be overridden on the command line.
    """
    template_ = ConfigDict()
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            template_[name] = template(field.annotation)
        elif field.is_required():
            template_[name] = config_dict.placeholder(field.annotation)
        else:
            template_[name] = field.default
    return template_


def from_file(path, variant=None):
    """The ConfigDict that `get_config(variant)` of the Python file at `path` returns; no variant: its default one."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*([] if variant is None else [variant]))


def check_flags(argv):
    """A ConfigError for a --config whose file is missing, or a --config.FIELD that does not exist."""
    for arg in argv:
        name, _, value = arg.lstrip('-').partition('=')
        path = pathlib.Path(value.split(':')[0])
        if name == 'config' and not path.is_file():
            there = [str(p) for p in path.parent.glob('*.py')]
            raise ConfigError(f'--config={value}: no such file{nearest(str(path), there)}')
        if name.startswith('config.'):
            field_type(name.partition('.')[2], f'--{name}')


def field_type(name, label):
    """The annotation of a field's dotted name; a ConfigError that starts with `label` if there is none."""
    section = ExperimentConfig
    for part in name.split('.'):
        known = section.model_fields if hasattr(section, 'model_fields') else {}
        if part not in known:
            raise ConfigError(f'{label}: {_no_such_field(part, known)}')
        section = known[part].annotation
    return section


def validate(config):
    """A ConfigDict (or nested dict) as a checked `ExperimentConfig`; a ConfigError of one line if it is wrong."""
    raw = _without_placeholders(config.to_dict() if isinstance(config, ConfigDict) else config)
    try:
        cfg = ExperimentConfig.model_validate(raw)
    except pydantic.ValidationError as e:
        raise ConfigError(_one_line(e)) from None
    _check(cfg)
    return cfg


def load(path):
    """The `ExperimentConfig` that a run wrote to DIR/config.json."""
    try:
        cfg = ExperimentConfig.model_validate_json(path.read_text())
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f'{path}: {getattr(e, "strerror", None) or e}; want the config.json of a run') from None
    except pydantic.ValidationError as e:
        raise ConfigError(f'{path}: {_one_line(e)}') from None
    _check(cfg)
    return cfg


def fields(cfg, prefix=''):
    """{dotted name: value} of every leaf of a config."""
    leaves = {}
    for name in type(cfg).model_fields:
        value = getattr(cfg, name)
        nested = isinstance(value, pydantic.BaseModel)
        leaves |= fields(value, f'{prefix}{name}.') if nested else {prefix + name: value}
    return leaves


def differences(theirs, ours, but=()):
    """'a.b = 1, now 2; …' for the fields in which two configs differ, without the fields and sections in `but`; '' if none do."""
    theirs, ours = fields(theirs), fields(ours)
    ignored = lambda f: any(f == name or f.startswith(f'{name}.') for name in but)
    differ = [f for f in ours if ours[f] != theirs[f] and not ignored(f)]
    return '; '.join(f'{f} = {theirs[f]!r}, now {ours[f]!r}' for f in differ)


def nearest(name, known):
    """', did you mean X?' for the closest of the known names, or ''."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f'; did you mean {close[0]}?' if close else ''


def ffn_matrices(kind):
    """How many D × d_ff matrices an FFN of a kind has: a predictor and the rest of the key share one."""
    gated, _, predictor = FFN_KINDS[kind]
    return 3 if gated and not predictor else 2


def matched_d_ff(d_ff, kind, other):
    """Neurons that an FFN of kind `other` needs for the parameters of one of `kind` with d_ff neurons."""
    return round(d_ff * ffn_matrices(kind) / ffn_matrices(other))


def check_devices(cfg, n_devices):
    """The sizes of the mesh axes on n_devices, as a dict; a ConfigError if the config does not divide over them."""
    mesh = cfg.mesh
    sizes = {axis: getattr(mesh, axis) for axis in ('data', 'fsdp', 'context', 'model')}
    rest = mesh.fsdp * mesh.context * mesh.model
    if mesh.data == -1:
        sizes['data'] = max(n_devices // rest, 1)
    if sizes['data'] * rest != n_devices:
        product = ' × '.join(f'{axis} {n}' for axis, n in sizes.items())
        raise ConfigError(f'mesh = {product}: that is {sizes["data"] * rest} devices, here are {n_devices}')
    _want(sizes['data'] % mesh.slices == 0, 'mesh.slices', mesh.slices, f'a divisor of mesh.data = {sizes["data"]}')
    model, shards = cfg.model, sizes['data'] * mesh.fsdp
    rows = cfg.data.batch_size // cfg.train.accumulate
    _want(rows % shards == 0, 'data.batch_size', cfg.data.batch_size,
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
        over = math.prod(sizes[a] for a in axis.split(' × '))
        _want(value % over == 0, name, value, f'a multiple of mesh.{axis} = {over}')
    if mesh.context > 1:
        a, own = model.attention, cfg.data.seq_len // mesh.context
        _want(a.impl != 'full', 'model.attention.impl', 'full', "'auto' or one in linear memory: mesh.context splits the rows")
        _want(own % min(own, a.block) == 0, 'model.attention.block', a.block,
              f'a divisor of data.seq_len / mesh.context = {own}, or at least that')  # fmt: skip
        _want(a.impl != 'pallas' or own % 128 == 0 == min(own, a.block) % 128, 'data.seq_len / mesh.context', own,
              "a multiple of 128, as model.attention.block, for model.attention.impl = 'pallas'")  # fmt: skip
    return sizes


def _without_placeholders(raw):
    if not isinstance(raw, dict):
        return raw
    return {name: _without_placeholders(value) for name, value in raw.items() if value is not None}


def _want(condition, name, value, allowed):
    if not condition:
        raise ConfigError(f'{name} = {value!r}: want {allowed}')


def _check(cfg):
    """What no single field can know."""
    for name, value in fields(cfg).items():
        _want(not isinstance(value, int) or abs(value) < 2**31, name, value, 'less than 2³¹')
    m, f, a = cfg.model, cfg.model.ffn, cfg.model.attention
    _, has_topk, has_predictor = FFN_KINDS[f.kind]
    kind = f'kind {f.kind!r}'
    _want(not has_topk or 1 <= f.k <= f.d_ff, 'model.ffn.k', f.k, f'1 … d_ff = {f.d_ff} for {kind}')
    _want(has_topk or f.k == 0, 'model.ffn.k', f.k, f'0: {kind} has no top-k')
    _want(not has_predictor or 1 <= f.r < m.d_model, 'model.ffn.r', f.r, f'1 … d_model − 1 = {m.d_model - 1} for {kind}')
    _want(has_predictor or f.r == 0, 'model.ffn.r', f.r, f'0: {kind} has no predictor')
    soft = has_topk and f.topk == 'statistical'
    _want(soft or not f.huber, 'model.ffn.huber', f.huber, "0: only a kind with topk 'statistical' is smoothed")
    _want(has_topk or f.topk == 'statistical', 'model.ffn.topk', f.topk, f"'statistical', the default: {kind} has no top-k")

    _want(a.n_heads % a.n_kv_heads == 0, 'model.attention.n_kv_heads', a.n_kv_heads, f'a divisor of n_heads = {a.n_heads}')
    _want(a.head_dim % 2 == 0, 'model.attention.head_dim', a.head_dim, 'an even number (rotary pairs)')
    sparse = a.kind == 'spark'
    _want(not sparse or a.k >= 1, 'model.attention.k', a.k, "at least 1 for kind 'spark'")
    _want(sparse or a.k == 0, 'model.attention.k', a.k, "0: kind 'dense' has no top-k")
    _want(not sparse or (0 < a.r < a.head_dim and a.r % 2 == 0), 'model.attention.r', a.r,
          f"an even number in 2 … head_dim − 2 = {a.head_dim - 2} for kind 'spark' (rotary pairs)")  # fmt: skip
    _want(sparse or a.r == 0, 'model.attention.r', a.r, "0: kind 'dense' has no predictor")
    _want(a.impl != 'pallas' or a.block % 128 == 0, 'model.attention.block', a.block, "a multiple of 128 for impl 'pallas'")
    local = 'local' in m.pattern
    _want(not local or a.window >= 1, 'model.attention.window', a.window, 'at least 1: model.pattern has local layers')
    _want(local or a.window == 0, 'model.attention.window', a.window, '0: model.pattern has no local layer')

    _want(cfg.mesh.data != 0, 'mesh.data', 0, 'at least 1, or -1 for all the devices that are left')
    _want(len(m.pattern) > 0, 'model.pattern', m.pattern, "at least one of 'local', 'global'")
    _want(m.n_layers % len(m.pattern) == 0, 'model.n_layers', m.n_layers, f'a multiple of len(model.pattern) = {len(m.pattern)}')
    d, t = cfg.data, cfg.train
    _want(d.batch_size % t.accumulate == 0, 'train.accumulate', t.accumulate, f'a divisor of data.batch_size = {d.batch_size}')
    _want(m.vocab_size % t.loss_pieces == 0, 'train.loss_pieces', t.loss_pieces,
          f'a divisor of model.vocab_size = {m.vocab_size}')  # fmt: skip
    _want(t.spike == 0 or t.spike > 1, 'train.spike', t.spike, 'more than 1, or 0 to leave no spike out')
    _want(t.max_skips > 0 or not t.spike, 'train.max_skips', 0, 'at least 1: train.spike leaves updates out')
    warmup = cfg.optimizer.warmup_steps
    _want(warmup < t.steps, 'optimizer.warmup_steps', warmup, f'less than train.steps = {t.steps}')


def _no_such_field(name, known):
    if not known:
        return f'no such field {name!r} inside of a value'
    return f'no such field{nearest(name, known) or "."} Known: {", ".join(known)}'


def _one_line(validation_error):
    errors = validation_error.errors()
    # A misspelt field often shows up twice, as unknown and as missing: name the misspelling.
    first = min(errors, key=lambda e: e['type'] != 'extra_forbidden')
    name = '.'.join(map(str, first['loc']))
    if first['type'] == 'extra_forbidden':
        section = ExperimentConfig
        for part in first['loc'][:-1]:
            section = section.model_fields[part].annotation
        line = f'{name}: {_no_such_field(str(first["loc"][-1]), section.model_fields)}'
    elif first['type'] == 'missing':
        line = f'{name}: missing; this field has no default'
    else:
        message = first['msg']
        message = message[0].lower() + message[1:]
        given = repr(first['input'])
        given = given if len(given) < 200 else f'{given[:200]} …'
        line = (f'{name} = {given}: ' if name else '') + message.replace('input should be', 'want')
    more = len(errors) - 1
    return line + (f' (and {more} more)' if more else '')
