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
        """The id for pool and engine: the model's own id where there are no LoRAs.

        Another scale gives another id, so a job never runs with scales that it did not ask for.
        """
        if not self.loras:
            return self.model
        loras = {lora.name: float(lora.scale) for lora in self.loras}
        return json.dumps({"model": self.model, "loras": loras}, ensure_ascii=False)

    @classmethod
    def of(cls, variant_id: str) -> "ModelVariant":
        """The variant with this `id`. variant_id: an id of a variant with LoRAs."""
        values = json.loads(variant_id)
        loras = tuple(Lora(name, scale) for name, scale in values["loras"].items())
        return cls(values["model"], loras)
