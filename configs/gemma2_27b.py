r"""Gemma-2 27B and Spark Gemma-2 27B: variants dense | spark | spark_ffn | spark_attention. For 256 chips.

    python scripts/train.py --config=configs/gemma2_27b.py:spark --workdir=gs://BUCKET/RUN \
        --config.data.source=tfds:c4/en --config.data.tokenizer=sentencepiece:PATH
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from gemma2 import make


def get_config(variant='spark'):
    """The ConfigDict of a variant."""
    c = make(variant, d_model=4608, n_layers=46, n_heads=32, n_kv_heads=16, head_dim=128, d_ff=36864, query_dim=144.0, lr=5e-4)
    # A row per two chips at a time: with 256 × 1, a whole row per chip, it takes 108 % of a v5e chip.
    c.mesh.fsdp, c.mesh.model = 128, 2
    c.train.accumulate = 4
    return c
