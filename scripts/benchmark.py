"""Measure what this project claims: both sides in one run, medians of interleaved repeats.

    python scripts/benchmark.py topk|ffn|attention|data|train_step|train_step_30m|faults|compile|ffn_decode|decode|prefill
        [--repeats=N] [--topology=v5e:2x2] [--json=FILE]

topk        statistical top-k against exact, approximate and GELU, forward + backward, [4096, 13824], k 1106
ffn         a Spark FFN against the gated FFN of equal parameters, forward + backward, D 2304, 1024 and 4096 tokens; the memory;
            with --topology: the TPU compiler's estimate of cycles, 8192 tokens, bfloat16; needs libtpu, but no TPU
attention   Spark attention against dense attention, both in linear memory, forward + backward, 2k and 8k tokens; and the memory
data        batches from a token store against tokenizing in the loop, rows of 2048 and 8192 tokens; in the details, CPU seconds
            per million tokens of the job for one of 1, 8 and 64 processes, and opening a store of 1e11 tokens
train_step  a training step of configs/tiny.py, Spark against dense; fails if a step after the first compiles anything
train_step_30m  the same for D 512, 8 layers, rows of 1024 tokens
faults      the cost of fault tolerance: a checkpoint, the watchdog and the guard against bad updates, on configs/tiny.py
compile     compiling the training step of a model of 26 layers against one of 4, at small widths
ffn_decode  decoding with the FFN alone, bfloat16, Spark against dense at the 2B shape; matrix-vector products against memory
decode      decoding with whole 2B models of random weights: Spark against dense, int8 against bfloat16. Needs 16 GB
prefill     the same models on a prompt of 4096 tokens in chunks of 64. Needs 14 GB

JSON: a list of rows {name, backend, ours_ms, baseline_ms, speedup = baseline / ours, …}.
"""

import pathlib

from absl import flags

from spark import errors
from spark.runtime import use_huge_pages, write_json

REPEATS = flags.DEFINE_integer('repeats', None, "Interleaved repeats of each side; default the benchmark's own.", lower_bound=1)
TOPOLOGY = flags.DEFINE_string('topology', None, 'With ffn: estimate cycles on this TPU slice, such as v5e:2x2.')
JSON = flags.DEFINE_string('json', None, 'Also write the rows to this file.')
CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'


def main(name: str) -> None:
    from spark.benchmarks.run import run
    from spark.benchmarks.timing import table

    rows = run(name, CONFIGS, REPEATS.value, TOPOLOGY.value)
    print(table(rows))
    if JSON.value:
        write_json(JSON.value, rows)


if __name__ == '__main__':
    use_huge_pages()
    from spark.benchmarks.run import BENCHMARKS  # late, so that JAX starts once

    errors.run(main, arguments=['|'.join(BENCHMARKS)])
