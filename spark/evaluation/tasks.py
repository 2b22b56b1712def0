"""lm-evaluation-harness on our models: its tasks, our tokens, in batches of fixed shapes."""

import functools
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from tqdm import tqdm

from spark.config import nearest
from spark.errors import ConfigError, DataError
from spark.inference.decoder import generate
from spark.inference.layout import from_params, serving_for
from spark.inference.sampling import Sampling
from spark.training.loss import cross_entropy

SHORTEST = 32  # lengths are padded to a power of two, so that few shapes are compiled


class HarnessModel(TemplateLM):
    """An `evaluate.Model` as the harness sees one.

    Every text starts with BOS, as in training; an empty context is BOS alone. Contexts are never cut: rotary embedding has no
    limit, and a longer batch holds fewer rows.
    """

    def __init__(self, model):
        super().__init__()
        self._model, trainer = model, model.trainer

        @jax.jit
        def score(params, batch):
            """Per token: its log-likelihood, and whether it is the likeliest."""
            hidden = trainer.model.apply(params, batch['tokens'], batch['positions'], batch['segments'])
            nll, _, greedy = cross_entropy(trainer.model, params, hidden, batch['targets'], trainer.cfg.train.loss_pieces)
            return -nll, greedy

        self._score = score

    @functools.cached_property
    def _served(self):
        """(how it is run, weights for generation), in what it was trained in."""
        trainer = self._model.trainer
        dtype, mesh = trainer.model.dtype, trainer.mesh
        serving = serving_for(trainer.cfg.model, np.dtype(dtype).name, mesh.devices.flat[0].platform, mesh.size)
        with trainer.context():
            return serving, jax.jit(lambda params: from_params(serving, params))(self._model.params)

    @property
    def eot_token_id(self):
        return self._model.tokenizer.eos

    @property
    def prefix_token_id(self):
        return self._model.tokenizer.bos

    @property
    def tokenizer_name(self):
        return self._model.cfg.data.tokenizer

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        del add_special_tokens, kwargs  # BOS comes with the row
        return [int(i) for i in self._model.tokenizer.encode(string)]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Log-likelihood of whole texts, cut into rows of data.seq_len as training and evaluation cut a document."""
        length = self._model.cfg.data.seq_len
        rows, owner = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            inputs = [self.prefix_token_id, *ids]
            for start in range(0, len(ids), length):
                targets = ids[start : start + length]
                rows.append((inputs[start : start + len(targets)], targets, len(targets)))
                owner.append(i)
        totals = np.zeros(len(requests))
        for i, (value, _) in zip(owner, self._scores(rows, disable_tqdm), strict=True):
            totals[i] += value
        return [float(x) for x in totals]

    def generate_until(self, requests, disable_tqdm=False):
        """Continuations, each cut before its first stop string or EOS."""
        options = [_generation(request.args[1]) for request in requests]
        prompts = [self._with_bos(self.tok_encode(request.args[0])) for request in requests]
        # Those that share a compiled program, the longest first.
        order = sorted(range(len(requests)), key=lambda i: (options[i][1:], -len(prompts[i])))
        texts = [''] * len(requests)
        bar = tqdm(total=len(requests), desc='generating', disable=disable_tqdm)
        while order:
            _, n, temperature = options[order[0]]
            L = _bucket(len(prompts[order[0]]))
            rows = self._rows(L + n)
            taken = [i for i in order[:rows] if options[i][1:] == (n, temperature)]
            order = order[len(taken) :]
            batch = np.full((rows, L), self.prefix_token_id, np.int32)
            lengths = np.ones(rows, np.int32)
            for row, i in enumerate(taken):
                batch[row, L - len(prompts[i]) :] = prompts[i]
                lengths[row] = len(prompts[i])
            model = self._model
            with model.trainer.context():
                new = generate(*self._served, jnp.asarray(batch), jax.random.key(model.cfg.seed),
                               n=n, sampling=Sampling(temperature), lengths_B=jnp.asarray(lengths))  # fmt: skip
            for i, ids in zip(taken, np.asarray(new), strict=False):
                ids = [int(t) for t in ids]
                ids = ids[: ids.index(self.eot_token_id)] if self.eot_token_id in ids else ids
                text = model.tokenizer.decode(ids)
                ends = [text.find(stop) for stop in options[i][0] if stop and stop in text]
                texts[i] = text[: min(ends)] if ends else text
            bar.update(len(taken))
        bar.close()
        return texts

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        del kwargs
        rows = []
        for _, context, continuation in requests:
            ids = self._with_bos([*context, *continuation])
            rows.append((ids[:-1], ids[1:], len(continuation)))
        return self._scores(rows, disable_tqdm)

    def _with_bos(self, ids):
        return ids if ids[:1] == [self.prefix_token_id] else [self.prefix_token_id, *ids]

    def _rows(self, length):
        """How many rows of a length hold about as many tokens as a training batch; a multiple of the devices."""
        cfg, devices = self._model.cfg, self._model.trainer.mesh.size
        return max(1, cfg.data.batch_size * cfg.data.seq_len // (length * devices)) * devices

    def _scores(self, rows, disable_tqdm):
        """[(log-likelihood, all likeliest)] of the last n targets of each (inputs, targets, n)."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        found = [(0.0, True)] * len(rows)
        model, trainer = self._model, self._model.trainer
        bar = tqdm(total=len(rows), desc='scoring', disable=disable_tqdm)
        while order:
            L = _bucket(len(rows[order[0]][0]))
            taken, order = order[: self._rows(L)], order[self._rows(L) :]
            batch = {name: np.zeros((self._rows(L), L), np.int32) for name in ('tokens', 'targets', 'segments', 'positions')}
            batch['positions'] += np.arange(L, dtype=np.int32)
            for row, i in enumerate(taken):
                inputs, targets, _ = rows[i]
                for name, values in [('tokens', inputs), ('targets', targets), ('segments', 1)]:
                    batch[name][row, : len(inputs)] = values
            with trainer.context():
                value, greedy = jax.device_get(self._score(model.params, trainer.put(batch)))
            for row, i in enumerate(taken):
                end, n = len(rows[i][0]), rows[i][2]
                here = slice(end - n, end)
                found[i] = float(np.sum(value[row, here], dtype=np.float64)), bool(greedy[row, here].all())
            bar.update(len(taken))
        bar.close()
        return found


