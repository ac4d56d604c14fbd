"""What Hugging Face's Trainer and Lightning save by themselves: imported, pruned, and taken back by them."""

from __future__ import annotations

import shutil
from pathlib import Path

import lightning
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from commands import emrakul, emrakul_run
from leyline import layout

WORDS = torch.randint(0, 64, (16, 6), generator=torch.Generator().manual_seed(1))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*no accelerator is found.*:UserWarning"),
    # the trainings that follow write elsewhere on purpose
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    # Lightning 2.6 still uses torch's LeafSpec, which torch has renamed
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


def bert() -> nn.Module:
    """Two layers, and the words' table."""
    torch.manual_seed(2)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return transformers.BertForSequenceClassification(config)


class Items(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return len(WORDS)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"input_ids": WORDS[at], "labels": (WORDS[at, 0] > 32).long()}


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.bert = bert()

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.bert(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class HuggingFace:
    """A folder of nine files, of which one holds the weights."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.saved, self.model = folder, folder / "checkpoint-2", bert()
        self.weights = Path("model.safetensors")

    def train(self, steps: int, *, resume: Path | None = None) -> int:
        arguments = transformers.TrainingArguments(
            str(self.folder), max_steps=steps, save_steps=2, use_cpu=True, report_to="none", disable_tqdm=True
        )
        trainer = transformers.Trainer(model=self.model, args=arguments, train_dataset=Items())
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return int(trainer.state.global_step)


class Lightning:
    """One file, with the moments and the loops beside the weights."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.saved, self.module = folder, folder / "checkpoints", Module()
        self.model, self.weights = self.module.bert, Path("step=2.ckpt")

    def train(self, steps: int, *, resume: Path | None = None) -> int:
        saving = ModelCheckpoint(self.saved, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = lightning.Trainer(
            max_steps=steps, callbacks=[saving], accelerator="cpu", logger=False, default_root_dir=self.folder,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        batches = DataLoader(Items(), batch_size=8)
        trainer.fit(self.module, batches, ckpt_path=None if resume is None else resume / self.weights)
        return int(trainer.global_step)


@pytest.mark.parametrize("kind", [HuggingFace, Lightning])
def test_a_trainer_goes_on_from_the_candidate_of_what_it_saved(
    tmp_path: Path, kind: type[HuggingFace | Lightning]
) -> None:
    first = kind(tmp_path / "trained")
    first.train(2)
    run = (tmp_path / "run").as_uri()
    done = emrakul("import", str(first.saved), run, "--model-id", "bert")
    assert done["checkpoint"].startswith("2-"), "the step, from the names"

    ended = emrakul_run(tmp_path, run).end()
    assert (ended["outcome"], ended["reason"]) == ("ValidatedOnly", "NoEvaluation"), ended["said"]
    (budget,) = ended["budgets"]
    assert budget["achieved"] > 100

    candidate = tmp_path / "candidate"
    shutil.copytree(first.saved, candidate)
    shutil.copy(tmp_path / "run" / layout.candidate(ended["cycle"], done["record"], str(first.weights)), candidate)
    second = kind(tmp_path / "again")
    assert second.train(2, resume=candidate) == 2, "nothing is left to do, so these are the candidate's weights"
    gone = 0
    for (name, before), after in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        dead = (after == 0) & (before != 0)
        assert bool((dead | (after == before)).all()), name
        gone += int(dead.sum())
    assert gone == budget["achieved"]
    third = kind(tmp_path / "further")
    assert third.train(4, resume=candidate) == 4
