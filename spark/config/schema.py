"""Every option of spark: its type, its default, its meaning, and what it must satisfy."""

from typing import ClassVar, Literal

from pydantic import Field

from spark.config import evals
from spark.config import layers as by_layer
from spark.config.kinds import ATTENTION_KINDS, FFN_KINDS, Kind
from spark.config.optimizer import OptimizerConfig
from spark.config.section import Section

# On resume, only these fields and sections may differ from the run's config.json: they do not change what is trained.
RESUMABLE = (
    # How the same is computed.
    *('model.remat', 'model.ffn.impl', 'model.attention.impl', 'model.attention.block', 'train.loss_pieces'),
    *('mesh', 'sample', 'serve', 'data.threads', 'data.prefetch', 'data.cache_dir', 'data.max_bad', 'data.allow_changed'),
    *('data.source', 'data.eval_source', 'data.tokenizer'),  # another path to the same data: the digest of the tokens is compared
    *('data.batch_size', 'train.accumulate'),  # the place in the data is a number of rows
    *('train.log_every', 'train.eval_every', 'train.eval_batches', 'train.activity', 'train.stall_seconds', 'train.cache'),
    *('train.save_every', 'train.save_every_minutes', 'train.keep', 'train.keep_every', 'train.keep_every_minutes'),
    *('train.profile_step', 'train.profile_steps', 'train.final_eval', 'train.stop_at'),
    *('train.trackers', 'train.evals', 'train.teacher'),  # which may lie elsewhere: its step and digest are compared
    *('train.max_skips', 'train.spike'),  # a run that diverged may need other values to continue
)
# How long to train, and the learning rate by step: these may also differ with --extend, and in a branch. The optimizer's state
# does not depend on them.
SCHEDULE = (
    *('train.steps', 'optimizer.lr', 'optimizer.schedule', 'optimizer.final_lr', 'optimizer.warmup_steps'),
    *('optimizer.decay_steps', 'optimizer.decay_share', 'optimizer.decay_form'),
)
AT_MOST = 'fewer than 2²¹ steps of a fall, 2³¹ in all'


