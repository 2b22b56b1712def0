"""Runs the tasks of lm-evaluation-harness on a trained model, in batches of few shapes."""

import functools
import itertools
import logging
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from spark.config import nearest
from spark.errors import ConfigError, DataError, SparkError
from spark.evaluation import needles
from spark.evaluation.evaluate import Model
from spark.inference import decoder, layout, sampling, text
from spark.progress import tqdm
from spark.training.loss import cross_entropy

# Options of generation that are not built here, each with the value at which it does nothing; None: any, without beams.
NEUTRAL = {
    'num_beams': 1, 'num_beam_groups': 1, 'num_return_sequences': 1, 'n': 1, 'best_of': 1, 'typical_p': 1,
    'repetition_penalty': 1, 'no_repeat_ngram_size': 0,
    'min_length': 0, 'min_new_tokens': 0, 'presence_penalty': 0, 'frequency_penalty': 0,
    'length_penalty': None, 'early_stopping': None, 'use_cache': None,
}  # fmt: skip
KNOWN = ('until', 'max_gen_toks', 'max_new_tokens', 'max_tokens', 'do_sample', 'temperature', 'top_k', 'top_p', 'min_p', *NEUTRAL)
SHORTEST = 32  # lengths are padded to this or a larger power of two, so that few shapes are compiled


