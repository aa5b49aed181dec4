"""The recipe's `model.lora`, its keys named as in peft, but for `quantization`. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from fleetune.sections import Fraction, Positive, Section


def _target_modules(value: Any) -> Any:
    """One message where the union below would give several."""
    names = value if isinstance(value, list) else []
    if value != "all-linear" and not (names and all(isinstance(name, str) and name for name in names)):
        message = "should be all-linear, or the names of modules: [q_proj, v_proj]"
        raise PydanticCustomError("target_modules", message)
    return value


TargetModules = Annotated[Literal["all-linear"] | list[str], BeforeValidator(_target_modules)]


class Lora(Section):
    r: Positive = 16
    """The rank: the inner width of the two matrices that are trained beside each frozen one."""
    lora_alpha: Annotated[float, Field(gt=0.0)] = 32.0
    """What they add is multiplied by lora_alpha / r."""
    lora_dropout: Fraction = 0.0
    """On what they are given."""
    target_modules: TargetModules = "all-linear"
    """The modules beside which they stand, by the end of their names; all linear ones but the head, when absent."""
    modules_to_save: list[str] = []
    """Modules that are trained whole and saved with the adapter; a classifier's head always is."""
    quantization: Literal["nf4", "fp4"] | None = None
    """QLoRA: holds the frozen weights in 4 bits, by bitsandbytes; nf4 is made for weights that are spread normally."""
    use_rslora: bool = False
    """Divides lora_alpha by the root of r, so that a high rank learns as fast as a low one (arXiv 2312.03732)."""

    @property
    def kind(self) -> str:
        """As people call it."""
        return "LoRA" if self.quantization is None else "QLoRA"
