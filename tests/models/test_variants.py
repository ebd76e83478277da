"""What makes two variants of a model differ, and how logs name them."""

from models.params import Lora
from models.variants import ModelVariant

INK, WASH = Lora("ink", 0.5), Lora("wash", 0.5)


def test_model_name_scale_and_order_make_a_difference() -> None:
    variants = [
        ModelVariant("a"),
        ModelVariant("a", (INK,)),
        ModelVariant("b", (INK,)),
        ModelVariant("a", (Lora("ink", 0.5000000000000001),)),
        ModelVariant("a", (WASH,)),
        ModelVariant("a", (INK, WASH)),
        ModelVariant("a", (WASH, INK)),
    ]
    assert len({*variants}) == len(variants)


def test_whole_scale_is_the_same_as_an_integer() -> None:
    """JSON may bring either."""
    integer, real = ModelVariant("a", (Lora("ink", 1),)), ModelVariant("a", (Lora("ink", 1.0),))
    assert len({integer, real}) == 1


def test_logs_name_model_loras_and_scales() -> None:
    assert str(ModelVariant("builtin")) == "builtin"
    assert (
        str(ModelVariant("builtin", (INK, Lora("wash", -1.5)))) == "builtin + ink:0.5 + wash:-1.5"
    )
