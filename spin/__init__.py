"""SPIN, self-play fine-tuning of language models (Chen et al., ICML 2024, arXiv 2401.01335)."""

__version__ = "0.1.0"
