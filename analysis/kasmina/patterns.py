"""Patterns over module names that declare attention heads, transformer MLPs and residual branches, with presets.

All names of a pattern follow one common prefix: `HeadPattern(out="attn.proj", fused="attn.qkv")` matches every layer
`<prefix>attn.proj` that has a `<prefix>attn.qkv` beside it. A pattern of one's own goes beside the presets:
`trace_topology(..., heads=(*HEADS, HeadPattern(...)))`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadPattern:
    """The projections of one attention layer: query, key and value apart, or one fused projection.

    A fused projection holds the three one after the other, or with `interleaved` q, k and v of each head in turn.
    `transposed`: weights are [in, out]. Head counts are read from the modules or `config`, unless given.
    """

    out: str
    query: str = ""
    key: str = ""
    value: str = ""
    fused: str = ""
    interleaved: bool = False
    transposed: bool = False
    heads: int | None = None
    kv_heads: int | None = None


@dataclass(frozen=True)
class MlpPattern:
    """A transformer's MLP: units are rows of every `up` and columns of `down`; with a gate, `up[0]` is the linear one.

    `fused`: the one `up` holds gate and up one after the other.
    """

    up: tuple[str, ...]
    down: str
    fused: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class LayerPattern:
    """A residual branch: `closing` (and the branch's own `norm` after it) ends it; `branch` are its other modules.

    `block` is the module with the shortcut inside, "" for the prefix itself. Not matched where a module of `absent` is;
    declined where one of `projection` has weights: the shortcut is no identity then.
    """

    closing: str
    branch: tuple[str, ...]
    norm: str = ""
    block: str = ""
    absent: tuple[str, ...] = ()
    projection: tuple[str, ...] = ()
    transposed: bool = False


HEADS: tuple[HeadPattern, ...] = (
    # BERT, RoBERTa, ELECTRA; then ViT as older versions of transformers write it
    HeadPattern("attention.output.dense", "attention.self.query", "attention.self.key", "attention.self.value"),
    HeadPattern(
        "attention.output.dense", "attention.attention.query", "attention.attention.key", "attention.attention.value"
    ),
    HeadPattern("attention.out_lin", "attention.q_lin", "attention.k_lin", "attention.v_lin"),  # DistilBERT
    # Llama, Mistral, Qwen, Gemma, ViT; then OPT, BART, Whisper, CLIP
    HeadPattern("o_proj", "q_proj", "k_proj", "v_proj"),
    HeadPattern("out_proj", "q_proj", "k_proj", "v_proj"),
    HeadPattern("self_attn.o_proj", fused="self_attn.qkv_proj"),  # Phi-3
    HeadPattern("attn.c_proj", fused="attn.c_attn", transposed=True),  # GPT-2
    # GPT-NeoX, Pythia; then BLOOM
    HeadPattern("attention.dense", fused="attention.query_key_value", interleaved=True),
    HeadPattern("self_attention.dense", fused="self_attention.query_key_value", interleaved=True),
)

MLPS: tuple[MlpPattern, ...] = (
    MlpPattern(("intermediate.dense",), "output.dense"),  # BERT, ViT
    MlpPattern(("mlp.up_proj", "mlp.gate_proj"), "mlp.down_proj"),  # Llama and its kin
    MlpPattern(("mlp.gate_up_proj",), "mlp.down_proj", fused=True),  # Phi-3
    MlpPattern(("mlp.c_fc",), "mlp.c_proj", transposed=True),  # GPT-2
    MlpPattern(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),  # GPT-NeoX, BLOOM
    MlpPattern(("ffn.lin1",), "ffn.lin2"),  # DistilBERT
)

LAYERS: tuple[LayerPattern, ...] = (
    # BERT puts its LayerNorm after the addition, so it belongs to no branch
    LayerPattern("attention.output.dense", ("attention.self",), block="attention"),
    LayerPattern("output.dense", ("intermediate",)),
    LayerPattern("self_attn.o_proj", ("self_attn", "input_layernorm")),
    LayerPattern("mlp.down_proj", ("mlp", "post_attention_layernorm")),
    LayerPattern("attn.c_proj", ("attn", "ln_1"), transposed=True),
    LayerPattern("mlp.c_proj", ("mlp", "ln_2"), transposed=True),
    LayerPattern("attention.dense", ("attention", "input_layernorm"), absent=("attention.output",)),
    LayerPattern("mlp.dense_4h_to_h", ("mlp", "post_attention_layernorm")),
    # torch.nn.TransformerEncoderLayer
    LayerPattern("self_attn.out_proj", ("self_attn",)),
    LayerPattern("linear2", ("linear1",)),
    # Residual networks as torchvision writes them: the basic block, the bottleneck
    LayerPattern("conv2", ("conv1", "bn1"), norm="bn2", absent=("conv3",), projection=("downsample", "shortcut")),
    LayerPattern("conv3", ("conv1", "bn1", "conv2", "bn2"), norm="bn3", projection=("downsample", "shortcut")),
)
