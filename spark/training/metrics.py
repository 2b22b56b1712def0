"""What a run writes about itself: metrics.jsonl and TensorBoard together; and the FLOPs behind utilisation."""

import json
import math
import os

import tensorboardX

# Dense bfloat16 FLOP/s of a chip, by the start of jax's device_kind (vendors' data sheets).
PEAK_FLOPS = {
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5p': 459e12,
    'TPU v5': 459e12,
    'TPU v6 lite': 918e12,
    'TPU7x': 2307e12,
    'NVIDIA A100': 312e12,
    'NVIDIA H100': 989e12,
    'NVIDIA H200': 989e12,
    'NVIDIA B200': 2250e12,
}


def peak_flops(device):
    """The chip's dense bfloat16 FLOP/s, or None where it is not known."""
    return next((peak for kind, peak in PEAK_FLOPS.items() if device.device_kind.startswith(kind)), None)


def training_flops_per_token(cfg, n_params, seq_len):
    """Model FLOPs of forward and backward per token, as arXiv 2204.02311 counts them: 6·N + 12·Σ_layers H·d·span.

    N counts the tied embedding once (as the output head). Rematerialisation and sparsity are not subtracted or added:
    training computes all entries of a lookup and masks them.
    """
    a = cfg.attention
    spans = [min(seq_len, a.window) if span == 'local' else seq_len for span in cfg.pattern]
    layers = cfg.n_layers // len(cfg.pattern)
    return 6 * n_params + 12 * layers * sum(spans) * a.n_heads * a.head_dim


class MetricsWriter:
    """Appends one JSON object per call to WORKDIR/metrics.jsonl, and its numbers to WORKDIR/tensorboard.

    Opening it at a step drops what a lost continuation wrote after that step, so that none appears twice.
    """

    def __init__(self, workdir, step):
        path = workdir / 'metrics.jsonl'
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if (r := _parse(line)) and r['step'] <= step]
            scratch = path.with_suffix('.tmp')
            scratch.write_text(''.join(line + '\n' for line in kept))
            os.replace(scratch, path)
        self._file = path.open('a', buffering=1)
        self._board = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'), purge_step=step + 1 if step else None)

    def write(self, step, split, values):
        """values: numbers, and lists of numbers (one per layer)."""
        safe = {name: v if not isinstance(v, float) or math.isfinite(v) else str(v) for name, v in values.items()}
        self._file.write(json.dumps({'step': step, 'split': split, **safe}) + '\n')
        for name, value in values.items():
            for suffix, v in enumerate(value) if isinstance(value, list) else [('', value)]:
                self._board.add_scalar(f'{split}/{name}' + (f'/{suffix}' if suffix != '' else ''), v, step)

    def close(self):
        """Flushes both."""
        self._file.close()
        self._board.close()


def _parse(line):
    """A record, or None for the torn last line of a killed process."""
    try:
        return json.loads(line)
    except ValueError:
        return None
