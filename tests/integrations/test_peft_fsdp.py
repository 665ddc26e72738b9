"""FSDP2 on two processes (gloo): a patched PEFT model that fully_shard takes apart trains as PEFT's own.

Not shown here, for want of a GPU: CUDA graphs, NCCL, and mixed precision under FSDP2.
"""

import json
import subprocess
import sys

import pytest
import ranks
import sharded


@pytest.mark.ranks
@pytest.mark.slow
def test_a_sharded_patched_model_trains_as_pefts_own(tmp_path):
    """Losses of four AdamW steps to 1e-4 of PEFT's; their mean is that of one process on the whole batch."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, sharded.__file__, str(tmp_path / "seen.json")]
    done = subprocess.run(command, env=ranks.environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = [json.loads((tmp_path / f"seen.json.{rank}").read_text()) for rank in (0, 1)]
    for each in seen:
        assert [each[" ".join(order)]["calls"] for order in sharded.ORDERS] == [0, 4 * 14, 4 * 14]
        for order in ("patch shard", "shard patch"):
            assert each[order]["losses"] == pytest.approx(each["shard"]["losses"], rel=1e-4)
    whole = sharded.train(["patch"])["losses"]
    means = [sum(pair) / 2 for pair in zip(*(each["patch shard"]["losses"] for each in seen), strict=True)]
    assert means == pytest.approx(whole, rel=1e-3) and whole[-1] < whole[0]
