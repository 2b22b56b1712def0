"""Generate text from a checkpoint of any run, dense or Spark.

    python scripts/generate.py --workdir=DIR --prompt=TEXT [--prompt=TEXT …] [--prompts=FILE] [--n=128] [--stream]
        [--temperature=0.8] [--top_k=K] [--top_p=P] [--min_p=P] [--stop=TEXT …] [--step=N] [--dtype=float32|bfloat16|int8]
        [--kernels=auto|cpu|tpu|gpu|gather|masked] [--capacity=1.5] [--overflow=masked|drop] [--json=FILE]

Prints the continuations, what their lookups did, and the speed: tokens per second of the prompts and of what follows, and the
rate at which decoding read weights and cache, counting of a lookup's table what was active. Exit codes: 0 done, 2 bad usage, 5 no
such checkpoint.
"""

import time

from absl import flags

from spark import errors
from spark.runtime import run_directory, use_huge_pages, write_json

WORKDIR = flags.DEFINE_string('workdir', None, 'The run directory, or gs://….')
STEP = flags.DEFINE_integer('step', None, 'Which checkpoint; default the newest.', lower_bound=0)
PROMPT = flags.DEFINE_multi_string('prompt', [], 'What to continue; several go side by side.')
PROMPTS = flags.DEFINE_string('prompts', None, 'A file with a prompt per line; \\n and \\t in it are line ends and tabs.')
N = flags.DEFINE_integer('n', 128, 'Tokens at most.', lower_bound=1)
TEMPERATURE = flags.DEFINE_float('temperature', 0.8, '0: the likeliest token.', lower_bound=0)
TOP_K = flags.DEFINE_integer('top_k', 0, 'Draw among the k likeliest tokens; 0: all.', lower_bound=0)
TOP_P = flags.DEFINE_float('top_p', 1.0, 'Draw among the likeliest that reach this probability; 1: all.', 0, 1)
MIN_P = flags.DEFINE_float('min_p', 0.0, 'Draw among those at least so many times as likely as the likeliest; 0: all.', 0, 1)
STOP = flags.DEFINE_multi_string('stop', [], 'End a continuation before this text.')
SEED = flags.DEFINE_integer('seed', 0, 'Of the draws.', lower_bound=0)
STREAM = flags.DEFINE_bool('stream', False, 'Print as it comes; of one prompt.')
CHUNK = flags.DEFINE_integer('chunk', 64, 'Tokens of the prompts that go in at a time.', lower_bound=1)
DTYPE = flags.DEFINE_enum(
    'dtype', 'auto', ['auto', 'float32', 'bfloat16', 'int8'], 'Of the weights; auto: float32 on CPUs, else bfloat16.'
)
KERNELS = flags.DEFINE_enum(
    'kernels', None, ['auto', 'cpu', 'tpu', 'gpu', 'gather', 'masked'], "What computes lookups; default the run's serve.kernels."
)
CAPACITY = flags.DEFINE_float(
    'capacity', None, "Room for so many times k neurons or keys, but on CPUs; default the run's serve.capacity.", lower_bound=1e-3
)
OVERFLOW = flags.DEFINE_enum(
    'overflow', None, ['masked', 'drop'], "A token that needs more is computed in full, or loses the rest; default the run's."
)
JSON = flags.DEFINE_string('json', None, 'Also write texts and speeds to this file.')