class FFNConfig(Section):
    """A lookup in a table of d_ff neurons; docs/levers.md has the equations."""

    kind: Literal[*FFN_KINDS] = 'gated'
    d_ff: int = Field(gt=0)  # neurons; at equal parameters a kind with two matrices has 1.5 × the neurons of one with three
    k: int = Field(0, ge=0)  # neurons kept per token, approximately; 0 for kinds without top-k
    k_schedule: str = ''  # by step: 'all:100 linear:300' (or cosine) keeps d_ff for 100 steps, then d_ff / 2 falls to k in 300
    r: int = Field(0, ge=0)  # predictor rank: a token's first r dimensions score the neurons; 0 for kinds without a predictor
    gate: Literal['', 'identity', 'softplus', 'sigmoid', 'none'] = ''  # σ2; '': the kind's; none: there is no second score
    topk: Literal['statistical', 'exact', 'approx'] = 'statistical'  # the operator that selects the k
    groups: int = Field(1, gt=0)  # each of so many parts of the neurons keeps k / groups by itself
    ddof: int = Field(-1, ge=-1, le=1)  # of statistical: the variance is a sum of squares over n − ddof; −1: the kind's
    shrink: bool = True  # what is kept is a score less the threshold (of a sort: the largest that is not kept), or the score
    recall: float = Field(0.95, gt=0, lt=1)  # of approx on TPU: the share of the k largest that it finds; elsewhere it sorts
    huber: float = Field(0.0, ge=0)  # width of the smoothed threshold (Theorem 3.2); 0: a plain soft threshold
    # masked: every neuron is computed. sparse: active ones only, forward and backward, by CPU kernels. pallas: every neuron, by
    # kernels for TPUs and GPUs that nobody has timed; a CPU interprets them. auto: the faster of masked and sparse.
    impl: Literal['auto', 'masked', 'sparse', 'pallas'] = 'auto'

    COMMON: ClassVar = ('impl',)  # the same in all layers

    @property
    def traits(self) -> Kind:
        """What this kind computes."""
        return FFN_KINDS[self.kind].but(self.gate, self.ddof)

    @property
    def soft(self) -> bool:
        """Is the top-k the soft statistical threshold of all neurons? Kernels compute no other."""
        return self.traits.topk and self.topk == 'statistical' and self.shrink and self.groups == 1

    @property
    def any_k(self) -> bool:
        """May k be known at run time only? Not where shapes depend on it."""
        return self.traits.topk and self.topk == 'statistical'

    @property
    def unread(self) -> set[str]:
        """The fields that this kind and its operator do not read."""
        has = FFN_KINDS[self.kind]
        operator = self.topk if has.topk else ''
        read = {
            **dict.fromkeys(('k', 'topk', 'shrink', 'groups'), has.topk),
            **dict.fromkeys(('k_schedule', 'ddof', 'huber'), operator == 'statistical'),
            **{'recall': operator == 'approx', 'r': has.predictor, 'gate': has.gated},
        }
        return {name for name in read if not read[name]}

    def _rules(self):
        kind, has = f'kind {self.kind!r}', self.traits
        yield not has.topk or 1 <= self.k <= self.d_ff, 'k', f'1 … d_ff = {self.d_ff} for {kind}'
        yield has.topk or self.k == 0, 'k', f'0: {kind} has no top-k'
        yield not has.predictor or self.r >= 1, 'r', f'at least 1: {kind} has a predictor'
        yield has.predictor or self.r == 0, 'r', f'0: {kind} has no predictor'
        yield (self.any_k and self.shrink) or not self.huber, 'huber', "0: only topk 'statistical' with shrink is smoothed"
        yield has.topk or self.topk == 'statistical', 'topk', f"'statistical', the default: {kind} has no top-k"
        yield has.topk or self.shrink, 'shrink', f'True, the default: {kind} has no top-k'
        yield self.topk == 'approx' or self.recall == 0.95, 'recall', "0.95, the default: only topk 'approx' has a recall"
        yield FFN_KINDS[self.kind].gated or not self.gate, 'gate', f"'', the default: {kind} has no σ2"
        yield self.ddof < 0 or (has.topk and self.topk == 'statistical'), 'ddof', '-1, the default: it is of topk statistical'
        n = self.groups
        yield n == 1 or has.topk, 'groups', f'1, the default: {kind} has no top-k'
        yield self.d_ff % n == 0, 'groups', f'a divisor of d_ff = {self.d_ff}'
        yield n == 1 or self.k >= n, 'k', f'at least groups = {n}'
        yield self.any_k or self.k % n == 0, 'k', f'a multiple of groups = {n} for topk {self.topk!r}'
        yield self.any_k or not self.k_schedule, 'k_schedule', "'': only a statistical top-k takes another k at each step"
        parsed = by_layer.schedule(self.k_schedule, self.k, self.d_ff) if self.k_schedule else None
        want = f"'START:STEPS' or 'START:STEPS linear:STEPS' (or cosine), where START is {self.k} … {self.d_ff} or all; {AT_MOST}"
        yield parsed or not self.k_schedule, 'k_schedule', want


