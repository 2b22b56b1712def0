r"""Gemma-2 27B and Spark Gemma-2 27B, for 64, 256 or 1024 chips. Variants: dense | spark (default) | spark_ffn |
spark_attention, each for 256 TPU v5e, or with the chips after a comma: spark,64xv5p. gemma2.py lists them.

    python scripts/train.py --config=configs/gemma2_27b.py:spark --workdir=gs://BUCKET/RUN \
        --config.data.source=tfds:c4/en --config.data.tokenizer=sentencepiece:PATH

Cost of 480k steps, 2T tokens: 3.5e23 model FLOPs, which is 79 days on 256 TPU v5e at their peak rate, so at least that.
Memory per v5e chip, as compiled: 11.97 GB dense, 13.92 GB Spark (docs/scaling.md).
Expected result: not known, this config has not been trained yet.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from gemma2 import make

# On v5e, one row per chip takes 108 % of the memory; 64 of them are too few: one row on 8 chips takes 109 %.
ROWS = {'v5e': 1 / 2, '64xv5e': 0, 'v6e': 1, 'v5p': 2, 'h100': 1}


def get_config(variant='spark'):
    """The config of a variant."""
    return make(
        variant, ROWS, d_model=4608, n_layers=46, n_heads=32, n_kv_heads=16, head_dim=128, d_ff=36864,
        query_dim=144.0, lr=5e-4,
    )  # fmt: skip
