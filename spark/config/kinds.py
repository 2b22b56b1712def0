"""The kinds of lookups: the one table that says what each computes."""

from typing import NamedTuple

import pydantic


class Kind(NamedTuple):
    """What a kind of lookup computes: V · (σ1(TopK(K1ᵀ q1)) ⊙ σ2(K2ᵀ q2)), or V · σ1(TopK(Kᵀ q)) without a second score.

    All code branches on these properties and never on the kind's name. A kernel states the `Kind`s that it computes, and
    declines all others. In attention a gate needs a predictor.
    """

    activation: str  # σ1, a name in ops.ACTIVATIONS
    gate: str = ''  # σ2 of a second score, a name in ops.ACTIVATIONS; '': there is no second score
    topk: bool = False  # about k entries are kept, the others are masked
    predictor: bool = False  # q1 = q[:r] and q2 = q[r:]; without a predictor q1 = q2 = q
    zeros: bool = False  # σ1 itself gives exact zeros
    ddof: int = 1  # the variance of the statistical threshold is a sum of squares over n − ddof
    projected: bool = False  # q1 = Pᵀ q, a learned projection to r dimensions, instead of q[:r]; FFN only
    adds: bool = False  # the second score is added to the first: σ1(TopK(K1ᵀ q1) + K2ᵀ q2), 0 where TopK drops; there is no σ2
    cap_first: bool = False  # the soft-cap of attention comes before its top-k

    @property
    def gated(self) -> bool:
        """True if a second score multiplies the first."""
        return bool(self.gate)

    @property
    def sparse(self) -> bool:
        """True if some entries become exactly zero, so that active ones can be counted."""
        return self.topk or self.zeros

    @property
    def second(self) -> bool:
        """True if there is a second score, with keys K2."""
        return self.gated or self.adds

    @property
    def selects(self) -> bool:
        """True if some scores are known before the others: decoding then has a record per entry, which it may leave unread."""
        return self.topk or self.predictor

    def but(self, gate: str, ddof: int, cap_first: bool = False) -> 'Kind':
        """The kind with another σ2 ('': its own; 'none': no second score), ddof (−1: its own) and place of the soft-cap."""
        gate = {'': self.gate, 'none': ''}.get(gate, gate)
        return self._replace(gate=gate, ddof=self.ddof if ddof < 0 else ddof, cap_first=cap_first)

    def sizes(self, d_model: int, r: int) -> tuple[int, int]:
        """The parameters of an FFN: (of each neuron, beside the neurons). The two parts of a Spark key make one key."""
        keys = (r or d_model) + (d_model - r if self.second else 0)
        return keys + d_model, d_model * r if self.projected else 0

    def parameters(self, d_model: int, d_ff: int, r: int) -> int:
        """The parameters of an FFN."""
        per_neuron, beside = self.sizes(d_model, r)
        return per_neuron * d_ff + beside


FFN_KINDS = {
    'gated': Kind('gelu', gate='identity'),
    'relu': Kind('relu', zeros=True),
    'relu2': Kind('relu2', zeros=True),
    'topk': Kind('gelu', topk=True),
    'gaussian_topk': Kind('gelu', gate='identity', topk=True, ddof=0),  # Gemma 3n
    'spark': Kind('gelu', gate='identity', topk=True, predictor=True),
    'spark_projected': Kind('gelu', gate='identity', topk=True, predictor=True, projected=True),
    'spark_low_rank': Kind('gelu', topk=True, predictor=True, adds=True),
}
ATTENTION_KINDS = {
    'dense': Kind('softmax'),
    'topk': Kind('softmax', topk=True),
    'spark': Kind('softmax', gate='softplus', topk=True, predictor=True),
    'spark_low_rank': Kind('softmax', topk=True, predictor=True, adds=True),
}


for _name, _kind in [*FFN_KINDS.items(), *ATTENTION_KINDS.items()]:
    assert _kind.predictor or not _kind.projected, f'kind {_name!r}: only a predictor has a projection'
    assert not _kind.adds or (_kind.predictor and _kind.topk and not _kind.gated), f'kind {_name!r}: adds to no top-k, or has σ2'
for _name, _kind in ATTENTION_KINDS.items():
    assert _kind.predictor == _kind.second, f'kind {_name!r}: in attention a second score is that of the rest of the key'
    assert not _kind.projected, f'kind {_name!r}: attention has no projection'


def matched_d_ff(parameters: int, kind: Kind, d_model: int, r: int = 0) -> int:
    """The neurons that give an FFN of this kind so many parameters."""
    per_neuron, beside = kind.sizes(d_model, r)
    return round((parameters - beside) / per_neuron)


def adapted(section: pydantic.BaseModel, values: dict, d_model: int) -> dict:
    """The fields of a lookup's section with other values, and with what follows from them, before validation.

    What the kind and its operator do not read has its default. An FFN that would have other parameters gets the d_ff of equal
    ones, and the same share of active neurons.
    """
    raw, fields = section.model_dump() | values, type(section).model_fields
    raw |= {name: fields[name].default for name in section.model_copy(update=raw).unread}
    if 'd_ff' not in fields:
        return raw
    kind, before = FFN_KINDS[raw['kind']].but(raw['gate'], raw['ddof']), section.d_ff
    parameters, groups = section.traits.parameters(d_model, before, section.r), raw['groups']
    if 'd_ff' not in values and kind.parameters(d_model, before, raw['r']) != parameters:
        raw['d_ff'] = groups * round(matched_d_ff(parameters, kind, d_model, raw['r']) / groups)
    if kind.topk and 'k' not in values:
        step = 1 if raw['topk'] == 'statistical' else groups
        raw['k'] = step * round(section.k * raw['d_ff'] / before / step)
    return raw


def called(cfg: pydantic.BaseModel) -> str:
    """The kind of a lookup, and what its config changes of it, for messages."""
    fields = type(cfg).model_fields
    names = [name for name in ('gate', 'ddof', 'groups', 'cap_first') if name in fields]
    changed = [name for name in names if getattr(cfg, name) != fields[name].default]
    return f'kind {cfg.kind!r}' + ''.join(f', {name} = {getattr(cfg, name)!r}' for name in changed)
