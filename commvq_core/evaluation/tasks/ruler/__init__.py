"""RULER: 13 synthetic tasks of any length, made here from a seed.

Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language Models?",
arXiv 2404.06654. Same tasks, settings, prompts' form, generation lengths and scores; the words,
numbers and text to hide them in are this toolkit's, so figures compare with each other and not to
the digit with published ones. Files that RULER's own scripts made are read from --data-dir.
"""

from __future__ import annotations

from commvq_core.evaluation.tasks.ruler.task import Ruler

__all__ = ["Ruler"]
