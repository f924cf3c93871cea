"""Errors that are reported in one line, and errors that keep their traceback."""

import errno
import fcntl
import os

import pytest
import torch
import torch.distributed as dist

from spin.runtime.errors import UserError, explaining, user_message
from spin.runtime.files import hold_lock

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"
NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3384, "


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"{GLOO}pair.cc:553] Connection closed by peer [127.0.0.1]:1946. This is typically caused by"),
        RuntimeError(f"{GLOO}pair.cc:525] Read error [::1]:1234: Connection reset by peer"),
        RuntimeError(f"{GLOO}unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete"),
        dist.DistNetworkError(
            "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server crash?"
        ),
        dist.DistNetworkError("The client socket has timed out after 1000ms while trying to connect to (host, 29733)."),
        dist.DistStoreError("wait timeout after 1000ms, keys: /nokey"),
        dist.DistBackendError(f"{NCCL}ncclRemoteError: A call failed possibly due to a remote process exiting"),
        dist.DistBackendError("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)"),
        dist.DistBackendError("NCCL communicator was aborted on rank 1."),
    ],
)
def test_lost_peer(error):
    assert user_message(error).startswith("another process of this game has ended")


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError(f"{NCCL}ncclInvalidUsage: Mismatched NCCL version detected"),
        dist.DistNetworkError("The server socket has failed to listen. port: 29734, name: EADDRINUSE"),
        RuntimeError("Distributed package doesn't have NCCL built in"),
        RuntimeError("/data/NCCL/gloo/run timed out: no such file"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/NCCL/ncclRemoteError"),
        ValueError("a connection closed by peer, ProcessGroup, gloo/"),
        KeyError("out of memory"),
        RuntimeError("shape mismatch"),
    ],
)
def test_other_errors_keep_their_traceback(error):
    assert user_message(error) is None


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        dist.DistBackendError(f"{NCCL}ncclUnhandledCudaError. Last error: Cuda failure 2 'out of memory'"),
    ],
)
def test_out_of_memory_errors(error):
    assert user_message(error).startswith("out of memory")


def test_full_disk_as_cause_or_from_rust():
    wrapped = RuntimeError("generation of the data set failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    for error in (wrapped, Exception("I/O error: No space left on device (os error 28)")):
        assert user_message(error).startswith("no space left")


def test_permission_denied_names_the_file():
    error = PermissionError(errno.EACCES, "Permission denied", "/store")
    assert user_message(error).startswith("/store: permission denied; set")
    assert user_message(PermissionError(errno.EACCES, "Permission denied")) is None


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EXDEV])
def test_failing_disk(number):
    line = user_message(OSError(number, os.strerror(number), "/store/a"))
    assert line.startswith(f"disk error ({os.strerror(number)}: '/store/a'): ")
    assert user_message(OSError("error closing file")).startswith("disk error (error closing file)")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_disk_without_locks(number, tmp_path, monkeypatch):
    """A disk without flock, like some NFS mounts, is reported instead of waited for."""

    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises((OSError, NotImplementedError)) as raised, hold_lock(tmp_path / "lock", "x", print):
        pass
    assert user_message(raised.value).startswith("the disk has no file locks (flock): set store.path")


def test_no_home_directory():
    assert "set HOME" in user_message(RuntimeError("Could not determine home directory."))


def test_explaining_a_library_error():
    line = r"^x: no model \(two lines\); give another\.$"
    with pytest.raises(UserError, match=line) as raised, explaining("x: no model", "give another"):
        raise RuntimeError("two\nlines")
    assert isinstance(raised.value.__cause__, RuntimeError)
    with pytest.raises(UserError, match=r"^x: no model \(Is a directory\)\.$"), explaining("x: no model"):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", "/x")


@pytest.mark.parametrize("error", [UserError("one line"), MemoryError(), OSError(errno.ENOSPC, "full"), KeyError("k")])
def test_explaining_passes_other_errors(error):
    with pytest.raises(type(error)) as raised, explaining("x", catch=(OSError, MemoryError, ValueError)):
        raise error
    assert raised.value is error