class AttentionConfig(Section):
    """A lookup in a table of tokens; docs/levers.md has the equations."""

    kind: Literal[*ATTENTION_KINDS] = 'dense'
    n_heads: int = Field(gt=0)
    n_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    k: int = Field(0, ge=0)  # keys kept per query, approximately; 0 for kinds without top-k
    k_schedule: str = ''  # as of the FFN; it falls from a number of keys: '256:100 linear:300'
    r: int = Field(0, ge=0)  # predictor rank: a head's first r dimensions score the keys; 0 for kinds without a predictor
    gate: Literal['', 'identity', 'softplus', 'sigmoid'] = ''  # σ2; '': the kind's
    ddof: int = Field(-1, ge=-1, le=1)  # the variance is a sum of squares over n − ddof; −1: the kind's
    qk_norm: bool = False  # queries and keys are normalised over a head, each with a learned scale, before rotary embedding
    window: int = Field(0, ge=0)  # keys that a query of a local layer sees, its own included; 0 if no layer is local
    logit_cap: float = Field(0.0, ge=0)  # soft-cap of the softmax's logits; 0: none
    cap_first: bool = False  # the threshold is one of soft-capped scores; else the soft-cap comes after the top-k
    rope_base: float = Field(10_000.0, gt=0)
    # full: all scores at once. blockwise: in linear memory, by XLA. pallas: in linear memory, by kernels for TPUs, which a CPU
    # interprets slowly, or by kernels for GPUs that nobody has timed. sparse: surviving keys only, by CPU kernels. auto: full
    # up to one block of tokens; above that, and where CPU kernels are faster, the fastest for the platform.
    impl: Literal['auto', 'full', 'blockwise', 'pallas', 'sparse'] = 'auto'
    block: int = Field(512, gt=0)  # tokens per block of blockwise and pallas; on TPU a multiple of 128
    query_dim: float = Field(0.0, ge=0)  # queries are scaled by 1/sqrt(this); 0: head_dim
    documents: Literal['apart', 'joined'] = 'apart'  # in a row: a token sees only its own document, or all tokens before it

    # The same in all layers.
    COMMON: ClassVar = (
        *('n_heads', 'n_kv_heads', 'head_dim', 'window', 'logit_cap', 'rope_base', 'query_dim'),
        *('impl', 'block', 'documents'),
    )

    @property
    def traits(self) -> Kind:
        """What this kind computes."""
        return ATTENTION_KINDS[self.kind].but(self.gate, self.ddof, self.cap_first)

    @property
    def any_k(self) -> bool:
        """May k be known at run time only?"""
        return self.traits.topk

    @property
    def unread(self) -> set[str]:
        """The fields that this kind does not read."""
        has = ATTENTION_KINDS[self.kind]
        read = dict.fromkeys(('k', 'k_schedule', 'ddof', 'cap_first'), has.topk) | {'r': has.predictor, 'gate': has.gated}
        return {name for name in read if not read[name]}

    def _rules(self):
        kind, has, d = f'kind {self.kind!r}', self.traits, self.head_dim
        yield self.n_heads % self.n_kv_heads == 0, 'n_kv_heads', f'a divisor of n_heads = {self.n_heads}'
        yield d % 2 == 0, 'head_dim', 'an even number (rotary pairs)'
        yield not has.topk or self.k >= 1, 'k', f'at least 1 for {kind}'
        yield has.topk or self.k == 0, 'k', f'0: {kind} has no top-k'
        yield has.topk or not self.k_schedule, 'k_schedule', f"'': {kind} has no top-k"
        parsed = not self.k_schedule or by_layer.schedule(self.k_schedule, self.k, by_layer.ALL_KEYS)
        want = f"'all:STEPS', 'KEYS:STEPS' or 'KEYS:STEPS linear:STEPS' (or cosine) from at least k = {self.k} KEYS; {AT_MOST}"
        yield parsed, 'k_schedule', want
        even = f'an even number in 2 … head_dim − 2 = {d - 2} for {kind} (rotary pairs)'
        yield not has.predictor or (0 < self.r < d and self.r % 2 == 0), 'r', even
        yield has.predictor or self.r == 0, 'r', f'0: {kind} has no predictor'
        yield ATTENTION_KINDS[self.kind].gated or not self.gate, 'gate', f"'', the default: {kind} has no σ2"
        yield has.topk or self.ddof < 0, 'ddof', f'-1, the default: {kind} has no top-k'
        capped = has.topk and self.logit_cap > 0
        yield capped or not self.cap_first, 'cap_first', 'False, the default: there is no top-k, or logit_cap is 0'
        yield self.impl != 'pallas' or self.block % 128 == 0, 'block', "a multiple of 128 for impl 'pallas'"


