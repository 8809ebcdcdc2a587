"""Scores of an answer in words, one file an idea; each is a share between 0 and 1."""
