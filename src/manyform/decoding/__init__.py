"""Fast single-stream decoding on the CPU: one token a step through compiled loops."""

from manyform.decoding.decoder import Decoder, decode_step

__all__ = ["Decoder", "decode_step"]
