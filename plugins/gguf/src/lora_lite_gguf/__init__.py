"""GGUF files of llama.cpp as a format of lora-lite."""

from lora_lite_gguf.gguf_format import Gguf

__all__ = ["Gguf"]