class ModelConfig(Section):
    """A decoder with Gemma-2's block."""

    vocab_size: int = Field(0, ge=0)  # 0: the tokenizer's
    d_model: int = Field(gt=0)
    n_layers: int = Field(gt=0)
    pattern: tuple[Literal['local', 'global'], ...] = ('local', 'global')  # of the layers, repeated n_layers / len(pattern) times
    ffn: FFNConfig
    attention: AttentionConfig
    layers: str = ''  # what differs by layer: '0-9:ffn.k=5% 10-:ffn.k=all local:attention.kind=dense'; see docs/levers.md
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

    @property
    def per_layer(self) -> tuple['ModelConfig', ...]:
        """For each layer the config whose `ffn` and `attention` are its own, as if all layers were like it."""
        return by_layer.per_layer(self)

    def _rules(self):
        f, pattern, local, window = self.ffn, self.pattern, 'local' in self.pattern, self.attention.window
        yield f.r < self.d_model, 'ffn.r', f'1 … d_model − 1 = {self.d_model - 1} for kind {f.kind!r}'
        yield len(pattern) > 0, 'pattern', "at least one of 'local', 'global'"
        yield self.n_layers % len(pattern) == 0, 'n_layers', f'a multiple of len(model.pattern) = {len(pattern)}'
        yield not local or window >= 1, 'attention.window', 'at least 1: model.pattern has local layers'
        yield local or window == 0, 'attention.window', '0: model.pattern has no local layer'
        r = max(layer.ffn.r for layer in self.per_layer)
        yield r < self.d_model, 'layers', f'ffn.r of at most d_model − 1 = {self.d_model - 1}'


class DataConfig(Section):
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


class MeshConfig(Section):
    """Devices along each mesh axis; the product is the number of devices."""

    data: int = Field(-1, ge=-1)  # model replicas; -1: all devices that the other axes leave
    fsdp: int = Field(1, gt=0)  # splits parameters, optimizer state and the rows of a batch
    context: int = Field(1, gt=0)  # splits parameters, optimizer state and the tokens of a row; keys and values are all-gathered
    model: int = Field(1, gt=0)  # splits heads, neurons and vocabulary
    slices: int = Field(1, gt=0)  # groups of devices with a fast network inside; `data` is split over them

    def _rules(self):
        yield self.data != 0, 'data', 'at least 1, or -1 for all the devices that are left'


