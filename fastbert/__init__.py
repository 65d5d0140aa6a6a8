"""The BERT of Hugging Face transformers, only faster: same classes, same checkpoints, same numbers."""

__version__ = "0.1.0"
