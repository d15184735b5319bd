"""Machine code of wgmma kernels: nothing touches the sums while products are under way."""

import re
import shutil
from pathlib import Path

import pytest

from im2win_tvm import lower, suites, toolchain
from im2win_tvm.schedules import SCHEDULES
from im2win_tvm.target import CudaTarget

TARGET = CudaTarget("sm_90a")
# Schedule, layer of the paper, dtype and layout. The first is whole tiles in NCHW, where no branch
# stands between the last wait and the first read.
KERNELS = [
    ("cuda_mma", "conv12", "bfloat16", "NCHW"),
    pytest.param("cuda_mma", "conv11", "float16", "NHWC", marks=pytest.mark.slow),
    pytest.param("cuda_window", "conv12", "float16", "NHWC", marks=pytest.mark.slow),
    pytest.param("cuda_window_fp32", "conv12", "float32", "NHWC", marks=pytest.mark.slow),
    pytest.param("cuda_thin", "conv1", "float16", "NHWC", marks=pytest.mark.slow),
    pytest.param("cuda_thin_fp32", "conv1", "float32", "NHWC", marks=pytest.mark.slow),
    pytest.param("cuda_thin_fp32", "conv7", "float32", "NHWC", marks=pytest.mark.slow),
]


def nvdisasm() -> str:
    """On the PATH, or in PyPI's package of that name."""
    found = shutil.which("nvdisasm")
    if found is None:
        nvidia = pytest.importorskip("nvidia", reason="no nvdisasm found")
        places = (Path(place) / "cu13" / "bin" / "nvdisasm" for place in nvidia.__path__)
        found = next((str(place) for place in places if place.exists()), None)
    if found is None:
        pytest.skip("no nvdisasm found")
    return found


def machine_code(folder, name, problem) -> str:
    """Of the kernels that the heuristic's configuration gives."""
    schedule = SCHEDULES[name]
    module = lower.lower(schedule.build(problem, schedule.default(problem, TARGET), TARGET))
    unit, code = folder / "kernel.cu", folder / "kernel.cubin"
    # The kernels stand before the host code, which takes nvcc several times longer.
    unit.write_text(lower.cuda_source(module, TARGET).partition("#include <tvm/ffi/")[0])
    toolchain.run([
        str(toolchain.find_nvcc().path), "-cubin", "-O3", "-std=c++17", f"-arch={TARGET.arch}",
        "-diag-suppress", "174,177", "-o", str(code), str(unit),
    ])  # fmt: skip
    return toolchain.run([nvdisasm(), "-c", str(code)])


def early(code: str) -> list[str]:
    """Instructions that name sums of products which no wait has ended yet, in the order of text."""
    groups, group, found = [], set(), []
    for text in re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", code):
        if product := re.search(r"HGMMA\.64x(\d+)x\S*\s+R(\d+)", text):
            columns, first = map(int, product.groups())
            group |= set(range(first, first + columns // 2))
            if "gsb0" in text:
                groups.append(group)
                group = set()
        elif wait := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)", text):
            groups = groups[max(0, len(groups) - int(wait[1])) :]
        elif set(map(int, re.findall(r"\bR(\d+)", text))) & set().union(group, *groups):
            found.append(text)
    return found


@pytest.mark.parametrize("name, layer, dtype, layout", KERNELS)
def test_sums_are_read_after_the_wait(name, layer, dtype, layout, tmp_path):
    try:
        toolchain.find_nvcc()
    except toolchain.ToolchainError as error:
        pytest.skip(str(error))
    problem = suites.layer("paper", layer, 128, dtype, layout)
    code = machine_code(tmp_path, name, problem)
    assert code.count("HGMMA") > 3
    assert not early(code)


def test_early_reads_are_found():
    code = """
        /*0010*/ HGMMA.64x16x16.F32 R24, gdesc[UR16], R24 ;
        /*0020*/ HGMMA.64x16x16.F32 R24, gdesc[UR16], R24, gsb0 ;
        /*0030*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0040*/ IADD3 R32, R33, R34, RZ ;
        /*0050*/ F2FP.F16.F32.PACK_AB R6, R31, R30 ;
        /*0060*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/ F2FP.F16.F32.PACK_AB R6, R25, R24 ;
    """
    assert early(code) == ["F2FP.F16.F32.PACK_AB R6, R31, R30 "]
