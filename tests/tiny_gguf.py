"""A tiny random Llama written as a GGUF file, with the checkpoint that it should load as."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(hf: Any, path: Path) -> None:
    config = hf.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    letters = [chr(ord("!") + i) for i in range(config.vocab_size - 4)]
    tokens = ["<unk>", "<s>", "</s>", *letters, "AB"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in hf.state_dict().items():
        values = weight.float().numpy()
        if name.startswith("model.layers."):
            _, _, layer, part = name.split(".", 3)
            short = _NAMES[part.removesuffix(".weight")]
            if short in heads:
                values = _interleave(values, heads[short])
            gguf_name = f"blk.{layer}.{short}.weight"
        else:
            table = {"embed_tokens": "token_embd", "lm_head": "output", "norm": "output_norm"}
            gguf_name = next(v for k, v in table.items() if k in name) + ".weight"
        writer.add_tensor(gguf_name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleave(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """GGUF's Llama rotates neighbouring dimensions, Hugging Face's the two halves of a head."""
    halves = weight.reshape(n_heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)
