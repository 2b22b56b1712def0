"""The section of the optimizer."""

import math
import re
from typing import Literal

from pydantic import Field

from spark.config.section import Section


def by_pattern(text: str) -> list[tuple[str, float]] | None:
    """The pairs of 'PATTERN=NUMBER …'; None if it is something else."""
    try:
        pairs = [(re.compile(p).pattern, float(number)) for p, _, number in (word.rpartition('=') for word in text.split())]
    except (re.error, ValueError):
        return None
    return pairs if all(pattern and 0 <= number < math.inf for pattern, number in pairs) else None


class OptimizerConfig(Section):
    """How gradients become updates, at which learning rate; docs/optimizers.md explains each field."""

    # muon: matrices by Muon with updates as large as AdamW's, all else by AdamW. The moments are those of AdamW; of adafactor b1
    # is the decay of its momentum, or 0 for none, and b2 the highest decay of its second moments.
    name: Literal['adamw', 'adafactor', 'lion', 'muon'] = 'adamw'
    lr: float = Field(gt=0)  # peak learning rate
    # After the warm-up. wsd: lr until the last steps, then a cool-down. inverse_sqrt: lr · sqrt(warmup_steps / step), at least
    # lr · final_lr. auto: wsd if there are decay_steps, else cosine.
    schedule: Literal['auto', 'constant', 'cosine', 'linear', 'wsd', 'inverse_sqrt'] = 'auto'
    final_lr: float = Field(0.1, ge=0, le=1)  # learning rate at the last step, as a share of the peak
    warmup_steps: int = Field(0, ge=0)  # a line to lr, which begins above 0
    warmup_from_zero: bool = False  # the first step of the warm-up has rate 0, and is wasted: runs of older versions go on so
    decay_steps: int = Field(0, ge=0)  # length of the cool-down of wsd; 0: decay_share
    decay_share: float = Field(0.2, gt=0, le=1)  # the same, as a share of train.steps
    decay_form: Literal['linear', 'cosine', 'sqrt'] = 'linear'  # of the cool-down; sqrt: 1 − sqrt(share of it that has passed)
    b1: float = Field(0.9, ge=0, lt=1)
    b2: float = Field(0.95, ge=0, lt=1)
    momentum: float = Field(0.95, ge=0, lt=1)  # of muon's matrices
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)  # of matrices; the scales of norms are exempt
    # 'PATTERN=NUMBER …': regular expressions that are searched in paths such as groups/ffn_0/K1; the last that matches counts.
    rates: str = ''  # factors of the learning rate; 0 freezes
    decays: str = ''  # weight decay in place of weight_decay
    clip: float = Field(1.0, ge=0)  # global gradient norm; 0: no clipping
    ema: float = Field(0.0, ge=0, lt=1)  # decay of a mean of the parameters, which is evaluated beside them; 0: none is kept
    z_loss: float = Field(0.0, ge=0)  # weight of log²Z in the loss

    @property
    def shape(self) -> str:
        """The schedule, of which 'auto' is one."""
        return self.schedule if self.schedule != 'auto' else 'wsd' if self.decay_steps else 'cosine'

    @property
    def unread(self) -> dict[str, str]:
        """The fields that this optimizer and this schedule do not read, and why; they must have their defaults."""
        fields = dict.fromkeys(() if self.name == 'muon' else ('momentum',), f'name {self.name!r} has no Muon')
        fields |= {'eps': "name 'lion' has none"} if self.name == 'lion' else {}
        names = () if self.shape == 'wsd' else ('decay_steps', 'decay_share', 'decay_form')
        fields |= dict.fromkeys(names, f'schedule {self.schedule!r} has no cool-down')
        fields |= {'decay_share': 'decay_steps says it'} if self.decay_steps and self.shape == 'wsd' else {}
        return fields | ({'final_lr': "schedule 'constant' stays at lr"} if self.shape == 'constant' else {})

    def _rules(self):
        for field, why in self.unread.items():
            default = type(self).model_fields[field].default
            yield getattr(self, field) == default, field, f'{default!r}, the default: {why}'
        for field in ('rates', 'decays'):
            want = "'PATTERN=NUMBER …', regular expressions with numbers that are at least 0"
            yield by_pattern(getattr(self, field)) is not None, field, want
