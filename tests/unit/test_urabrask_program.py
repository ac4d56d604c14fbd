"""Evaluation programs: what export writes the interpreter runs alike, and nothing but tensor operations is run."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kasmina.evaluation import export_evaluation, export_program, pack_data
from leyline import tensors
from leyline.model import Malformed
from leyline.program import METADATA, Node, Program, Source
from urabrask.evaluate import Answers, load_set, right
from urabrask.interpret import load_program

torch.set_num_threads(1)


class Net(nn.Module):
    """A convolution with BatchNorm and dropout, a tied matrix, a constant and two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.fc.weight
        self.register_buffer("shift", torch.full((4,), float("-inf")), persistent=False)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        x = self.drop(torch.relu(self.norm(self.conv(x)))).mean((2, 3))
        x = torch.maximum(self.tied(self.fc(x)), self.shift) * scale.unsqueeze(1)
        return x.masked_fill(x < -9.0, float("-inf")).clamp(min=-100.0)


def inputs(n: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(n, 1, 6, 6), torch.rand(n)


def test_the_program_answers_like_the_model_with_whatever_weights_it_is_given() -> None:
    model = Net().train()
    program = load_program(export_program(model, inputs()), name="program")
    other = Net()
    with torch.no_grad():
        other.norm.running_mean.add_(1)
    wanted = copy.deepcopy(other).eval()(*inputs(5))
    assert torch.equal(program(other.state_dict(), inputs(5)), wanted)
    assert model.training, "exporting leaves the model as it was"
    assert "norm.running_mean" in program.program.tensors


def test_the_program_holds_no_weights() -> None:
    arrays, _ = tensors.unpack(export_program(Net(), inputs()), name="program")
    assert set(arrays) == {"shift"}


def test_hooks_are_not_traced_and_stay() -> None:
    model, seen = Net(), []
    model.norm.register_forward_hook(lambda *_: seen.append(1))
    export_program(model, inputs())
    assert not seen
    model(*inputs())
    assert seen


def test_a_wrapper_keeps_its_own_tensors_and_leaves_the_models_to_the_checkpoint() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 4)
            self.head = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x))

    wrapper, x = Wrapper(), torch.randn(6, 3)
    program = load_program(export_program(wrapper, (x,), prefix="inner."), name="program")
    assert set(program.program.tensors) == {"weight", "bias"}
    assert torch.equal(program(wrapper.inner.state_dict(), (x,)), wrapper(x))
    with pytest.raises(Malformed, match=r"no tensor of Wrapper begins with 'outer\.'"):
        export_program(wrapper, (x,), prefix="outer.")


