"""A variant's id tells all that makes it differ, and gives it back."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from models.params import Lora
from models.variants import ModelVariant

SCALES = st.floats(-2, 2).map(lambda scale: scale + 0.0)  # no -0.0, which equals 0
LORAS = st.lists(
    st.builds(Lora, st.text(), SCALES), min_size=1, max_size=4, unique_by=lambda lora: lora.name
).map(tuple)
VARIANTS = st.builds(ModelVariant, st.text(), LORAS)


@given(VARIANTS)
def test_id_gives_the_variant_back(variant: ModelVariant) -> None:
    assert ModelVariant.of(variant.id) == variant


@given(VARIANTS, VARIANTS)
def test_different_variants_have_different_ids(first: ModelVariant, second: ModelVariant) -> None:
    assert (first.id == second.id) == (first == second)


def test_model_without_loras_keeps_its_id() -> None:
    assert ModelVariant("builtin").id == "builtin"


def test_model_scale_order_and_name_make_a_difference() -> None:
    ink, wash = Lora("ink", 0.5), Lora("wash", 0.5)
    variants = [
        ModelVariant("a", (ink,)),
        ModelVariant("b", (ink,)),
        ModelVariant("a", (Lora("ink", 0.5000000000000001),)),
        ModelVariant("a", (wash,)),
        ModelVariant("a", (ink, wash)),
        ModelVariant("a", (wash, ink)),
    ]
    assert all(one.id != other.id for one, other in itertools.combinations(variants, 2))
    assert ModelVariant("a", (Lora("ink", 1),)).id == ModelVariant("a", (Lora("ink", 1.0),)).id
