"""What all sections of the config share."""

import functools
import itertools
from collections.abc import Iterator

import pydantic
from pydantic_core import PydanticCustomError


class Section(pydantic.BaseModel):
    """Frozen fields, of exactly their types, that satisfy rules."""

    model_config = pydantic.ConfigDict(frozen=True, extra='forbid', strict=True, allow_inf_nan=False)

    def _rules(self) -> Iterator[tuple[bool, str, str]]:
        """What this section must satisfy: (is it so, the field to name if not, what that field should be)."""
        yield from ()

    @pydantic.model_validator(mode='after')
    def _check(self):
        integers = ((not isinstance(x, int) or abs(x) < 2**31, name, 'less than 2³¹') for name, x in self)
        for satisfied, field, want in itertools.chain(integers, self._rules()):
            if not satisfied:  # `convert._one_line` puts the section's name before the field's
                value = functools.reduce(getattr, field.split('.'), self)
                raise PydanticCustomError('wrong_value', '{line}', {'line': f'{field} = {value!r}: want {want}'})
        return self
