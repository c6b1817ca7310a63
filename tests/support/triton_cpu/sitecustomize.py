"""A stand-in Triton driver for the CPU, registered in every process that has this folder on its PYTHONPATH.

vLLM's Model Runner V2 wants Triton. With TRITON_INTERPRET=1 its kernels run in Triton's interpreter, which needs no
compiler; vLLM only asks whether a driver is there. For tests of logic: nothing is served this way.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import torch
    from triton.backends import Backend, backends
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime.driver import driver

    class InterpreterDriver(DriverBase):
        """Answers what is asked of a driver before a kernel is launched."""

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError("the interpreter compiles nothing")

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cpu", 0, 1)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: object = None) -> int:
            return 0

        def get_device_interface(self) -> object:
            return torch.cpu

        def get_empty_cache_for_benchmark(self) -> torch.Tensor:
            return torch.empty(0)

        def get_benchmarker(self) -> object:
            raise NotImplementedError("nothing is timed in the interpreter")

    backends["cpu"] = Backend(compiler=None, driver=InterpreterDriver)
    driver.set_active(InterpreterDriver())
