"""Every option of spark: its type, its default, its meaning, and what it must satisfy."""

import functools
import itertools
import math
import re
from collections.abc import Iterator
from typing import Literal

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError

from spark.config.kinds import ATTENTION_KINDS, FFN_KINDS, Kind

# On resume, only these fields and sections may differ from the run's config.json: they do not change what is trained.
RESUMABLE = (
    # How the same is computed.
    *('model.remat', 'model.ffn.impl', 'model.attention.impl', 'model.attention.block', 'train.loss_pieces'),
    *('mesh', 'sample', 'serve', 'data.threads', 'data.prefetch', 'data.cache_dir', 'data.max_bad', 'data.allow_changed'),
    *('data.source', 'data.eval_source', 'data.tokenizer'),  # another path to the same data: the digest of the tokens is compared
    *('data.batch_size', 'train.accumulate'),  # the place in the data is a number of rows
    *('train.log_every', 'train.eval_every', 'train.eval_batches', 'train.activity', 'train.stall_seconds', 'train.cache'),
    *('train.save_every', 'train.save_every_minutes', 'train.keep', 'train.keep_every', 'train.keep_every_minutes'),
    *('train.profile_step', 'train.profile_steps', 'train.final_eval'),
    *('train.max_skips', 'train.spike'),  # a run that diverged may need other values to continue
)
# How long to train, and the learning rate by step: these may also differ with --extend, and in a branch. The optimizer's state
# does not depend on them.
SCHEDULE = (
    *('train.steps', 'optimizer.lr', 'optimizer.schedule', 'optimizer.final_lr', 'optimizer.warmup_steps'),
    *('optimizer.decay_steps', 'optimizer.decay_share', 'optimizer.decay_form'),
)


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra='forbid', strict=True, allow_inf_nan=False)

    def _rules(self) -> Iterator[tuple[bool, str, str]]:
        """What this section must satisfy: (is it so, the field to name if not, what that field should be)."""
        yield from ()

    @pydantic.model_validator(mode='after')
    def _check(self):
        integers = ((not isinstance(x, int) or abs(x) < 2**31, name, 'less than 2³¹') for name, x in self)
        for satisfied, field, want in itertools.chain(integers, self._rules()):
            if not satisfied:  # `convert._one_line` puts the section's name before the field's
                value = functools.reduce(getattr, field.split('.'), self)
                raise PydanticCustomError('wrong_value', '{line}', {'line': f'{field} = {value!r}: want {want}'})
        return self


def by_pattern(text: str) -> list[tuple[str, float]] | None:
    """The pairs of 'PATTERN=NUMBER …'; None if it is something else."""
    try:
        pairs = [(re.compile(p).pattern, float(number)) for p, _, number in (word.rpartition('=') for word in text.split())]
    except (re.error, ValueError):
        return None
    return pairs if all(pattern and 0 <= number < math.inf for pattern, number in pairs) else None


