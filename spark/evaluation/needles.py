"""Needles in a haystack, and tasks in the manner of RULER (arXiv 2404.06654), as tasks of lm-evaluation-harness.

The haystack is the test split of the embedded corpus: no network, and the same texts at every call (by Python version, as the
corpus). A text ends with a question, whose answer is one of CHOICES numbers. `acc`: the answer is the likeliest of them, by
chance 1 / CHOICES. `exact_match`: greedy generation would write it, which is what RULER measures. All numbers of a text stand at
its depth, in random order, so that their places do not tell the answer.
"""

import functools
import zlib
from collections.abc import Callable

import numpy as np

from spark.config import DataConfig, nearest
from spark.data import documents
from spark.data.tokenizer import Tokenizer
from spark.errors import ConfigError

CHOICES = 4
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KEYS = 'otter heron badger falcon lynx marten stork beaver raven bison'.split()
FACT = '# The magic number of {} is {}.\n'
METADATA = ('length', 'depth', 'documents')  # of --metadata: numbers or lists of them


def single(keys: list[str], numbers: list[int], place: float, rng: np.random.Generator) -> tuple[list, str]:
    """One number to find; the others are not in the text."""
    return [(place, FACT.format(keys[0], numbers[0]))], f'# The magic number of {keys[0]} is'


def multikey(keys: list[str], numbers: list[int], place: float, rng: np.random.Generator) -> tuple[list, str]:
    """The numbers of several keys, of which the question names one."""
    facts = [FACT.format(*pair) for pair in zip(keys, numbers, strict=False)]
    return [(place, fact) for fact in rng.permutation(facts).tolist()], f'# The magic number of {keys[0]} is'


def tracking(keys: list[str], numbers: list[int], place: float, rng: np.random.Generator) -> tuple[list, str]:
    """Variables that get their values from one another, in as many chains as there are numbers; all start at the depth."""
    first, second = keys[: len(numbers)], keys[len(numbers) :]
    starts = [(place, f'{first[chain]} = {numbers[chain]}\n') for chain in rng.permutation(len(numbers))]
    rest = [(place + (1 - place) * rng.random(), f'{b} = {a}\n') for a, b in zip(first, second, strict=False)]
    return starts + rest, f'# {second[0]} =='


BUILDERS = {'needle_single': single, 'needle_multikey': multikey, 'needle_tracking': tracking}


def tasks(tokenizer: Tokenizer, data: DataConfig) -> dict[str, dict]:
    """{name: the config of a task} for the harness. The default lengths are data.seq_len, twice and four times that."""
    return {name: {
        'task': name,
        # The harness copies configs, of which it leaves functions as they are.
        'custom_dataset': lambda name=name, **metadata: _dataset(name, tokenizer, data, metadata),
        'output_type': 'multiple_choice', 'test_split': 'test', 'num_fewshot': 0,
        'doc_to_text': 'text', 'doc_to_choice': 'choices', 'doc_to_target': 'answer',
        'metric_list': [{'metric': metric, 'aggregation': 'mean', 'higher_is_better': True} for metric in ('acc', 'exact_match')],
    } for name in BUILDERS}  # fmt: skip


def check(metadata: dict) -> None:
    """Raises a ConfigError for metadata that the tasks here would not read, or could not obey."""
    for name, value in metadata.items():
        if name not in METADATA:
            raise ConfigError(f'--metadata: {name!r}{nearest(name, METADATA)}: want {", ".join(METADATA)}')
        kind, least, most = (int | float, 0, 1) if name == 'depth' else (int, 1, 2**31)
        for x in value if isinstance(value, list) and name != 'documents' else [value]:
            if isinstance(x, bool) or not isinstance(x, kind) or not least <= x <= most:
                want = 'a share, 0 to 1, or a list of them' if name == 'depth' else 'a number, at least 1'
                raise ConfigError(f'--metadata: {name} = {x!r}: want {want}')


def documents_of(
    name: str, tokenizer: Tokenizer, data: DataConfig, lengths: list[int], depths: list[float], n: int
) -> list[dict]:
    """n documents for each depth and length; all of them have one before any has two.

    The length includes BOS and the answer; a document is shorter by less than a line of the haystack.
    """
    cells = [(length, depth, i) for i in range(n) for length in lengths for depth in depths]
    return [_document(BUILDERS[name], name, tokenizer, data, *cell) for cell in cells]


