"""The type checker of every call that a test makes to spark (see conftest.py)."""

import functools

import beartype

# An int is a float, as PEP 484 has it.
check = functools.partial(beartype.beartype, conf=beartype.BeartypeConf(is_pep484_tower=True))
