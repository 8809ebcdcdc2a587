"""Evaluation: the same examples through the fp16 cache and through compressed ones."""
