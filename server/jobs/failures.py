"""Why jobs fail: a closed list, so that nothing else can leak to a client."""

from enum import StrEnum

from models.params import CHUNK_TOKENS, MAX_PROMPT_CHUNKS


class Failure(StrEnum):
    """A code for programs. `sentence` is what a person reads, and what the job row keeps."""

    WORKER_LOST = "worker_lost"
    """Its worker died or hung at every attempt."""
    INPUT_LOST = "input_lost"
    """The stored init image and mask are missing or damaged."""
    INPUT_OF_ANOTHER_VERSION = "input_of_another_version"
    """A later version of the server stored the init image and mask in its own format."""
    MODEL_UNAVAILABLE = "model_unavailable"
    """The model asked for cannot be loaded."""
    NO_SAFETY_CHECKER = "no_safety_checker"
    """The checker is forced, and the model asked for has none."""
    PROMPT_TOO_LONG = "prompt_too_long"
    CLIP_SKIP_TOO_LARGE = "clip_skip_too_large"
    OUT_OF_MEMORY = "out_of_memory"
    UNUSABLE_PICTURE = "unusable_picture"
    NOT_STORED = "not_stored"
    """The file store did not take the pictures."""
    UNKNOWN = "unknown"

    @property
    def sentence(self) -> str:
        return SENTENCES[self]

    @classmethod
    def of(cls, sentence: str) -> "Failure":
        """The failure a row tells of; `UNKNOWN` for a sentence of another version."""
        codes = {text: code for code, text in SENTENCES.items()}
        return codes.get(sentence, cls.UNKNOWN)


SENTENCES = {
    Failure.WORKER_LOST: "The worker was lost too often while making this picture",
    Failure.INPUT_LOST: "The stored images are gone",
    Failure.INPUT_OF_ANOTHER_VERSION: (
        "The stored images are in the format of another version of this server"
    ),
    Failure.MODEL_UNAVAILABLE: "The model cannot be loaded now",
    Failure.NO_SAFETY_CHECKER: "This model has no safety checker, and pictures must be checked",
    Failure.PROMPT_TOO_LONG: "The prompt or the negative prompt needs more than "
    f"{MAX_PROMPT_CHUNKS} chunks of {CHUNK_TOKENS} tokens",
    Failure.CLIP_SKIP_TOO_LARGE: "This model has fewer text encoder layers than clip_skip skips",
    Failure.OUT_OF_MEMORY: "The picture is too large for this server's memory",
    Failure.UNUSABLE_PICTURE: "The model could not make this picture",
    Failure.NOT_STORED: "The pictures could not be stored",
    Failure.UNKNOWN: "Something went wrong while making this picture",
}
