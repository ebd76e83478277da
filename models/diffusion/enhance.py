"""Prompt enhancement: fixed words appended to what the client wrote. Torch-free."""

from dataclasses import dataclass

_SUFFIX = (
    "DSLR photography, sharp focus, Unreal Engine 5, Octane Render, Redshift, "
    "((cinematic lighting)), f/1.4, ISO 200, 1/160s, 8K, RAW, unedited, symmetrical balance, "
    "in-frame"
)
_NEGATIVE_LIST = (
    "((out of frame)), ((extra fingers)), mutated hands, ((poorly drawn hands)), "
    "((poorly drawn face)), (((mutation))), (((deformed))), (((tiling))), ((naked)), ((tile)), "
    "((fleshpile)), ((ugly)), (((abstract))), blurry, ((bad anatomy)), ((bad proportions)), "
    "((extra limbs)), cloned face, glitchy, ((extra breasts)), ((double torso)), ((extra arms)), "
    "((extra hands)), ((mangled fingers)), ((missing breasts)), (missing lips), ((ugly face)), "
    "((fat)), ((extra legs))"
)


@dataclass(frozen=True, slots=True)
class Enhancement:
    """The words added. The defaults are the vendor's, byte for byte, from the example response on
    its page about `POST /api/v3/inpaint`.
    """

    suffix: str = _SUFFIX
    negative_list: str = _NEGATIVE_LIST

    def apply(self, prompt: str, negative_prompt: str | None) -> tuple[str, str]:
        """Prompt and negative prompt, each with one blank before the added words, even if empty."""
        return f"{prompt} {self.suffix}", f"{negative_prompt or ''} {self.negative_list}"
