"""The end of a process of a group."""

import pytest

from tests.engines.test_deepspeed import torchrun

PROGRAM = """
import atexit, sys
import torch.distributed as dist
from spin.runtime.process_group import exit_process, join_group, leave_group

ranks = join_group("deepspeed", "cpu")
kept = dist.group.WORLD  # as DeepSpeed keeps it
ranks.barrier()
leave_group()
atexit.register(open(sys.argv[1] + f"/{ranks.rank}", "w").close)
exit_process(int(sys.argv[2]))
"""


@pytest.mark.parametrize("status", [0, 3])
def test_exit_with_a_kept_group(tmp_path, status):
    """A group whose threads still run does not change the exit status. The normal shutdown aborts in two of three runs."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = torchrun(6, str(program), str(tmp_path), str(status), env={"PYTHONPATH": "."})
    assert (done.returncode == 0) == (status == 0) and "terminate called" not in done.stderr
    if status == 0:
        assert all((tmp_path / str(rank)).exists() for rank in range(6))
    else:
        assert f"exitcode  : {status}" in done.stderr
