r"""Gemma-2 9B and Spark Gemma-2 9B: variants dense | spark | spark_ffn | spark_attention. For 256 chips.

    python scripts/train.py --config=configs/gemma2_9b.py:spark --workdir=gs://BUCKET/RUN \
        --config.data.source=tfds:c4/en --config.data.tokenizer=sentencepiece:PATH
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from gemma2 import make


def get_config(variant='spark'):
    """The ConfigDict of a variant."""
    c = make(variant, d_model=3584, n_layers=42, n_heads=16, n_kv_heads=8, head_dim=256, d_ff=14336, query_dim=256.0, lr=7e-4)
    c.train.accumulate = 2  # one row per chip at a time: two take 99 % of a v5e chip
    return c
