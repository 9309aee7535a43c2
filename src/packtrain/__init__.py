"""Fine-tune Llama models on every GPU you have: fast, exact, and without losing work."""

__version__ = "0.1.0"
