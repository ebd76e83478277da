"""`ModelVariant`: a model with the LoRAs that a job asks for."""

import json
from dataclasses import dataclass

from models.params import Lora


@dataclass(frozen=True, slots=True)
class ModelVariant:
    """A model and the LoRAs that are fused into it, in this order.

    model: the model's own id.
    """

    model: str
    loras: tuple[Lora, ...] = ()

    @property
    def id(self) -> str:
        """What pool and engine know it by: the model's own id where there are no LoRAs.

        Variants that differ in any scale are different models, so that none is only nearly right.
        """
        if not self.loras:
            return self.model
        loras = {lora.name: float(lora.scale) for lora in self.loras}
        return json.dumps({"model": self.model, "loras": loras}, ensure_ascii=False)

    @classmethod
    def of(cls, variant_id: str) -> "ModelVariant":
        """The variant with such an id, which is not a model's own."""
        values = json.loads(variant_id)
        loras = tuple(Lora(name, scale) for name, scale in values["loras"].items())
        return cls(values["model"], loras)