class FFNConfig(_Section):
    """A lookup in a table of d_ff neurons."""

    kind: Literal[*FFN_KINDS] = 'gated'
    d_ff: int = Field(gt=0)  # neurons; at equal parameters a kind with two matrices has 1.5 × the neurons of one with three
    k: int = Field(0, ge=0)  # neurons kept per token, approximately; 0 for kinds without top-k
    r: int = Field(0, ge=0)  # predictor rank: a token's first r dimensions score the neurons; 0 for kinds without a predictor
    topk: Literal['statistical', 'exact', 'approx'] = 'statistical'  # the operator that selects the k
    shrink: bool = True  # what is kept is a score less the threshold (of exact and approx: the k + 1-th largest), or the score
    recall: float = Field(0.95, gt=0, lt=1)  # of approx on TPU: the share of the k largest that it finds; elsewhere it sorts
    huber: float = Field(0.0, ge=0)  # width of the smoothed threshold (Theorem 3.2); 0: a plain soft threshold
    # masked: every neuron is computed. sparse: active ones only, forward and backward, by CPU kernels. pallas: every neuron, by
    # kernels for TPUs and GPUs that nobody has timed; a CPU interprets them. auto: the faster of masked and sparse.
    impl: Literal['auto', 'masked', 'sparse', 'pallas'] = 'auto'

    @property
    def traits(self) -> Kind:
        """What this kind computes."""
        return FFN_KINDS[self.kind]

    @property
    def soft(self) -> bool:
        """Is the top-k the soft statistical threshold? Kernels compute no other."""
        return self.traits.topk and self.topk == 'statistical' and self.shrink

    def _rules(self):
        kind, has = f'kind {self.kind!r}', self.traits
        yield not has.topk or 1 <= self.k <= self.d_ff, 'k', f'1 … d_ff = {self.d_ff} for {kind}'
        yield has.topk or self.k == 0, 'k', f'0: {kind} has no top-k'
        yield not has.predictor or self.r >= 1, 'r', f'at least 1: {kind} has a predictor'
        yield has.predictor or self.r == 0, 'r', f'0: {kind} has no predictor'
        yield self.soft or not self.huber, 'huber', "0: only a kind with topk 'statistical' and shrink is smoothed"
        yield has.topk or self.topk == 'statistical', 'topk', f"'statistical', the default: {kind} has no top-k"
        yield has.topk or self.shrink, 'shrink', f'True, the default: {kind} has no top-k'
        yield self.topk == 'approx' or self.recall == 0.95, 'recall', "0.95, the default: only topk 'approx' has a recall"


class AttentionConfig(_Section):
    """A lookup in a table of tokens."""

    kind: Literal[*ATTENTION_KINDS] = 'dense'
    n_heads: int = Field(gt=0)
    n_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    k: int = Field(0, ge=0)  # keys kept per query, approximately; 0 for kinds without top-k
    r: int = Field(0, ge=0)  # predictor rank: a head's first r dimensions score the keys; 0 for kinds without a predictor
    window: int = Field(0, ge=0)  # keys that a query of a local layer sees, its own included; 0 if no layer is local
    logit_cap: float = Field(0.0, ge=0)  # soft-cap of the softmax's logits; 0: none
    rope_base: float = Field(10_000.0, gt=0)
    # full: all scores at once. blockwise: in linear memory, by XLA. pallas: in linear memory, by kernels for TPUs, which a CPU
    # interprets slowly, or by kernels for GPUs that nobody has timed. sparse: surviving keys only, by CPU kernels. auto: full
    # up to one block of tokens; above that, and where CPU kernels are faster, the fastest for the platform.
    impl: Literal['auto', 'full', 'blockwise', 'pallas', 'sparse'] = 'auto'
    block: int = Field(512, gt=0)  # tokens per block of blockwise and pallas; on TPU a multiple of 128
    query_dim: float = Field(0.0, ge=0)  # queries are scaled by 1/sqrt(this); 0: head_dim
    documents: Literal['apart', 'joined'] = 'apart'  # in a row: a token sees only its own document, or all tokens before it

    @property
    def traits(self) -> Kind:
        """What this kind computes."""
        return ATTENTION_KINDS[self.kind]

    def _rules(self):
        kind, has, d = f'kind {self.kind!r}', self.traits, self.head_dim
        yield self.n_heads % self.n_kv_heads == 0, 'n_kv_heads', f'a divisor of n_heads = {self.n_heads}'
        yield d % 2 == 0, 'head_dim', 'an even number (rotary pairs)'
        yield not has.topk or self.k >= 1, 'k', f'at least 1 for {kind}'
        yield has.topk or self.k == 0, 'k', f'0: {kind} has no top-k'
        even = f'an even number in 2 … head_dim − 2 = {d - 2} for {kind} (rotary pairs)'
        yield not has.predictor or (0 < self.r < d and self.r % 2 == 0), 'r', even
        yield has.predictor or self.r == 0, 'r', f'0: {kind} has no predictor'
        yield self.impl != 'pallas' or self.block % 128 == 0, 'block', "a multiple of 128 for impl 'pallas'"


