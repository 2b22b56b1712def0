r"""Gemma-2 2B and Spark Gemma-2 2B, for 64, 256 or 1024 chips. Variants: dense | spark (default) | spark_ffn |
spark_attention, each for 256 TPU v5e, or with the chips after a comma: spark,64xv5p. gemma2.py lists them.

    python scripts/train.py --config=configs/gemma2_2b.py:spark --workdir=gs://BUCKET/RUN \
        --config.data.source=tfds:c4/en --config.data.tokenizer=sentencepiece:PATH

Cost of 480k steps, 2T tokens: 3.6e22 model FLOPs, which is 8 days on 256 TPU v5e at their peak rate, so at least that.
Memory per v5e chip, as compiled: 7.07 GB dense, 8.09 GB Spark (docs/scaling.md).
Expected result: this config has not been trained yet. The paper reports near-neutral quality for Spark Gemma-2 2B.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from gemma2 import make

ROWS = {'v5e': 2, 'v6e': 4, 'v5p': 8, 'h100': 4}


def get_config(variant='spark'):
    """The config of a variant."""
    return make(
        variant, ROWS, d_model=2304, n_layers=26, n_heads=8, n_kv_heads=4, head_dim=256, d_ff=9216,
        query_dim=256.0, lr=1e-3,
    )  # fmt: skip
