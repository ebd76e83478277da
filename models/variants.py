"""`ModelVariant`: a model with the LoRAs that a job asks for."""

from dataclasses import dataclass

from models.params import Lora


@dataclass(frozen=True, slots=True)
class ModelVariant:
    """A model and the LoRAs that are fused into it, in this order; often there are none.

    Pool and engine know loaded models by it. Other scales or another order make another variant,
    so a job never runs with LoRAs that it did not ask for.
    model: the model's own id.
    """

    model: str
    loras: tuple[Lora, ...] = ()

    def __str__(self) -> str:
        """For logs: "builtin", "builtin + ink:0.8"."""
        return " + ".join([self.model, *(f"{lora.name}:{lora.scale}" for lora in self.loras)])