class ModelConfig(_Section):
    """A decoder with Gemma-2's block."""

    vocab_size: int = Field(0, ge=0)  # 0: the tokenizer's
    d_model: int = Field(gt=0)
    n_layers: int = Field(gt=0)
    pattern: tuple[Literal['local', 'global'], ...] = ('local', 'global')  # of the layers, repeated n_layers / len(pattern) times
    ffn: FFNConfig
    attention: AttentionConfig
    logit_cap: float = Field(0.0, ge=0)  # soft-cap of the output logits; 0: none
    # muP: init and learning rates are scaled so that those that are best at this d_model are so at every other. 0: they are not.
    base_width: int = Field(0, ge=0)
    remat: Literal['none', 'full', 'dots', 'dots_no_batch'] = 'none'  # what the backward pass recomputes; see nn/transformer.py
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of the computation; auto: float32 on CPU, else bfloat16

    @property
    def windows(self) -> list[int]:
        """The window of each layer; 0 for a global one."""
        window = {'local': self.attention.window, 'global': 0}
        return [window[self.pattern[i % len(self.pattern)]] for i in range(self.n_layers)]

    def _rules(self):
        f, pattern, local, window = self.ffn, self.pattern, 'local' in self.pattern, self.attention.window
        yield f.r < self.d_model, 'ffn.r', f'1 … d_model − 1 = {self.d_model - 1} for kind {f.kind!r}'
        yield len(pattern) > 0, 'pattern', "at least one of 'local', 'global'"
        yield self.n_layers % len(pattern) == 0, 'n_layers', f'a multiple of len(model.pattern) = {len(pattern)}'
        yield not local or window >= 1, 'attention.window', 'at least 1: model.pattern has local layers'
        yield local or window == 0, 'attention.window', '0: model.pattern has no local layer'


class DataConfig(_Section):
    """What to train on; `spark.data` documents the strings."""

    source: str = 'stdlib'  # text:GLOB | tfds:NAME | hf:NAME | tokens:DIR | …, or a mixture: '0.7 stdlib + 0.3 text:a/*.txt'
    eval_source: str = ''  # text for validation and test; empty: the held-out splits of `source`
    holdout: float = Field(0.05, ge=0, lt=0.5)  # share of a source without splits for validation, and as much for test
    text_field: str = 'text'  # the text, in records that have several fields
    tokenizer: str = 'bytes'  # bytes | sentencepiece:FILE | hf:FILE
    bos: str = ''  # names of special tokens; empty: those of the tokenizer's file; 'none': not used
    eos: str = ''
    seq_len: int = Field(gt=0)  # tokens in a row
    batch_size: int = Field(gt=0)  # rows in an optimizer step, over all devices
    epochs: int = Field(0, ge=0)  # passes over the training data; 0: no limit
    threads: int = Field(4, gt=0)  # threads that read batches; the order of the data does not depend on their number
    prefetch: int = Field(4, gt=0)  # batches that are prepared ahead
    cache_dir: str = ''  # where prepared data is kept; empty: $SPARK_CACHE or ~/.cache/spark
    max_bad: float = Field(0.0, ge=0)  # unusable documents that may be left out: a number, or below 1 a share of all
    allow_changed: bool = False  # resume with other data than the run had


class MeshConfig(_Section):
    """Devices along each mesh axis; the product is the number of devices."""

    data: int = Field(-1, ge=-1)  # model replicas; -1: all devices that the other axes leave
    fsdp: int = Field(1, gt=0)  # splits parameters, optimizer state and the rows of a batch
    context: int = Field(1, gt=0)  # splits parameters, optimizer state and the tokens of a row; keys and values are all-gathered
    model: int = Field(1, gt=0)  # splits heads, neurons and vocabulary
    slices: int = Field(1, gt=0)  # groups of devices with a fast network inside; `data` is split over them

    def _rules(self):
        yield self.data != 0, 'data', 'at least 1, or -1 for all the devices that are left'


