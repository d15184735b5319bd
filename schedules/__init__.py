"""The schedules, hand-written and searched, one a file, in the order that `select` asks them in."""

from .base import Schedule, ScheduleError
from .cpu_blocked import SCHEDULE as CPU_BLOCKED
from .cuda_depthwise import SCHEDULE as CUDA_DEPTHWISE
from .cuda_depthwise_mma import SCHEDULE as CUDA_DEPTHWISE_MMA
from .cuda_mma import SCHEDULE as CUDA_MMA
from .cuda_simt import EXPLICIT as CUDA_SIMT_EXPLICIT
from .cuda_simt import IMPLICIT as CUDA_SIMT
from .cuda_simt_async import EXPLICIT as CUDA_SIMT_ASYNC_EXPLICIT
from .cuda_simt_async import IMPLICIT as CUDA_SIMT_ASYNC
from .cuda_thin import SCHEDULE as CUDA_THIN
from .cuda_thin import TF32 as CUDA_THIN_TF32
from .cuda_thin_fp32 import SCHEDULE as CUDA_THIN_FP32
from .cuda_window import SCHEDULE as CUDA_WINDOW
from .cuda_window import TF32 as CUDA_WINDOW_TF32
from .cuda_window_fp32 import SCHEDULE as CUDA_WINDOW_FP32
from .metaschedule import CPU as CPU_METASCHEDULE
from .metaschedule import CUDA as CUDA_METASCHEDULE

SCHEDULES: dict[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        CPU_BLOCKED,
        CUDA_THIN,
        CUDA_THIN_TF32,
        CUDA_THIN_FP32,
        CUDA_WINDOW,
        CUDA_WINDOW_TF32,
        CUDA_DEPTHWISE_MMA,
        CUDA_DEPTHWISE,
        CUDA_WINDOW_FP32,
        CUDA_SIMT_ASYNC,
        CUDA_SIMT_ASYNC_EXPLICIT,
        CUDA_MMA,
        CUDA_SIMT,
        CUDA_SIMT_EXPLICIT,
        CPU_METASCHEDULE,
        CUDA_METASCHEDULE,
    )
}

__all__ = ["SCHEDULES", "Schedule", "ScheduleError"]