class TrainConfig(Section):
    """The loop."""

    steps: int = Field(gt=0)
    accumulate: int = Field(1, gt=0)  # microbatches per step, whose gradients are summed
    loss_pieces: int = Field(1, gt=0)  # parts of the vocabulary; the loss computes logits for one part at a time
    log_every: int = Field(10, gt=0)
    eval_every: int = Field(0, ge=0)  # steps between evaluations; 0: only at the end
    eval_batches: int = Field(0, ge=0)  # batches of an evaluation while training; 0: the whole validation split
    evals: tuple[str, ...] = ()  # more evaluations, each 'NAME field=value …'; config/evals.py has the fields
    final_eval: int = Field(0, ge=0)  # batches of each of the two evaluations at the end; 0: the whole splits
    save_every: int = Field(100, ge=0)  # steps between checkpoints; the last step is always saved; 0: by time only
    save_every_minutes: float = Field(0.0, ge=0)  # also save when this time has passed since the last save; 0: no
    keep: int = Field(2, gt=0)  # number of newest checkpoints to keep
    keep_every: int = Field(0, ge=0)  # also keep the checkpoints at multiples of this step; 0: none
    keep_every_minutes: float = Field(0.0, ge=0)  # also keep a checkpoint for each such time; 0: none
    stop_at: int = Field(0, ge=0)  # end at this step, evaluated and saved, to go on later: sweeps compare runs there; 0: never
    max_skips: int = Field(0, ge=0)  # updates with a loss or gradient that is not finite, skipped in a row; one more ends the run
    spike: float = Field(0.0, ge=0)  # also skip an update whose gradient norm exceeds the running mean by this factor; 0: never
    # The watchdog ends a run that makes no progress for this long, and prints all stacks. Compiling, evaluating, saving and
    # restoring may take ten times as long, and a step 20 times its usual duration. 0: no watchdog.
    stall_seconds: float = Field(300.0, ge=0)
    restore_from: str = ''  # a run directory, or its checkpoints/STEP, whose parameters to start from; all else starts anew
    branch_from: str = ''  # the same, to go on from, with its optimizer, step and place in the data
    # Distillation: the loss is (1 − kd_weight) · cross-entropy + kd_weight · T² · KL(teacher ‖ model), at a temperature T.
    teacher: str = ''  # a run directory, or its checkpoints/STEP, whose next-token distributions to learn from; empty: none
    kd_weight: float = Field(0.5, ge=0, le=1)  # 0: as if there were no teacher, bit by bit
    kd_temperature: float = Field(1.0, gt=0)
    kd_top: int = Field(0, ge=0)  # likeliest tokens of the teacher that it is restricted to; 0: all, which costs less
    trackers: tuple[Literal['wandb', 'mlflow'], ...] = ()  # what metrics go to beside metrics.jsonl and TensorBoard
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
        yield not (problem := evals.problem(self.evals)), 'evals', problem
        for field in ('kd_weight', 'kd_temperature', 'kd_top'):
            default = type(self).model_fields[field].default
            yield self.teacher or getattr(self, field) == default, field, f'{default!r}, the default: there is no train.teacher'


class SampleConfig(Section):
    """The continuation shown when training ends."""

    prompt: str = ''
    tokens: int = Field(64, ge=0)  # 0: no sample
    temperature: float = Field(0.8, ge=0)  # 0: greedy


class ServeConfig(Section):
    """How scripts/generate.py runs the trained model."""

    # cpu, tpu, gpu: kernels for that platform. gather: plain JAX that reads active entries only. masked: plain JAX that
    # computes every entry. auto: the fastest that is available.
    kernels: Literal['auto', 'cpu', 'tpu', 'gpu', 'gather', 'masked'] = 'auto'
    capacity: float = Field(1.5, gt=0)  # of gather, tpu and gpu: they have room for capacity × k active entries per token
    overflow: Literal['masked', 'drop'] = 'masked'  # a token with more is computed in full, or loses the excess; it is reported


class ExperimentConfig(Section):
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
        scheduled = self.model.ffn.k_schedule or self.model.attention.k_schedule
        lookups = any(entry.statistics or entry.tasks for entry in evals.eval_entries(t.evals))
        want = 'no statistics or tasks: k follows a schedule; scripts/evaluate.py takes the k of a checkpoint'
        yield not (scheduled and lookups), 'train.evals', want
        for half, most in (('ffn', self.model.ffn.d_ff), ('attention', by_layer.ALL_KEYS)):
            lookup = getattr(self.model, half)
            end = by_layer.schedule(lookup.k_schedule, lookup.k, most).end if lookup.k_schedule else 0
            yield end <= t.steps, f'model.{half}.k_schedule', f'an end by train.steps = {t.steps}; it ends at step {end}'
        o = self.optimizer
        yield o.warmup_steps < t.steps, 'optimizer.warmup_steps', f'less than train.steps = {t.steps}'
        most = t.steps - o.warmup_steps
        yield o.decay_steps <= most, 'optimizer.decay_steps', f'at most train.steps − optimizer.warmup_steps = {most}'
        share = o.shape != 'wsd' or o.decay_steps or o.decay_share * t.steps <= most
        want = f'at most {most / t.steps:.4g}, since {o.warmup_steps} of {t.steps} steps are warm-up'
        yield share, 'optimizer.decay_share', want
