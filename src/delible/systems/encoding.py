"""Guards that compare meanings: the sentence encoder that they do it with."""

from __future__ import annotations

from pydantic import Field

from delible.lm.encoder import Encoder, sentence_encoder
from delible.systems.guarded import Guard


class EncodingGuard(Guard):
    """A guard with a sentence encoder."""

    encoder_folder: str | None = Field(
        None, description="Folder of a sentence encoder; by default all-MiniLM-L6-v2."
    )

    def encoder(self, given: Encoder | None = None) -> Encoder:
        """The encoder that was given, or the one of the options, loaded once per process."""
        return given or sentence_encoder(self.encoder_folder)


__all__ = ["EncodingGuard"]