def _document(build: Callable, name, tokenizer, data, length, depth, i):
    rng = np.random.default_rng([zlib.crc32(name.encode()), length, round(1e6 * depth), i])
    keys, numbers = list(rng.permutation(KEYS)), [int(x) for x in rng.choice(np.arange(1000, 10_000), CHOICES, replace=False)]
    placed, question = build(keys, numbers, depth, rng)
    lines, sizes = _haystack(data.cache_dir, tokenizer)
    room = length - 1 - sum(map(len, tokenizer.encode_batch([*(line for _, line in placed), f'{question} {max(numbers)}'])))
    if room < 0:
        raise ConfigError(f'--metadata: length = {length}: {name} takes {length - room} tokens without a haystack')
    order = (np.arange(len(lines)) + rng.integers(len(lines))) % len(lines)  # from a random line on, around the end
    ends = np.cumsum(np.concatenate([[0], np.tile(sizes[order], 1 + room // int(sizes.sum()))]))
    count = int(np.searchsorted(ends, room, 'right')) - 1  # of the lines that fit
    text = [lines[order[j % len(lines)]] for j in range(count)]
    for place, line in sorted(placed, key=lambda x: x[0])[::-1]:  # from the end, so that no place shifts
        text.insert(int(np.searchsorted(ends[: count + 1], place * ends[count])), line)
    shuffled = rng.permutation(CHOICES)
    return {
        'text': ''.join(text) + question, 'choices': [str(numbers[j]) for j in shuffled], 'answer': int(np.argmin(shuffled)),
        'length': length, 'depth': float(depth),
    }  # fmt: skip


@functools.lru_cache(maxsize=2)
def _haystack(cache, tokenizer):
    """(lines, tokens of each) of the test split."""
    texts = documents.texts('stdlib', 'test', DataConfig(seq_len=1, batch_size=1, cache_dir=cache))
    lines = [line for text in texts for line in text.splitlines(keepends=True) if line.endswith('\n') and len(line) <= 200]
    return lines, np.array([len(ids) for ids in tokenizer.encode_batch(lines)])


def _dataset(name, tokenizer, data, metadata):
    import datasets

    given = {key: metadata[key] for key in METADATA if key in metadata}
    check(given)
    several = lambda value: value if isinstance(value, list) else [value]
    lengths = several(given.get('length', [data.seq_len, 2 * data.seq_len, 4 * data.seq_len]))
    found = documents_of(name, tokenizer, data, lengths, several(given.get('depth', list(DEPTHS))), given.get('documents', 8))
    return {'test': datasets.Dataset.from_list(found)}


def by_cell(samples: list[dict]) -> list[dict]:
    """[{'length', 'depth', 'documents', and the mean of each metric}] of samples of the harness, if their documents have both."""
    cells = {}
    for sample in samples:
        if {'length', 'depth'} <= sample['doc'].keys():
            cells.setdefault((sample['doc']['length'], sample['doc']['depth']), []).append(sample)
    mean = lambda group: {metric: float(np.mean([sample[metric] for sample in group])) for metric in group[0]['metrics']}
    return [{'length': key[0], 'depth': key[1], 'documents': len(g), **mean(g)} for key, g in sorted(cells.items())]


def table(name: str, cells: list[dict], metric: str = 'acc') -> str:
    """A metric by length (rows) and depth (columns), as Markdown."""
    lengths, depths = (sorted({cell[key] for cell in cells}) for key in ('length', 'depth'))
    value = {(cell['length'], cell['depth']): f'{cell[metric]:.2f}' for cell in cells}
    line = lambda *words: f'| {" | ".join(words)} |'
    rows = [line(f'{length} tokens', *(value.get((length, depth), '–') for depth in depths)) for length in lengths]
    head = line(f'{name}: {metric}', *(f'depth {depth:g}' for depth in depths))
    return '\n'.join([head, '|---' * (1 + len(depths)) + '|', *rows])
