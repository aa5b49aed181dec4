"""What every section of a recipe or profile stands on: strict, and the number types that many share."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        serialize_by_alias=True,
    )


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0.0)]
NotNegativeInt = Annotated[int, Field(ge=0)]


def _scalar(value: Any) -> Any:
    """One message where the union below would give four."""
    if not isinstance(value, bool | int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
        raise PydanticCustomError("scalar", "should be text, a finite number, true or false")
    return value


Scalar = Annotated[bool | int | float | str, BeforeValidator(_scalar)]


def _count_or_auto(value: Any) -> Any:
    """One message where the union below would give two."""
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise PydanticCustomError("count_or_auto", "should be a whole number above 0, or auto")
    return value


CountOrAuto = Annotated[Positive | Literal["auto"], BeforeValidator(_count_or_auto)]
