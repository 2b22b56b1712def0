r"""Gemma-2 9B and Spark Gemma-2 9B, for 64, 256 or 1024 chips. Variants: dense | spark (default) | spark_ffn |
spark_attention, each for 256 TPU v5e, or with the chips after a comma: spark,64xv5p. gemma2.py lists them.

    python scripts/train.py --config=configs/gemma2_9b.py:spark --workdir=gs://BUCKET/RUN \
        --config.data.source=tfds:c4/en --config.data.tokenizer=sentencepiece:PATH

Cost of 480k steps, 2T tokens: 1.3e23 model FLOPs, which is 29 days on 256 TPU v5e at their peak rate, so at least that.
Memory per v5e chip, as compiled: 8.68 GB dense, 9.62 GB Spark (docs/scaling.md).
Expected result: not known, this config has not been trained yet.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from gemma2 import make

# On a v5e chip, two rows take 99 % of the memory.
ROWS = {'v5e': 1, 'v6e': 2, 'v5p': 4, 'h100': 2}


def get_config(variant='spark'):
    """The config of a variant."""
    return make(
        variant, ROWS, d_model=3584, n_layers=42, n_heads=16, n_kv_heads=8, head_dim=256, d_ff=14336,
        query_dim=256.0, lr=7e-4,
    )  # fmt: skip
