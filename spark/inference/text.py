"""Continues prompts as text: stop strings, streaming, and how fast the model was."""

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from spark.inference.decoder import Stream
from spark.inference.load import Served
from spark.inference.model import bytes_per_step, computed_by
from spark.inference.sampling import GREEDY, Sampling
from spark.progress import tqdm


def continue_prompts(
    served: Served, prompts: Sequence[str], n: int, sampling: Sampling = GREEDY, *, seed: int = 0, chunk: int = 64,
    stop: Sequence[str] = (), emit: Callable[[str], object] | None = None,
) -> dict:  # fmt: skip
    """Continues prompts side by side, each until EOS, a stop string or n tokens; prefill takes `chunk` tokens per step.

    `emit` receives the first prompt and its continuation piece by piece, as soon as no later token can change the piece; without
    it there are progress bars. Returns, for JSON, 'texts', speeds, and the mean activity of the lookups per token and layer in
    the steps of decoding; a single token takes none.
    """
    serving, tokenizer = served.serving, served.tokenizer
    ids = [ids.tolist() for ids in tokenizer.start(prompts)]
    with jax.set_mesh(served.mesh):
        stream = Stream(serving, served.weights, ids, n, chunk)
        stream.warm_up(sampling)  # so that nothing compiles while the clock runs
        start = time.perf_counter()
        with tqdm(total=stream.length, desc='prompts', unit='token', leave=False, disable=emit is not None) as bar:
            stream.prefill(lambda: bar.update(chunk))
        prefill_seconds, start = time.perf_counter() - start, time.perf_counter()
        if emit:
            emit(prompts[0])
        steps = stream.decode(jax.random.key(seed), sampling, [tokenizer.eos])
        rows, emitted, counts = _decode(stream, steps, tokenizer, len(ids), n, stop, emit)
        seconds = time.perf_counter() - start
    texts = [cut(tokenizer.decode(row), stop)[0] for row in rows]
    if emit:
        emit(texts[0][len(emitted) :])
    prompt_tokens, new_tokens, n_steps = sum(map(len, ids)), sum(map(len, rows)), len(counts)
    # The step after a token is dispatched before the token is known, so there is one where EOS came at once, too. The n-th token
    # has none; what `counts` has for it is of the step before, or of the prompts.
    counts = jax.device_get((counts or [stream.counts])[: n - 1])
    activity = {name: float(np.mean([np.mean(c[name]) for c in counts])) for name in counts[0]} if counts else {}
    read = bytes_per_step(serving, served.weights, stream.cache, activity) if counts else 0.0
    return {
        'step': served.step, 'dtype': serving.dtype, 'kernels': serving.kernels,
        'attention_kernels': computed_by(serving, 'attention'), 'ffn_kernels': computed_by(serving, 'ffn'),
        'prompts': len(ids), 'prompt_tokens': prompt_tokens, 'new_tokens': new_tokens,
        'prefill_tokens_per_second': prompt_tokens / prefill_seconds, 'decode_tokens_per_second': new_tokens / seconds,
        'decode_ms_per_step': 1e3 * seconds / max(n_steps, 1), 'gb_per_step': read / 1e9,
        'gb_per_second': read * min(n_steps, n - 1) / seconds / 1e9, **activity, 'texts': texts,
    }  # fmt: skip


def _decode(stream, steps, tokenizer, n_prompts, n, stop, emit):
    """(new ids of each prompt, what was emitted of the first, counts of each step)."""
    rows, emitted, counts = [[] for _ in range(n_prompts)], '', []
    with tqdm(total=n, desc='tokens', unit='token', leave=False, disable=emit is not None) as bar:
        for tokens in steps:
            counts.append(stream.counts)  # still on the device
            for row, token in zip(rows, tokens, strict=True):
                if token >= 0:
                    row.append(int(token))
            bar.update()
            if emit:
                text, stopped = cut(tokenizer.decode(rows[0]), stop)
                certain = text if stopped else without_open_end(text, stop)
                if certain.startswith(emitted):
                    emit(certain[len(emitted) :])
                    emitted = certain
            if stop and all(cut(tokenizer.decode(row), stop)[1] for row in rows):
                break
    return rows, emitted, counts


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there is one."""
    ends = [text.find(s) for s in stop if s and s in text]
    return (text[: min(ends)], True) if ends else (text, False)


def without_open_end(text: str, stop: Sequence[str]) -> str:
    """The text without an end that may be the beginning of a stop string, or of a character that takes several tokens."""
    text = text.rstrip('\ufffd')
    longest = max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[: len(text) - longest]
