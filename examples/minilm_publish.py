"""Publishes MiniLM as a run: nobody trains it, so its statistics are those of forward passes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minilm_docstrings import docstrings
from minilm_retrieval import POOL, Evaluation, Retrieval, accuracy, evaluation_of, load_minilm, look, sentences
from torch import Tensor, nn

from kasmina import ImportanceTracker, TrainingRun, trace_topology
from leyline.log import Entry
from leyline.topology import Topology

MODEL = "minilm-l6"
SAMPLES = 1000
"""Queries of the evaluation, and as many other docstrings for the statistics."""


@dataclass
class Minilm:
    """The model, what it is measured with, and its run."""

    folder: Path
    model: nn.Module
    topology: Topology
    evaluation: Evaluation
    sentences: list[Tensor]
    run: TrainingRun

    def publish(self, step: int) -> Entry:
        """A checkpoint of the weights as they are, with fresh statistics of 1,000 sentences."""
        return self.run.publish(
            step=step,
            epoch=1,
            evaluation=self.evaluation,
            evaluation_model=Retrieval(self.model),
            evaluation_batch=POOL,
            refresh=SAMPLES,
            data=(look, self.sentences),
            gradients=False,
        )

    def take_masks(self, step: int) -> Entry:
        """What a trainer does at its next checkpoint: take the masks, report, publish."""
        news = self.run.sync()
        if news.error:
            raise RuntimeError(news.error)
        right = accuracy(self.model, self.evaluation)
        self.run.report(step=step, epoch=1, loss=1 - right / SAMPLES, correct=right, n=SAMPLES)
        return self.publish(step)


def open_minilm(folder: Path) -> Minilm:
    """Load, trace, open the run (its tip is loaded where it has one)."""
    texts = docstrings(2 * SAMPLES)
    model, evaluation = load_minilm(), evaluation_of(texts[:SAMPLES])
    queries = evaluation[0][0][:2]
    example = {"input_ids": queries, "attention_mask": (queries != 0).long()}
    topology = trace_topology(model, example, model_id=MODEL)
    tracker = ImportanceTracker(model, topology)
    run = TrainingRun.start(str(folder), model=model, model_id=MODEL, tracker=tracker)
    return Minilm(folder, model, topology, evaluation, sentences(texts[SAMPLES:]), run)
