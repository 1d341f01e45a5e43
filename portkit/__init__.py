"""portkit: port a Transformers model to vLLM, every step validated in the real vLLM."""

__version__ = "0.1.0"
