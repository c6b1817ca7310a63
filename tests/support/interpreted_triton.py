"""Imports Triton and our kernels so that they run in Triton's interpreter where there is no GPU, in this process alone.

Both are bound to the interpreter, or not, when they are first imported; servers that tests start must not be.
"""

import importlib
import os
import sys

import torch

if not torch.cuda.is_available():
    assert "triton" not in sys.modules, "Triton was imported, and bound to its compiler, before the tests' own import"
    os.environ["TRITON_INTERPRET"] = "1"
# The interpreter's launcher imports the first.
for _name in (
    "triton.experimental.gluon",
    *(
        f"steersman.kernels.{k}"
        for k in ("attention", "blend", "gather", "head_blend", "head_rerank", "rerank", "topk")
    ),
):
    importlib.import_module(_name)
os.environ.pop("TRITON_INTERPRET", None)
