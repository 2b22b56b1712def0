"""Train a lossless SentencePiece model on the training split of a source.

    python scripts/tokenizer.py --source=stdlib --vocab_size=2048 --out=FILE.model

The shipped spark/data/stdlib_2048.model was made by it.
"""

import random
from collections.abc import Iterable

from absl import flags

from spark import config, errors
from spark.data import documents, tokenizer
from spark.progress import tqdm
from spark.runtime import path_of, write_bytes

SOURCE = flags.DEFINE_string('source', 'stdlib', f'Text to train on: {documents.KINDS}.')
VOCAB_SIZE = flags.DEFINE_integer('vocab_size', 2048, 'Pieces, with 256 bytes and 3 specials.', lower_bound=300)
MAX_DOCUMENTS = flags.DEFINE_integer('max_documents', 100_000, 'Use at most so many, drawn at random.', lower_bound=1)
OUT = flags.DEFINE_string('out', None, 'The file to write.')


def main() -> None:
    if (out := path_of(OUT.value, f'--out={OUT.value}')).exists():
        raise errors.ConfigError(f'--out={out} exists; choose another name or remove it')
    if 'tokens:' in {name[:7] for phase in documents.parse(SOURCE.value) for name in phase.weights}:
        raise errors.ConfigError(f'--source={SOURCE.value}: a token store has no text; name the source that it was made from')
    texts = sample(documents.texts(SOURCE.value, 'train', config.DataConfig(seq_len=1, batch_size=1)), MAX_DOCUMENTS.value)
    model = tokenizer.train_sentencepiece(texts, VOCAB_SIZE.value)
    write_bytes(out, model)
    print(f'{out}: {VOCAB_SIZE.value} pieces; use it with --config.data.tokenizer=sentencepiece:{out}')


def sample(texts: Iterable[str], n: int) -> list[str]:
    """At most n of the texts, each equally likely (reservoir sampling); all, in order, if there are no more."""
    chosen, rng = [], random.Random(0)
    for i, text in enumerate(tqdm(texts, desc='reading', unit=' documents')):
        if len(chosen) < n:
            chosen.append(text)
        elif (place := rng.randrange(i + 1)) < n:
            chosen[place] = text
    return chosen


if __name__ == '__main__':
    errors.run(main, required=[OUT])