@pytest.mark.parametrize(
    ("forward", "sentence"),
    [
        (lambda m, x: (m(x), x), "must return one tensor of logits"),
        (lambda m, x: m(x).sum(1), "returns 1 dimensions"),
        (lambda m, x: m(x) + torch.rand(5), "is random"),
        (lambda m, x: nn.functional.dropout(m(x), 0.5, training=True), "is in training mode"),
        (lambda m, x: m(x).reshape(2, 5), "fixes the number of samples"),
        (lambda m, x: m(x) if bool(x.sum() > 0) else x, "cannot trace"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_at_publishing(forward, sentence: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self.fc, x)

    with pytest.raises(Malformed, match=sentence):
        export_program(Odd(), (torch.randn(4, 5),))


def program(*nodes: Node, output: str = "y") -> bytes:
    """A program's file by hand: x is input 0, w the checkpoint's tensor."""
    sources = (Source(node="x", input=0), Source(node="w", tensor="w"))
    text = Program(torch="2.15", sources=sources, nodes=nodes, output=output).to_json()
    return tensors.pack({}, {METADATA: text})


X, W = {"node": "x"}, {"node": "w"}


def test_a_program_by_hand_runs() -> None:
    run = load_program(program(Node(name="y", op="aten.mul.Tensor", args=(X, W))), name="program")
    assert run({"w": torch.tensor([2.0, 3.0])}, (torch.ones(1, 2),)).tolist() == [[2.0, 3.0]]


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        (Node(name="y", op="os.system", args=("true",)), "is no tensor operation"),
        (Node(name="y", op="torch.load", args=("file",)), "is no tensor operation"),
        (Node(name="y", op="operator.attrgetter", args=("__class__",)), "is no arithmetic"),
        (Node(name="y", op="operator.getitem.__globals__", args=(X,)), "is no arithmetic"),
        (Node(name="y", op="higher_order.cond", args=(X,)), "is no tensor operation"),
        (Node(name="y", op="aten.from_file.default", args=("/etc/hostname", False, 1)), "has a text argument"),
        (Node(name="y", op="aten.save.default", args=(X, "/tmp/x")), "has a text argument"),
        (Node(name="y", op="aten.mul.Tensor", args=(X, ["a"])), "has a text argument"),
        (Node(name="y", op="aten._cuda_getDeviceCount.default"), "is internal"),
        (Node(name="y", op="aten.randn_like.default", args=(X,)), "is random"),
        (Node(name="y", op="aten.bernoulli.p", args=(X, 0.5)), "is random"),
        (Node(name="y", op="aten.dropout.default", args=(X, 0.1, True)), "training mode"),
        (Node(name="y", op="aten.dropout.default", args=(X, 0.1), kwargs={"train": True}), "training mode"),
        (Node(name="y", op="aten.mul.Tensor", args=(X, {"node": "z"})), "computed nowhere"),
        (Node(name="z", op="aten.mul.Tensor", args=(X, W)), "its output y"),
        (Node(name="y", op="aten.nothing_such.default", args=(X,)), "has no operation"),
    ],
)
def test_anything_else_than_tensor_operations_is_refused_before_it_runs(node: Node, sentence: str) -> None:
    with pytest.raises(Malformed, match=sentence):
        load_program(program(node), name="program")


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        (Node(name="y", op="aten.mul_.Tensor", args=(W, 2.0)), "writes into w"),
        (Node(name="y", op="aten.mul.Tensor", args=(X, {"dtype": "nn"})), "no dtype"),
        (Node(name="y", op="aten.mul.Tensor", args=(X, {"call": "exit"})), "of no known kind"),
        (Node(name="y", op="aten.mm.default", args=(X, W)), "failed"),
        (Node(name="y", op="aten.sum.default", args=(X,)), "logits are"),
    ],
)
def test_a_program_that_misbehaves_ends_in_a_sentence(node: Node, sentence: str) -> None:
    run = load_program(program(node), name="program")
    with pytest.raises(Malformed, match=sentence):
        run({"w": torch.ones(2, 2)}, (torch.ones(2, 3) if "mm" in node.op else torch.ones(2, 2),))


@pytest.mark.parametrize(
    ("given", "target"),
    [
        ((), None),
        ((torch.ones(3, 2), torch.ones(4, 2)), None),
        ((torch.ones(0, 2),), None),
        ((torch.ones(3, 2),), torch.zeros(3)),
        ((torch.ones(3, 2),), torch.zeros(4, dtype=torch.int64)),
    ],
)
def test_an_evaluation_set_that_does_not_belong_together_is_refused(given, target) -> None:
    with pytest.raises(Malformed):
        pack_data(given, target)


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"target": np.zeros(3, np.int64)},
        {"input.1": np.zeros(3)},
        {"input.0": np.zeros(3), "input.1": np.zeros(4)},
        {"input.0": np.zeros(3), "target": np.zeros(3)},
        {"input.0": np.zeros(3), "more": np.zeros(3)},
    ],
)
def test_an_evaluation_set_written_by_others_is_refused_too(arrays) -> None:
    with pytest.raises(Malformed):
        load_set(tensors.pack(arrays, {}), name="evaluation.safetensors")


def test_without_a_target_the_references_own_answer_is_right() -> None:
    x = torch.randn(4, 5)
    model = nn.Linear(5, 3)
    _, unlabelled = export_evaluation(model, (x,), None)
    labelled = pack_data((x,), torch.tensor([0, 1, 2, 0]))
    reference, candidate = Answers(np.array([0, 1, 1, 1]), 0), Answers(np.array([0, 2, 1, 0]), 0)
    data = load_set(unlabelled, name="data")
    assert right(reference, reference, data).all()
    assert right(candidate, reference, data).tolist() == [True, False, True, False]
    data = load_set(labelled, name="data")
    assert right(candidate, reference, data).tolist() == [True, False, False, True]
