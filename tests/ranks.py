"""Several processes that train one model together, over gloo: what they save is a real distributed checkpoint.

`save` and `load` start them; each runs this file.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.functional import cross_entropy

RANKS = {"fsdp": 2, "grid": 4}
"""Processes of each way to share: rows by FSDP, with moments; or each matrix as a grid of 2 by 2."""
LIMIT = 120


class Net(nn.Module):
    """Sides that no number of ranks divides, a tensor with fewer rows than ranks, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(33, 71), nn.LayerNorm(71), nn.Linear(71, 5)
        self.gain = nn.Parameter(torch.rand(1, 5))
        self.register_buffer("seen", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.norm(self.up(x)))) * self.gain


def save(way: str, folder: Path) -> dict[str, Tensor]:
    """A checkpoint in `folder`; the weights that it holds, whole."""
    return _together("save", way, folder)


def load(way: str, folder: Path) -> dict[str, Tensor]:
    """What the same number of processes, with fresh weights, hold after they have loaded it."""
    return _together("load", way, folder)


def _together(what: str, way: str, folder: Path) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as scratch:
        processes = [
            subprocess.Popen(
                (sys.executable, __file__, what, way, str(folder), scratch, str(rank)),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(RANKS[way])
        ]  # fmt: skip
        try:
            said = [process.communicate(timeout=LIMIT)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        assert not any(process.returncode for process in processes), "\n".join(said)
        return load_file(Path(scratch) / "whole.safetensors")


def main(what: str, way: str, folder: str, scratch: str, rank: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(3 if what == "save" else 4)
    dist.init_process_group("gloo", init_method=f"file://{scratch}/met", rank=int(rank), world_size=RANKS[way])
    state = (sharded if way == "fsdp" else grid)(what, folder)
    whole = {
        name: (one.full_tensor() if isinstance(one, DTensor) else one).detach().clone() for name, one in state.items()
    }
    if rank == "0":
        save_file(whole, f"{scratch}/whole.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def sharded(what: str, folder: str) -> dict[str, Tensor]:
    model = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS["fsdp"],)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    cross_entropy(model(torch.rand(8, 33)), torch.arange(8) % 5).backward()
    optimizer.step()
    state, moments = get_state_dict(model, optimizer)
    both = {"model": state, "optimizer": moments}
    if what == "save":
        dcp.save(both, checkpoint_id=folder)
    else:
        dcp.load(both, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=moments)
    return dict(get_state_dict(model, optimizer)[0])


def grid(what: str, folder: str) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2, 2))
    state: dict[str, Tensor] = {
        name: distribute_tensor(one, mesh, [Shard(0), Shard(1)]) if one.dim() == 2 else one
        for name, one in Net().state_dict().items()
    }
    (dcp.save if what == "save" else dcp.load)(state, checkpoint_id=folder)
    return state


if __name__ == "__main__":
    main(*sys.argv[1:])
