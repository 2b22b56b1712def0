"""Generate text from a checkpoint of any run, dense or Spark.

    python scripts/generate.py --workdir=DIR --prompt=TEXT [--prompt=TEXT …] [--prompts=FILE] [--n=128] [--stream]
        [--temperature=0.8] [--top_k=K] [--top_p=P] [--min_p=P] [--stop=TEXT …] [--step=N] [--ema] [--dtype=float32|bfloat16|int8]
        [--kernels=auto|cpu|tpu|gpu|gather|masked] [--capacity=1.5] [--overflow=masked|drop] [--json=FILE]

Prints the continuations, the activity of the lookups, and the speed: tokens per second of prefill and decoding, and the rate at
which decoding read the cache and the weights (of a sparse lookup, the active entries).
Exit codes: 0 done, 2 bad usage, 5 no such checkpoint.
"""

import sys

from absl import flags

from spark import errors
from spark.runtime import path_of, run_directory, use_huge_pages, write_json

WORKDIR = flags.DEFINE_string('workdir', None, 'The run directory, or gs://….')
STEP = flags.DEFINE_integer('step', None, 'The step of the checkpoint; default the newest.', lower_bound=0)
EMA = flags.DEFINE_bool('ema', False, 'With the mean of the parameters, which optimizer.ema keeps.')
PROMPT = flags.DEFINE_multi_string('prompt', [], 'The text to continue; give it several times to continue texts side by side.')
PROMPTS = flags.DEFINE_string('prompts', None, 'A file with a prompt per line, in which \\n and \\t are line ends and tabs.')
N = flags.DEFINE_integer('n', 128, 'Tokens at most.', lower_bound=1)
TEMPERATURE = flags.DEFINE_float('temperature', 0.8, '0: always the likeliest token.', lower_bound=0)
TOP_K = flags.DEFINE_integer('top_k', 0, 'Draw from the k likeliest tokens; 0: from all.', lower_bound=0)
TOP_P = flags.DEFINE_float('top_p', 1.0, 'Draw from the likeliest tokens that together reach this probability; 1: all.', 0, 1)
MIN_P = flags.DEFINE_float('min_p', 0.0, 'Draw from tokens at least this many times as likely as the likeliest; 0: all.', 0, 1)
STOP = flags.DEFINE_multi_string('stop', [], 'End a continuation before this text.')
SEED = flags.DEFINE_integer('seed', 0, 'The seed of the draws.', lower_bound=0)
STREAM = flags.DEFINE_bool('stream', False, 'Print the text as it is generated; for a single prompt.')
CHUNK = flags.DEFINE_integer('chunk', 64, 'Tokens of the prompts per step of prefill.', lower_bound=1)
DTYPE = flags.DEFINE_enum('dtype', 'auto', ['auto', 'float32', 'bfloat16', 'int8'],
                          'Of the weights; auto: float32 on CPUs, else bfloat16.')  # fmt: skip
KERNELS = flags.DEFINE_enum('kernels', None, ['auto', 'cpu', 'tpu', 'gpu', 'gather', 'masked'],
                            "What computes lookups; default the run's serve.kernels.")  # fmt: skip
CAPACITY = flags.DEFINE_float('capacity', None, "Room for so many times k entries (not on CPUs); default the run's.", 1e-3)
OVERFLOW = flags.DEFINE_enum('overflow', None, ['masked', 'drop'],
                             "A token that needs more is computed in full, or loses the rest; default the run's.")  # fmt: skip
JSON = flags.DEFINE_string('json', None, 'Also write texts and speeds to this file.')


def main() -> None:
    prompts = [*PROMPT.value, *(lines(PROMPTS.value) if PROMPTS.value else [])]
    if not prompts:
        raise errors.ConfigError('--prompt or --prompts is missing; see --help')
    if STREAM.value and len(prompts) > 1:
        raise errors.ConfigError(f'--stream: want one prompt, not {len(prompts)}')
    # Imported late, so that usage errors come before jax starts.
    from spark.inference.load import load
    from spark.inference.sampling import Sampling
    from spark.inference.text import continue_prompts
    from spark.kernels import cpu

    changes = {'kernels': KERNELS.value, 'capacity': CAPACITY.value, 'overflow': OVERFLOW.value}
    serve = {name: value for name, value in changes.items() if value is not None}
    served = load(run_directory(WORKDIR.value), STEP.value, DTYPE.value, serve, EMA.value)
    if served.serving.platform == 'cpu' and not cpu.available():
        how = 'to build them, install a C++ compiler, then spark again with `pip install`'
        slower = f'The C++ kernels are not built ({cpu.why_unavailable()}), so lookups are computed by XLA, more slowly; {how}.'
        print(slower, file=sys.stderr, flush=True)
    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value)
    emit = (lambda piece: print(piece, end='', flush=True)) if STREAM.value else None
    options = {'seed': SEED.value, 'chunk': CHUNK.value, 'stop': STOP.value, 'emit': emit}
    report = continue_prompts(served, prompts, N.value, sampling, **options)
    print('' if emit else '\n\n'.join(map(str.__add__, prompts, report['texts'])))
    halves = {'attention': report['attention_kernels'], 'FFN': report['ffn_kernels']}
    declined = ', '.join(f'{half} by {name}' for half, name in halves.items() if name != report['kernels'])
    print(
        f'\n{report["prompt_tokens"]} tokens of prompts at {report["prefill_tokens_per_second"]:,.0f} per second, '
        f'{report["new_tokens"]} more at {report["decode_tokens_per_second"]:,.0f} per second; '
        f'{report["decode_ms_per_step"]:.1f} ms a step; {report["dtype"]}, kernels {report["kernels"]}'
        f'{f" ({declined})" if declined else ""}, {report["gb_per_step"]:.3f} GB a step at {report["gb_per_second"]:.1f} GB/s'
    )
    names = {'active': 'neurons active', 'attended': 'keys attended', 'overflow': 'overflows of the capacity'}
    activity = [f'{report[name]:,.1f} {text}' for name, text in names.items() if report.get(name)]
    if activity:
        print(', '.join(activity) + ' per token and layer')
    if JSON.value:
        write_json(JSON.value, report)


def lines(path):
    """The prompts of a file."""
    try:
        text = path_of(path, f'--prompts={path}').read_bytes().decode()
    except (OSError, UnicodeDecodeError) as e:
        raise errors.ConfigError(f'--prompts={path}: {getattr(e, "strerror", None) or e}') from None
    prompts = [line.replace('\\n', '\n').replace('\\t', '\t') for line in text.replace('\r\n', '\n').split('\n')]
    return [prompt for prompt in prompts if prompt]


if __name__ == '__main__':
    use_huge_pages()
    errors.run(main, required=[WORKDIR])