class HarnessModel(TemplateLM):
    """An `evaluate.Model` with the interface of the harness.

    Every text starts with BOS, as in training; an empty context is BOS alone. Contexts are never truncated: rotary embedding has
    no limit, and a longer batch holds fewer rows.
    """

    def __init__(self, model: Model, tick: Callable[[], None] = lambda: None):
        super().__init__()
        self._model, self._tick = model, tick  # which is called before each batch
        self._score = jax.jit(functools.partial(_score, model.trainer))

    def use(self, params: dict) -> None:
        """Goes on with other parameters of the same model."""
        self._model = self._model._replace(params=params)
        self.__dict__.pop('_served', None)

    @functools.cached_property
    def _served(self):
        """(Serving, weights) for generation, in the dtype of training."""
        trainer = self._model.trainer
        dtype, mesh = trainer.model.dtype, trainer.mesh
        serving = layout.serving_for(trainer.cfg.model, np.dtype(dtype).name, mesh.devices.flat[0].platform, mesh.size)
        with trainer.context():
            return serving, jax.jit(lambda params: layout.from_params(serving, params))(self._model.params)

    # What the harness asks for.
    @property
    def eot_token_id(self) -> int:
        return self._model.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        return self._model.tokenizer.bos

    @property
    def tokenizer_name(self) -> str:
        return self._model.cfg.data.tokenizer

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        del add_special_tokens, kwargs  # BOS is added to each row
        return [int(i) for i in self._model.tokenizer.encode(string)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, split into rows of data.seq_len as a document is in training and evaluation."""
        length = self._model.cfg.data.seq_len
        rows, owner = [], []
        for i, request in enumerate(requests):
            ids = [self.prefix_token_id, *self.tok_encode(request.args[0])]
            for start in range(0, len(ids) - 1, length):
                row = ids[start : start + length + 1]
                rows.append((row, len(row) - 1))
                owner.append(i)
        totals = np.zeros(len(requests))
        for i, (value, _) in zip(owner, self._scores(rows, disable_tqdm), strict=True):
            totals[i] += value
        return totals.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each cut before its first stop string or EOS."""
        options = [_generation_options(request.args[1]) for request in requests]
        prompts = [self._with_bos(self.tok_encode(request.args[0])) for request in requests]
        # Requests that can share a compiled program are neighbours; of those, the longest come first.
        order = sorted(range(len(requests)), key=lambda i: (options[i][1:], -len(prompts[i])))
        texts = [''] * len(requests)
        bar, keys = tqdm(total=len(requests), desc='generating', disable=disable_tqdm), itertools.count()
        while order:
            _, n, drawn = options[order[0]]
            L = _bucket(len(prompts[order[0]]))
            rows = self._rows(L + n)
            chosen = [i for i in order[:rows] if options[i][1:] == (n, drawn)]
            order = order[len(chosen) :]
            batch = np.full((rows, L), self.prefix_token_id, np.int32)
            lengths = np.ones(rows, np.int32)
            for row, i in enumerate(chosen):
                batch[row, L - len(prompts[i]) :] = prompts[i]
                lengths[row] = len(prompts[i])
            model = self._model
            self._tick()
            key = jax.random.fold_in(jax.random.key(model.cfg.seed), next(keys))  # each batch draws others
            with model.trainer.context():
                new = decoder.generate(*self._served, jnp.asarray(batch), key,
                                       n=n, sampling=drawn, lengths_B=jnp.asarray(lengths))  # fmt: skip
            for i, ids in zip(chosen, new.tolist(), strict=False):
                ids = ids[: ids.index(self.eot_token_id)] if self.eot_token_id in ids else ids
                texts[i], _ = text.cut(model.tokenizer.decode(ids), options[i][0])
            bar.update(len(chosen))
        bar.close()
        return texts

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        rows = [(self._with_bos([*context, *continuation]), len(continuation)) for _, context, continuation in requests]
        return self._scores(rows, disable_tqdm)

    def _with_bos(self, ids):
        return ids if ids[:1] == [self.prefix_token_id] else [self.prefix_token_id, *ids]

    def _rows(self, length):
        """How many rows of a length hold about as many tokens as a training batch; a multiple of the number of devices."""
        cfg, devices = self._model.cfg, self._model.trainer.mesh.size
        return max(1, cfg.data.batch_size * cfg.data.seq_len // (length * devices)) * devices

    def _scores(self, rows, disable_tqdm):
        """For each row (ids, n): the log-likelihood of its last n tokens, and whether all of them are the likeliest."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        scores = [(0.0, True)] * len(rows)
        model, trainer = self._model, self._model.trainer
        bar = tqdm(total=len(rows), desc='scoring', disable=disable_tqdm)
        while order:
            L = _bucket(len(rows[order[0]][0]) - 1)
            chosen, order = order[: self._rows(L)], order[self._rows(L) :]
            batch = {name: np.zeros((self._rows(L), L), np.int32) for name in ('tokens', 'targets', 'segments', 'positions')}
            batch['positions'] += np.arange(L, dtype=np.int32)
            for row, i in enumerate(chosen):
                ids, _ = rows[i]
                for name, values in [('tokens', ids[:-1]), ('targets', ids[1:]), ('segments', 1)]:
                    batch[name][row, : len(ids) - 1] = values
            self._tick()
            with trainer.context():
                value, greedy = jax.device_get(self._score(model.params, trainer.put(batch, self._rows(L))))
            for row, i in enumerate(chosen):
                ids, n = rows[i]
                scored = slice(len(ids) - 1 - n, len(ids) - 1)
                scores[i] = float(np.sum(value[row, scored], dtype=np.float64)), bool(greedy[row, scored].all())
            bar.update(len(chosen))
        bar.close()
        return scores


def load(
    names: Sequence[str], path: str | None = None, metadata: dict | None = None, ours: dict[str, dict] | None = None
) -> tuple[TaskManager, list]:
    """(the harness's task manager, these tasks or groups of tasks), with their data.

    `path` holds more task files, which may run code; `metadata` is what tasks that build their own data are told; `ours` are
    configs of tasks by name, such as those of `needles.tasks`. Raises a ConfigError if there is no such task or directory, and a
    DataError if a task or its data cannot be read.
    """
    for library in ('lm_eval', 'datasets', 'huggingface_hub'):  # they log every retry of a download
        logging.getLogger(library).setLevel(logging.CRITICAL)
    path, metadata, ours = path and os.path.expanduser(path), metadata or {}, ours or {}
    if path is not None and not os.path.isdir(path):
        raise ConfigError(f'--task_path={path}: no such directory')
    if set(names) <= ours.keys():
        needles.check(metadata)  # no other task reads it
    try:
        manager = TaskManager(include_path=path, metadata=metadata)
    except Exception as e:
        raise DataError(f'--task_path={path}: {type(e).__name__}: {e}') from e
    loaded = []
    for name in names:
        if name not in (known := [*ours, *manager.all_tasks]):
            raise ConfigError(f'--tasks: no task {name!r}{nearest(name, known)}')
        try:
            found = manager.load(ours.get(name, name))
        except SparkError:
            raise
        except Exception as e:  # the libraries for data sets raise exceptions of many kinds
            raise DataError(f'--tasks={name}: its data cannot be read or downloaded: {type(e).__name__}: {e}') from e
        loaded += [found['groups'][name]] if name in found['groups'] else found['tasks'].values()
    try:
        manager.load(loaded)
    except ValueError as e:
        raise ConfigError(f'--tasks={",".join(names)}: {e}') from None
    return manager, loaded


def run(model: Model | HarnessModel, loaded: tuple[TaskManager, list], **options) -> tuple[dict, str]:
    """{task: {metric: value}} of what `load` returns, and tables; `options` go to `simple_evaluate`, such as num_fewshot.

    A task whose documents have a length and a depth has its metrics for each of them in 'by_length_and_depth', too.
    """
    manager, asked = loaded
    adapter = model if isinstance(model, HarnessModel) else HarnessModel(model)
    found = simple_evaluate(adapter, tasks=asked, task_manager=manager, **options)
    results, tables = found['results'], [make_table(found)]
    for name, samples in found['samples'].items():
        if cells := needles.by_cell(samples):
            results[name]['by_length_and_depth'] = cells
            tables.append(needles.table(name, cells))
    return results, '\n\n'.join(tables)


def _score(trainer, params, batch):
    """The log-likelihood of each target, and whether it is the likeliest token."""
    hidden = trainer.model.apply(params, batch['tokens'], batch['positions'], batch['segments'])
    nll, _, greedy = cross_entropy(trainer.model, params, hidden, batch['targets'], trainer.cfg.train.loss_pieces)
    return -nll, greedy


def _bucket(length):
    """The length to which a row of this length is padded."""
    return max(SHORTEST, 1 << (length - 1).bit_length())


def _generation_options(options):
    """(stop strings, tokens, Sampling) of a request, as the harness and transformers understand its options."""
    options = {name: value for name, value in options.items() if value is not None}
    until = options.pop('until', ())
    tokens = [options.pop(name) for name in ('max_gen_toks', 'max_new_tokens', 'max_tokens') if name in options]
    temperature = options.pop('temperature', None)
    samples = options.pop('do_sample', bool(temperature))
    temperature = float(1.0 if temperature is None else temperature) if samples else 0.0
    if samples and temperature <= 0:
        raise ConfigError(f'generation option temperature = {temperature:g} with do_sample: want one above 0, or no do_sample')
    filters = {name: options.pop(name) for name in ('top_k', 'top_p', 'min_p') if name in options}
    filters |= {'top_k': max(filters.get('top_k', 0), 0)}  # vLLM's −1
    for name, value in options.items():
        if name not in NEUTRAL:
            want = 'until, max_gen_toks, do_sample, temperature, top_k, top_p or min_p'
            raise ConfigError(f'generation option {name!r}{nearest(name, KNOWN)}: want {want}')
        if value != NEUTRAL[name] and NEUTRAL[name] is not None:
            raise ConfigError(f'generation option {name} = {value!r}: want {NEUTRAL[name]}, which is to do without')
    drawn = sampling.Sampling(temperature, **filters) if samples else sampling.GREEDY  # which no filter changes
    return tuple([until] if isinstance(until, str) else until), int(tokens[0]) if tokens else 256, drawn
