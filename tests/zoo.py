"""Small models, one for each way that parameters hang together."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_DIGITS = Path(__file__).parent.parent / "examples" / "digits_model.py"
_spec = importlib.util.spec_from_file_location("digits_model", _DIGITS)
assert _spec is not None
assert _spec.loader is not None
_digits = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_digits)
ResNet = _digits.ResNet
"""The demo's model: 174,970 parameters, 224 inner and 112 residual channels, four removable branches."""


class SmallCNN(nn.Module):
    """Convolutions, one with a norm and one with a bias, then flatten: a channel is 49 columns of `fc`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 49, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        return self.fc(torch.flatten(x, 1))


class Depthwise(nn.Module):
    """Expand, depthwise, project."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.project = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm1(self.expand(x)))
        x = F.relu6(self.norm2(self.depthwise(x)))
        return self.project(x).mean((2, 3))


class Grouped(nn.Module):
    """A grouped convolution between two plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.last = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.grouped(F.relu(self.first(x))))).mean((2, 3))


class Concat(nn.Module):
    """Dense connections: norms and convolutions over what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(10), nn.Conv2d(10, 4, 3, padding=1)
        self.fc = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        x = torch.cat([x, self.conv2(F.relu(self.norm2(x)))], 1)
        return self.fc(F.relu(x).mean((2, 3)))


class Split(nn.Module):
    """The halves of a convolution's outputs go different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.left, self.right = nn.Conv2d(6, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(F.relu(self.stem(x)), [6, 4], 1)
        return (self.left(a) + self.right(b)).mean((2, 3))


class SqueezeExcite(nn.Module):
    """A convolution whose channels are scaled by a small network of their means."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        scale = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return self.last(x * scale[:, :, None, None]).mean((2, 3))


class Chain(nn.Sequential):
    """Linear layers with `between` in the middle."""

    def __init__(self, *between: nn.Module, width: int = 8) -> None:
        super().__init__(nn.Linear(6, width), *between, nn.Linear(width, 3))


class Shuffle(nn.Module):
    """Channels change places between convolutions: no offset or block says where they went."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        n, c, h, w = x.shape
        x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.last(x).mean((2, 3))


class Attention(nn.Module):
    """A transformer layer of torch.nn between two linear ones; `separate` keeps q, k and v weights apart."""

    def __init__(self, separate: bool = False) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(5, 12), nn.Linear(12, 3)
        self.attention = nn.MultiheadAttention(
            12, 3, batch_first=True, kdim=5 if separate else None, vdim=5 if separate else None
        )
        self.separate = separate

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        given = x if self.separate else h
        return self.out(h + self.attention(h, given, given, need_weights=False)[0])


class Encoder(nn.Module):
    """torch.nn's own encoder layer, with LayerNorm after the additions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x).mean(1))


def transformer(name: str, **changed: Any) -> nn.Module:
    """A tiny model of the transformers library, with random weights: 'bert', 'gpt2', 'llama', 'qwen3' or 'gpt_neox'."""
    import transformers as t

    plain = {
        "vocab_size": 40,
        "num_hidden_layers": 2,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "max_position_embeddings": 16,
    } | changed
    kv = {"num_key_value_heads": 2, "head_dim": 6}
    if name == "bert":
        return t.BertForSequenceClassification(t.BertConfig(**plain, attn_implementation="eager"))
    if name == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=40, n_layer=2, n_embd=24, n_head=4, n_positions=16))
    if name == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**(kv | plain)))
    if name == "qwen3":
        return t.Qwen3ForCausalLM(t.Qwen3Config(**(kv | plain)))
    if name == "gpt_neox":
        return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**plain))
    raise ValueError(f"no tiny {name}")