class OptimizerConfig(_Section):
    """How gradients become updates, at which learning rate; docs/optimizers.md explains each field."""

    # muon: matrices by Muon with updates as large as AdamW's, all else by AdamW. The moments are those of AdamW; of adafactor b1
    # is the decay of its momentum, or 0 for none, and b2 the highest decay of its second moments.
    name: Literal['adamw', 'adafactor', 'lion', 'muon'] = 'adamw'
    lr: float = Field(gt=0)  # peak learning rate
    # After the warm-up. wsd: lr until the last steps, then a cool-down. inverse_sqrt: lr · sqrt(warmup_steps / step), at least
    # lr · final_lr. auto: wsd if there are decay_steps, else cosine.
    schedule: Literal['auto', 'constant', 'cosine', 'linear', 'wsd', 'inverse_sqrt'] = 'auto'
    final_lr: float = Field(0.1, ge=0, le=1)  # learning rate at the last step, as a share of the peak
    warmup_steps: int = Field(0, ge=0)  # a line to lr, which begins above 0
    warmup_from_zero: bool = False  # the first step of the warm-up has rate 0, and is wasted: as in older versions
    decay_steps: int = Field(0, ge=0)  # length of the cool-down of wsd; 0: decay_share
    decay_share: float = Field(0.2, gt=0, le=1)  # the same, as a share of train.steps
    decay_form: Literal['linear', 'cosine', 'sqrt'] = 'linear'  # of the cool-down; sqrt: 1 − sqrt(share of it that has passed)
    b1: float = Field(0.9, ge=0, lt=1)
    b2: float = Field(0.95, ge=0, lt=1)
    momentum: float = Field(0.95, ge=0, lt=1)  # of muon's matrices
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)  # of matrices; the scales of norms are exempt
    # 'PATTERN=NUMBER …': regular expressions that are searched in paths such as groups/ffn_0/K1; the last that matches counts.
    rates: str = ''  # factors of the learning rate; 0 freezes
    decays: str = ''  # weight decay in place of weight_decay
    clip: float = Field(1.0, ge=0)  # global gradient norm; 0: no clipping
    ema: float = Field(0.0, ge=0, lt=1)  # decay of a mean of the parameters, which is evaluated beside them; 0: none is kept
    z_loss: float = Field(0.0, ge=0)  # weight of log²Z in the loss

    @property
    def shape(self) -> str:
        """The schedule, of which 'auto' is one."""
        return self.schedule if self.schedule != 'auto' else 'wsd' if self.decay_steps else 'cosine'

    @property
    def unread(self) -> dict[str, str]:
        """The fields that this optimizer and this schedule do not read, and why; they must have their defaults."""
        fields = dict.fromkeys(() if self.name == 'muon' else ('momentum',), f'name {self.name!r} has no Muon')
        fields |= {'eps': "name 'lion' has none"} if self.name == 'lion' else {}
        names = () if self.shape == 'wsd' else ('decay_steps', 'decay_share', 'decay_form')
        fields |= dict.fromkeys(names, f'schedule {self.schedule!r} has no cool-down')
        fields |= {'decay_share': 'decay_steps says it'} if self.decay_steps and self.shape == 'wsd' else {}
        return fields | ({'final_lr': "schedule 'constant' stays at lr"} if self.shape == 'constant' else {})

    def _rules(self):
        for field, why in self.unread.items():
            default = type(self).model_fields[field].default
            yield getattr(self, field) == default, field, f'{default!r}, the default: {why}'
        for field in ('rates', 'decays'):
            want = "'PATTERN=NUMBER …', regular expressions with numbers that are at least 0"
            yield by_pattern(getattr(self, field)) is not None, field, want
        yield self.name != 'adafactor' or self.eps >= 1e-15, 'eps', 'at least 1e-15 for adafactor, which squares it in float32'


