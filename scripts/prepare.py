"""Tokenize a source into a token store, which training then reads by index.

    python scripts/prepare.py --source=text:'/data/*.jsonl.zst' --tokenizer=hf:tokenizer.json --out=DIR

DIR may be in a bucket (gs://…, s3://…). Train on it with --config.data.source=tokens:DIR. After an interruption, run the same
command again: finished parts stay. Exit codes: 0 done, 2 wrong flags, 4 data unreadable.
"""

import pathlib
import sys
import time

from absl import flags

from spark import errors
from spark.config import DataConfig
from spark.runtime import in_bucket, path_of, write_json

SOURCE = flags.DEFINE_string('source', None, 'What to tokenize, as data.source; no mixture.')
TOKENIZER = flags.DEFINE_string('tokenizer', 'bytes', 'bytes, sentencepiece:FILE or hf:FILE, as data.tokenizer.')
BOS = flags.DEFINE_string('bos', '', "The token at the start of documents; empty: the tokenizer's own; 'none': not used.")
EOS = flags.DEFINE_string('eos', '', "The token at the end of documents; empty: the tokenizer's own; 'none': not used.")
OUT = flags.DEFINE_string('out', None, 'The directory or bucket of the store: new, or an unfinished one of the same source.')
HOLDOUT = flags.DEFINE_float('holdout', 0.05, 'Share of the documents for validation, and as much for test; 0: all for training.',
                             0.0, 0.49)  # fmt: skip
FIELD = flags.DEFINE_string('text_field', 'text', 'The text, in records that have several fields.')
MAX_BAD = flags.DEFINE_float('max_bad', 0, 'Unusable documents that may be left out: a number, or below 1 a share.', 0.0)
LAUNCHER = flags.DEFINE_enum('launcher', 'local', ['local', 'slurm', 'beam'], 'Where to work.')
WORKERS = flags.DEFINE_integer('workers', 0, 'Processes, or jobs of SLURM; 0: one per core, 16 jobs.', 0)
SLURM = flags.DEFINE_multi_string('slurm', [], 'NAME=VALUE for sbatch, such as time=120, partition=cpu, cpus_per_task=1.')
BEAM = flags.DEFINE_multi_string('beam', [], 'An option of the pipeline, such as --beam=--runner=DataflowRunner.')
JSON = flags.DEFINE_string('json', None, 'Also write what was prepared to this file.')


def main() -> None:
    from spark.data import documents, launchers, prepare

    (source, *others), *later = (phase.weights for phase in documents.parse(SOURCE.value))
    if others or later:
        raise errors.ConfigError(f'--source={SOURCE.value}: is a mixture: prepare each part, and mix them in data.source')
    if source.startswith('tokens:'):
        raise errors.ConfigError(f'--source={SOURCE.value}: is a token store already')
    match LAUNCHER.value:
        case 'local':
            launcher = launchers.local(WORKERS.value)
        case 'slurm':
            out = path_of(OUT.value, f'--out={OUT.value}')
            beside = pathlib.Path(out.name if in_bucket(out) else out).absolute()  # of a bucket: in the working directory
            folder = beside.with_name(f'{beside.name}-slurm')
            launcher = launchers.slurm(folder, WORKERS.value or 16, dict(map(launchers.parameter, SLURM.value)))
        case 'beam':
            launcher = launchers.beam(BEAM.value)
    cfg = DataConfig(
        source=source, tokenizer=TOKENIZER.value, bos=BOS.value, eos=EOS.value, holdout=HOLDOUT.value,
        text_field=FIELD.value, max_bad=MAX_BAD.value, seq_len=1, batch_size=1,
    )  # fmt: skip
    start = time.perf_counter()
    manifest = prepare.prepare(cfg, source, OUT.value, launcher).manifest
    seconds = time.perf_counter() - start
    print(table(manifest))
    tokens = sum(split['tokens'] for split in manifest['splits'].values())
    print(f'\n{tokens:,} tokens in {seconds:.1f} s; use them with --config.data.source=tokens:{OUT.value}')
    if manifest['unusable']:
        print(f'Warning: {manifest["unusable"]} documents were unusable, such as {manifest["listed"][0]}', file=sys.stderr)
    if JSON.value:
        write_json(JSON.value, {name: value for name, value in manifest.items() if name not in ('files', 'checksums')})


def table(manifest: dict) -> str:
    """The splits of a store as a Markdown table."""
    lines = ['| split | documents | tokens | bytes | bytes per token |', '|---|---|---|---|---|']
    for name, split in manifest['splits'].items():
        counts = ' | '.join(f'{split[key]:,}' for key in ('documents', 'tokens', 'bytes'))
        lines.append(f'| {name} | {counts} | {split["bytes"] / split["tokens"]:.2f} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    errors.run(main, required=[SOURCE, OUT])
