"""The kinds of lookups: the one table that says what each computes."""

from typing import NamedTuple


class Kind(NamedTuple):
    """What a kind of lookup computes: V · (σ1(TopK(K1ᵀ q1)) ⊙ σ2(K2ᵀ q2)), or V · σ1(TopK(Kᵀ q)) without a gate.

    All code branches on these properties and never on the kind's name. A kernel states the `Kind`s that it computes, and
    declines all others. A predictor needs a gate: the rest of the key is its second score. In attention a gate also needs a
    predictor.
    """

    activation: str  # σ1, a name in ops.ACTIVATIONS
    gate: str = ''  # σ2 of a second score, a name in ops.ACTIVATIONS; '': there is no second score
    topk: bool = False  # about k entries are kept, the others are masked
    predictor: bool = False  # q1 = q[:r] and q2 = q[r:]; without a predictor q1 = q2 = q
    zeros: bool = False  # σ1 itself gives exact zeros
    ddof: int = 1  # the variance of the statistical threshold is a sum of squares over n − ddof

    @property
    def gated(self) -> bool:
        """True if a second score multiplies the first."""
        return bool(self.gate)

    @property
    def sparse(self) -> bool:
        """True if some entries become exactly zero, so that active ones can be counted."""
        return self.topk or self.zeros

    @property
    def matrices(self) -> int:
        """Matrices of shape d_model × d_ff in an FFN; the two parts of a Spark key share one."""
        return 3 if self.gated and not self.predictor else 2


FFN_KINDS = {
    'gated': Kind('gelu', gate='identity'),
    'relu': Kind('relu', zeros=True),
    'relu2': Kind('relu2', zeros=True),
    'topk': Kind('gelu', topk=True),
    'gaussian_topk': Kind('gelu', gate='identity', topk=True, ddof=0),  # Gemma 3n
    'spark': Kind('gelu', gate='identity', topk=True, predictor=True),
}
ATTENTION_KINDS = {
    'dense': Kind('softmax'),
    'spark': Kind('softmax', gate='softplus', topk=True, predictor=True),
}


for _name, _kind in (FFN_KINDS | ATTENTION_KINDS).items():
    assert _kind.gated or not _kind.predictor, f'kind {_name!r}: a predictor needs a gate'
for _name, _kind in ATTENTION_KINDS.items():
    assert _kind.predictor or not _kind.gated, f'kind {_name!r}: in attention a gate needs a predictor'


def matched_d_ff(d_ff: int, kind: str, other: str) -> int:
    """The neurons that give an FFN of kind `other` as many parameters as one of `kind` with d_ff neurons."""
    return round(d_ff * FFN_KINDS[kind].matrices / FFN_KINDS[other].matrices)