class TrainConfig(_Section):
    """The loop."""

    steps: int = Field(gt=0)
    accumulate: int = Field(1, gt=0)  # microbatches per step, whose gradients are summed
    loss_pieces: int = Field(1, gt=0)  # parts of the vocabulary; the loss computes logits for one part at a time
    log_every: int = Field(10, gt=0)
    eval_every: int = Field(0, ge=0)  # steps between evaluations; 0: only at the end
    eval_batches: int = Field(0, ge=0)  # batches of an evaluation while training; 0: the whole validation split
    final_eval: int = Field(0, ge=0)  # batches of each of the two evaluations at the end; 0: the whole splits
    save_every: int = Field(100, ge=0)  # steps between checkpoints; the last step is always saved; 0: by time only
    save_every_minutes: float = Field(0.0, ge=0)  # also save when this time has passed since the last save; 0: no
    keep: int = Field(2, gt=0)  # number of newest checkpoints to keep
    keep_every: int = Field(0, ge=0)  # also keep the checkpoints at multiples of this step; 0: none
    keep_every_minutes: float = Field(0.0, ge=0)  # also keep a checkpoint for each such time; 0: none
    max_skips: int = Field(0, ge=0)  # updates with a loss or gradient that is not finite, skipped in a row; one more ends the run
    spike: float = Field(0.0, ge=0)  # also skip an update whose gradient norm exceeds the running mean by this factor; 0: never
    # The watchdog ends a run that makes no progress for this long, and prints all stacks. Compiling, evaluating, saving and
    # restoring may take ten times as long, and a step 20 times its usual duration. 0: no watchdog.
    stall_seconds: float = Field(300.0, ge=0)
    restore_from: str = ''  # a run directory, or its checkpoints/STEP, whose parameters to start from; all else starts anew
    branch_from: str = ''  # the same, to go on from, with its optimizer, step and place in the data
    activity: bool = True  # log active neurons and attended keys with the loss
    profile_step: int = Field(0, ge=0)  # first step of a profiler trace into workdir/profile; 0: none
    profile_steps: int = Field(3, gt=0)  # length of that trace, and of a trace that SIGUSR1 starts
    # Keep compiled programs in $JAX_COMPILATION_CACHE_DIR, or else in workdir/xla_cache, for restarts. auto: on accelerators.
    cache: Literal['auto', 'on', 'off'] = 'auto'

    def _rules(self):
        yield self.save_every > 0 or self.save_every_minutes > 0, 'save_every', 'at least 1, or train.save_every_minutes'
        yield self.spike == 0 or self.spike > 1, 'spike', 'more than 1, or 0 to accept any gradient norm'
        yield not (self.branch_from and self.restore_from), 'restore_from', "'': train.branch_from restores the parameters, too"
        yield self.max_skips > 0 or not self.spike, 'max_skips', 'at least 1: train.spike skips updates'


class SampleConfig(_Section):
    """The continuation shown when training ends."""

    prompt: str = ''
    tokens: int = Field(64, ge=0)  # 0: no sample
    temperature: float = Field(0.8, ge=0)  # 0: greedy


class ServeConfig(_Section):
    """How scripts/generate.py runs the trained model."""

    # cpu, tpu, gpu: kernels for that platform. gather: plain JAX that reads active entries only. masked: plain JAX that
    # computes every entry. auto: the fastest that is available.
    kernels: Literal['auto', 'cpu', 'tpu', 'gpu', 'gather', 'masked'] = 'auto'
    capacity: float = Field(1.5, gt=0)  # of gather, tpu and gpu: they have room for capacity × k active entries per token
    overflow: Literal['masked', 'drop'] = 'masked'  # a token with more is computed in full, or loses the excess; it is reported


class ExperimentConfig(_Section):
    """One training run."""

    seed: int = Field(0, ge=0, lt=2**31)
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()
    sample: SampleConfig = SampleConfig()
    serve: ServeConfig = ServeConfig()

    def _rules(self):
        batch, vocab, t = self.data.batch_size, self.model.vocab_size, self.train
        yield batch % t.accumulate == 0, 'train.accumulate', f'a divisor of data.batch_size = {batch}'
        yield vocab % t.loss_pieces == 0, 'train.loss_pieces', f'a divisor of model.vocab_size = {vocab}'
        o = self.optimizer
        yield o.warmup_steps < t.steps, 'optimizer.warmup_steps', f'less than train.steps = {t.steps}'
        most = t.steps - o.warmup_steps
        yield o.decay_steps <= most, 'optimizer.decay_steps', f'at most train.steps − optimizer.warmup_steps = {most}'
        share = o.shape != 'wsd' or o.decay_steps or o.decay_share * t.steps <= most
        want = f'at most {most / t.steps:.4g}, since {o.warmup_steps} of {t.steps} steps are warm-up'
        yield share, 'optimizer.decay_share', want
