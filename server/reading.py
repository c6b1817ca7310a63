"""Reads a checkpoint in a process of its own.

Inside a worker that goes on decoding, reading would hold every stream up, for imports and tokenizers keep Python to
themselves, and could harm it: transformers sets torch's default precision, which all threads share.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.head_models import ServedBase
from steersman.processes import end_with_parent

POLICY, REWARD_MODEL = "policy", "reward_model"
"""Kinds of model, as the admin routes call them."""

_REFUSED = 3


@dataclass(frozen=True)
class Wanted:
    """A checkpoint, and the base model that it must fit."""

    kind: str
    name: str
    path: str
    base: str
    tokenizer: str
    dtype: str
    """As torch names it: "bfloat16"."""
    trust_remote_code: bool
    served: ServedBase
    """The base model as it is served."""

    @property
    def label(self) -> str:
        """How errors name the model."""
        return f"{self.kind.replace('_', ' ')} {self.name!r}"


def read_apart(wanted: Wanted) -> Any:
    """A RewardCheckpoint, or a policy's model, on the host; raises ModelRefused.

    It is handed over in memory that belongs to no file system: the tensors lie there.
    """
    file = os.memfd_create(f"steersman-{wanted.name}")
    try:
        code = subprocess.run(
            [sys.executable, "-m", "steersman.server.reading", str(os.getpid()), str(file), json.dumps(asdict(wanted))],
            pass_fds=(file,),
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
        ).returncode
        if code == _REFUSED:
            raise ModelRefused(os.pread(file, 2**16, 0).decode())
        if code != 0:
            ended = f"was killed by signal {-code}, perhaps for want of memory" if code < 0 else f"failed ({code})"
            raise ModelRefused(f"{wanted.label}: reading {wanted.path} {ended}; see the server's log")
        if wanted.trust_remote_code:
            from transformers.dynamic_module_utils import init_hf_modules

            init_hf_modules()
        return torch.load(_path(file), mmap=True, weights_only=False)
    finally:
        os.close(file)


def read(wanted: Wanted) -> Any:
    """The same in this process."""
    options: dict[str, Any] = {
        "dtype": getattr(torch, wanted.dtype),
        "trust_remote_code": wanted.trust_remote_code,
        "served": wanted.served,
    }
    from steersman.guidance.policies import read_policy_checkpoint
    from steersman.guidance.reward_loading import read_reward_checkpoint
    from steersman.server.loading import load_tokenizer

    tokenizer = load_tokenizer(wanted.tokenizer, wanted.trust_remote_code)
    if wanted.kind == POLICY:
        return read_policy_checkpoint(wanted.name, wanted.path, wanted.base, tokenizer, **options)
    return read_reward_checkpoint(wanted.name, wanted.path, tokenizer, **options)


def main(arguments: Sequence[str]) -> int:
    """The process: the process that waits for it, an inherited file to write to, and a Wanted as JSON."""
    # Whoever decodes goes first, and where nobody waits for the checkpoint nobody reads it.
    os.nice(3)
    end_with_parent(int(arguments[0]), signal.SIGKILL)
    file, given = int(arguments[1]), json.loads(arguments[2])
    wanted = Wanted(**{**given, "served": ServedBase(**given["served"])})
    torch.set_num_threads(1)
    try:
        torch.save(read(wanted), _path(file))
    except ModelRefused as refusal:
        os.pwrite(file, str(refusal).encode(), 0)
        return _REFUSED
    return 0


def _path(file: int) -> str:
    return f"/proc/self/fd/{file}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
