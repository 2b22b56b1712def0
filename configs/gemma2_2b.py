r"""Gemma-2 2B and Spark Gemma-2 2B: variants dense | spark | spark_ffn | spark_attention. For 256 chips.

    python scripts/train.py --config=configs/gemma2_2b.py:spark --workdir=gs://BUCKET/RUN \
        --config.data.source=tfds:c4/en --config.data.tokenizer=sentencepiece:PATH
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from gemma2 import make


def get_config(variant='spark'):
    """The ConfigDict of a variant."""
    return make(variant, d_model=2304, n_layers=26, n_heads=8, n_kv_heads=4, head_dim=256, d_ff=9216, query_dim=256.0, lr=1e-3)
