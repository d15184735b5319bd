"""What builds and runs MetaSchedule's candidates on CUDA.

TVM's own builder starts its processes anew each time; its runner links what they built, and fills
gigabytes of tensors by the processor, while the GPU waits. Here processes stay, link too, and
tensors are left as they are: no time depends on what is in them. Several searches may take turns on
one GPU.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..tensor_intrinsics import bare_stack, building
from ..turns import turn

__all__ = ["builder", "runner"]

# Seconds for one candidate: some unroll a thousand products, and compilers take minutes for them.
_BUILD, _RUN = 40, 40


def builder(workers: int) -> Any:
    """Builds in so many processes, which stay until this one ends."""
    from tvm.ir.utils import derived_object
    from tvm.s_tir import meta_schedule as ms
    from tvm.support.popen_pool import PopenPoolExecutor, StatusKind

    pool = PopenPoolExecutor(workers, timeout=_BUILD, initializer=bare_stack)

    @derived_object
    class Builder(ms.builder.PyBuilder):
        def build(self, build_inputs: list[Any]) -> list[Any]:
            results = []
            given = [(each.mod, each.target) for each in build_inputs]
            for done in pool.map_with_error_catching(_built, given):
                if done.status == StatusKind.COMPLETE:
                    results.append(ms.builder.BuilderResult(done.value, None))
                else:
                    reason = str(done.value) or f"no kernel within {_BUILD} s"
                    results.append(ms.builder.BuilderResult(None, reason))
            return results

    return Builder()


def _built(given: tuple[Any, Any]) -> str:
    """In the other process: the path of a library, in a folder of its own."""
    from tvm.s_tir.meta_schedule.builder.local_builder import default_build

    folder = tempfile.mkdtemp(prefix="metaschedule-")
    try:
        library = Path(folder) / "candidate.so"
        with building(given[0]):
            default_build(*given, None).export_library(str(library))
    except BaseException:
        shutil.rmtree(folder)
        raise
    return str(library)


def runner(lock: Path | None = None) -> Any:
    """Runs candidates in a process of their own, while nobody else holds `lock`."""
    from tvm.ir.utils import derived_object
    from tvm.s_tir import meta_schedule as ms

    # A tenth of TVM's time: it ranks candidates, and the fastest are measured again.
    brief = ms.runner.EvaluatorConfig(number=1, repeat=3, min_repeat_ms=10)
    local = ms.runner.LocalRunner(_RUN, brief, f_alloc_argument=_unfilled, initializer=bare_stack)

    @derived_object
    class Runner(ms.runner.PyRunner):
        def run(self, runner_inputs: list[Any]) -> list[Any]:
            with turn(lock):
                return local.run(runner_inputs)

    return Runner()


def _unfilled(device: Any, args_info: Any, alloc_repeat: int) -> list[list[Any]]:
    from tvm.s_tir.meta_schedule.runner.utils import alloc_argument_common

    return alloc_argument_common(lambda tensor: None, device, args_info, alloc_repeat)
