"""Writing small .gguf files as llama.cpp does."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from transformers import AutoModelForCausalLM

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates dims (2j, 2j + 1) where transformers rotates (j, j + half)."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def save_gguf(model_folder: Path, path: Path) -> Path:
    """Write the tiny Llama and the BPE tokenizer of a folder as one .gguf file, in float32."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, json.loads((model_folder / "tokenizer.json").read_text())["model"])
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        if "q_proj" in name:
            array = _permuted(array, config.num_attention_heads)
        if "k_proj" in name:
            array = _permuted(array, config.num_key_value_heads)
        writer.add_tensor(_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _name(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in whole:
        return f"{whole[stem]}.weight"
    _, _, index, rest = stem.split(".", 3)
    return f"blk.{index}.{_NAMES[rest]}.weight"


def _add_tokenizer(writer: gguf.GGUFWriter, bpe: dict) -> None:
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    special = ("<eos>", "<pad>")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_eos_token_id(bpe["vocab"]["<eos>"])
    writer.add_bos_token_id(bpe["vocab"]["<eos>"])
    writer.add_pad_token_id(bpe["vocab"]["<pad>"])


def save_header(path: Path, **fields: int) -> Path:
    """A valid .gguf file of one tensor and the given integer fields, without a model in it."""
    endianess = gguf.GGUFEndian.BIG if fields.pop("big_endian", 0) else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(path, "llama", endianess=endianess)
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_array("some.strings", ["one", "two"])
    writer.add_bool("some.flag", True)
    writer.add_float64("some.float", 1.5)
    for name, value in fields.items():
        writer.add_uint16(name.replace("_", "."), value)
    writer.add_tensor("weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