def load(names, path=None):
    """The harness's task manager, once it is certain that the data of all these tasks or groups can be read.

    Args:
      names: tasks or groups.
      path: a directory with task files (YAML) of one's own, which may name Python code to run.

    Raises:
      ConfigError: no such task. DataError: its data cannot be read or downloaded.
    """
    for library in ('lm_eval', 'datasets', 'huggingface_hub'):  # what they say of retries is not for the user
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if path is not None and not pathlib.Path(path).is_dir():
        raise ConfigError(f'--task_path={path}: no such directory')
    try:
        manager = TaskManager(include_path=path)
    except Exception as e:
        raise DataError(f'--task_path={path}: {type(e).__name__}: {e}') from e
    for name in names:
        if name not in manager.all_tasks:
            raise ConfigError(f'--tasks: no task {name!r}{nearest(name, manager.all_tasks)}')
        try:
            manager.load(name)
        except Exception as e:  # whatever the data sets' libraries raise
            raise DataError(f'--tasks={name}: its data cannot be read or downloaded: {type(e).__name__}: {e}') from e
    return manager


def run(model, names, manager, *, limit=None, fewshot=None):
    """Results of harness tasks: {task: {metric: value}}, and the harness's own table.

    Args:
      model: an `evaluate.Model`.
      names: tasks or groups.
      manager: of `load`.
      limit: documents per task; None for all.
      fewshot: examples in the context; None for the task's own number.
    """
    results = simple_evaluate(
        HarnessModel(model), tasks=list(names), task_manager=manager, limit=limit, num_fewshot=fewshot, log_samples=False,
    )  # fmt: skip
    return results['results'], make_table(results)


@functools.cache
def _bucket(length):
    return max(SHORTEST, 1 << (length - 1).bit_length())


def _generation(options):
    """(stop strings, tokens, temperature) of a request's options."""
    options = dict(options)
    until = options.pop('until', None) or []
    n = options.pop('max_gen_toks', options.pop('max_new_tokens', 256))
    temperature = float(options.pop('temperature', 0.0) or 0.0)
    temperature = temperature if options.pop('do_sample', temperature > 0) else 0.0
    if options:
        raise ConfigError(f'generation option {next(iter(options))!r}: want until, max_gen_toks, temperature or do_sample')
    return tuple([until] if isinstance(until, str) else until), int(n), temperature
