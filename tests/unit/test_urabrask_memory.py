"""The byte checks hold a few chunks, however large the checkpoint is, and never import torch."""

import json
import subprocess
import sys
from pathlib import Path

LIMIT = 256_000_000

SCRIPT = """
import json, sys
import numpy as np
from builders import Tensor, masks_of
from candidates import publish, stage
from leyline.ids import parameter_uuid
from leyline.open import open_store
from leyline.topology import Group, Kind, Member, Parameter, Topology
from urabrask.structure import check_bytes

folder, step = sys.argv[1:]
rows, columns = 6_000, 10_000
name, shape = "fc.weight", (rows, columns)
members = (Member(parameter=name, role="producer", axis=0), )
group = Group(id="fc", kind=Kind.CHANNEL, units=rows, members=members, gates=("fc",))
parameter = Parameter(uuid=parameter_uuid(name, shape, "toy"), shape=shape)
topology = Topology(model_id="toy", parameters={name: parameter}, groups=(group,))
store = open_store(folder)
pruned = {"fc": range(0, rows, 100)}
if step == "write":
    weights = {name: Tensor("F32", shape, np.ones(shape, "<f4").tobytes())}
    metadata = publish(store, topology, weights)
    staged = stage(store, metadata, topology, weights, pruned)
    with open(folder + ".json", "w") as file:
        json.dump([metadata.model_dump_json(), staged.candidate.model_dump_json()], file)
else:
    from leyline.messages import Candidate, CheckpointMetadata

    with open(folder + ".json") as file:
        metadata, candidate = json.load(file)
    metadata = CheckpointMetadata.model_validate_json(metadata)
    candidate = Candidate.model_validate_json(candidate)
    assert check_bytes(store, metadata, candidate, masks_of(topology, pruned), topology)
    with open("/proc/self/status") as file:  # ru_maxrss would include what the parent held when it forked
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    print(json.dumps({"peak": peak, "torch": "torch" in sys.modules, "bytes": metadata.num_bytes}))
"""


def test_240_mb_are_compared_in_less_than_256_mb(tmp_path: Path) -> None:
    def run(step: str) -> str:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), step]
        here = Path(__file__).parents[1]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=here)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("write")
    found = json.loads(run("check"))
    assert found["bytes"] > 240_000_000, "large enough that holding it whole would be noticed"
    assert not found["torch"]
    assert found["peak"] < LIMIT