def main():
    if not WORKDIR.value:
        raise errors.ConfigError('--workdir is missing; see --help')
    prompts = [*PROMPT.value, *(lines(PROMPTS.value) if PROMPTS.value else [])]
    if not prompts:
        raise errors.ConfigError('--prompt or --prompts is missing; see --help')
    if STREAM.value and len(prompts) > 1:
        raise errors.ConfigError(f'--stream: of one prompt, here are {len(prompts)}')
    # Imported here, so that usage errors are told before jax starts.
    import jax
    import numpy as np
    from tqdm import tqdm

    from spark.inference.decoder import Stream
    from spark.inference.model import bytes_per_step
    from spark.inference.sampling import Sampling

    run = load()
    serving, weights, tokenizer = run.serving, run.weights, run.tokenizer
    ids = [[tokenizer.bos, *map(int, tokenizer.encode(prompt))] for prompt in prompts]
    how = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value)

    with jax.set_mesh(run.mesh):
        stream = Stream(serving, weights, ids, N.value, CHUNK.value)
        stream.warm_up(how)  # so that what is timed compiles nothing
        clock = time.perf_counter()
        bar = tqdm(total=stream.length, desc='prompts', unit='token', leave=False, disable=STREAM.value)
        stream.prefill(lambda: bar.update(CHUNK.value))
        bar.close()
        prefill, clock = time.perf_counter() - clock, time.perf_counter()
        if STREAM.value:
            print(prompts[0], end='', flush=True)
        rows, said, counts = follow(stream, stream.decode(jax.random.key(SEED.value), how, [tokenizer.eos]), tokenizer, len(ids))
        decode, steps = time.perf_counter() - clock, len(counts)
    texts = [cut(tokenizer.decode(row), STOP.value)[0] for row in rows]
    if STREAM.value:
        print(texts[0][len(said) :])
    else:
        print(*(prompt + text for prompt, text in zip(prompts, texts, strict=True)), sep='\n\n')
    counts = jax.device_get(counts or [stream.counts])  # of the prompts, if a stop was all that came
    did = {name: float(np.mean([np.mean(c[name]) for c in counts])) for name in counts[0]}
    read = bytes_per_step(serving, weights, stream.cache, did, len(ids))
    report = {
        'step': run.step, 'dtype': serving.dtype, 'kernels': serving.kernels, 'prompts': len(ids),
        'prefill_tokens_per_second': sum(map(len, ids)) / prefill, 'decode_tokens_per_second': sum(map(len, rows)) / decode,
        'decode_ms_per_step': 1e3 * decode / max(steps, 1), 'gb_per_step': read / 1e9,
        'gb_per_second': read * min(steps, N.value - 1) / decode / 1e9, **did,
    }  # fmt: skip
    print(
        f'\n{sum(map(len, ids))} tokens of prompts at {report["prefill_tokens_per_second"]:,.0f} per second, '
        f'{sum(map(len, rows))} more at {report["decode_tokens_per_second"]:,.0f} per second; '
        f'{report["decode_ms_per_step"]:.1f} ms a step; '
        f'{serving.dtype}, kernels {serving.kernels}, {read / 1e9:.3f} GB a step at {report["gb_per_second"]:.1f} GB/s'
    )
    what = {'active': 'neurons active', 'attended': 'keys attended', 'overflow': 'overflows of the capacity'}
    print(', '.join(f'{did[name]:,.1f} {text}' for name, text in what.items() if did.get(name)) + ' per token and layer')
    if JSON.value:
        write_json(JSON.value, report | {'texts': texts})


def load():
    """The model of --workdir, laid out to serve."""
    from tqdm import tqdm

    from spark.inference.load import load as load_run
    from spark.kernels import cpu

    chosen = {'kernels': KERNELS.value, 'capacity': CAPACITY.value, 'overflow': OVERFLOW.value}
    serve = {name: value for name, value in chosen.items() if value is not None}
    with tqdm(desc='weights', unit='', unit_scale=True, leave=False) as bar:

        def tick(n, total):
            bar.total = total
            bar.update(n)

        run = load_run(run_directory(WORKDIR.value), STEP.value, DTYPE.value, serve, tick)
    if run.serving.platform == 'cpu' and not cpu.available():
        print('The CPU kernels were not built, for want of a C++ compiler; XLA does their work, more slowly.')
    return run


def follow(stream, steps, tokenizer, n_prompts):
    """(ids of each prompt's continuation, what --stream has printed, counts of each step) of the steps of a stream."""
    from tqdm import tqdm

    rows, said, counts = [[] for _ in range(n_prompts)], '', []
    bar = tqdm(total=N.value, desc='tokens', unit='token', leave=False, disable=STREAM.value)
    for tokens in steps:
        counts.append(stream.counts)  # on the device
        for row, token in zip(rows, tokens, strict=True):
            if token >= 0:
                row.append(int(token))
        bar.update()
        if STREAM.value:
            # A character may need several tokens, so what ends in half of one waits.
            text, ended = cut(tokenizer.decode(rows[0]), STOP.value)
            whole = text if ended else held_back(text, STOP.value)
            if whole.startswith(said):
                print(whole[len(said) :], end='', flush=True)
                said = whole
        if STOP.value and all(cut(tokenizer.decode(row), STOP.value)[1] for row in rows):
            break
    bar.close()
    return rows, said, counts


def lines(path):
    """The prompts of a file."""
    try:
        with open(path, encoding='utf-8') as f:
            found = [line.rstrip('\n').replace('\\n', '\n').replace('\\t', '\t') for line in f]
    except (OSError, UnicodeDecodeError) as e:
        raise errors.ConfigError(f'--prompts={path}: {getattr(e, "strerror", None) or e}') from None
    return [line for line in found if line]


def cut(text, stops):
    """(the text before the first of `stops`, whether there is one)."""
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return (text[: min(ends)], True) if ends else (text, False)


def held_back(text, stops):
    """The text without an end that may be the beginning of a stop or of a character."""
    text = text.rstrip('�')
    longest = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - longest]


if __name__ == '__main__':
    use_huge_pages()
    errors.run(main)
