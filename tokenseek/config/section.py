"""What the sections of a configuration have in common."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
CellValue = str | int | float | bool | None


class Section(BaseModel):
    """A section of a configuration: values are of the types that they are declared with, unknown names are refused, and
    nothing is changed afterwards.
    """

    # Strict: "3" is not a number and 1 is not a flag. YAML has types of its own; a guess would hide a mistake.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
