"""Modules that hold schedules of TensorIR and TIRx kernels: emulated, and as one CUDA source."""

import pytest
import tvm
from tvm import te
from tvm.script import tirx as T

from im2win_tvm import emulate, reference, tensors, toolchain
from im2win_tvm.lower import cuda_source, lower
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules.base import CONV, PREPARE
from im2win_tvm.target import CudaTarget


class Pointwise:
    """A convolution with 1 x 1 filters: TensorIR copies the weights, TIRx does the rest."""

    def build(self, problem, config, target, epilogue):
        images, channels, (height, width) = problem.batch, problem.in_channels, problem.input_size
        outputs = problem.out_channels
        w = te.placeholder(problem.weight_shape, name="w")
        packed = te.compute((outputs, channels), lambda o, c: w[o, c, 0, 0], name="packed")
        schedule = tvm.s_tir.Schedule(te.create_prim_func([w, packed]))
        schedule.bind(schedule.fuse(*schedule.get_loops("packed")), "blockIdx.x")

        @T.prim_func
        def conv(
            x: T.Buffer(problem.input_shape, "float32"),
            packed: T.Buffer((outputs, channels), "float32"),
            y: T.Buffer(problem.output_shape, "float32"),
        ):
            T.device_entry()
            row, image = T.cta_id([height, images])
            o = T.thread_id([outputs])
            weights = T.decl_buffer((outputs * channels,), "float32", data=packed.data)
            line = T.alloc_shared((width,), "float32")
            sums = T.alloc_local((width,), "float32")
            for j in T.unroll(width):
                sums[j] = T.float32(0)
            for c in T.serial(channels):
                if o < width:
                    line[o] = x[image, c, row, o]
                T.cuda.cta_sync()
                for j in T.unroll(width):
                    sums[j] = sums[j] + weights[o * channels + c] * line[j]
                T.cuda.cta_sync()
            for j in T.unroll(width):
                y[image, o, row, j] = sums[j]

        return tvm.IRModule({PREPARE: schedule.mod["main"], CONV: conv})


POINTWISE = ConvProblem(2, 3, (4, 5), 6, 1)


def test_emulation_of_a_schedule_that_holds_tirx():
    made = tensors.fill(POINTWISE, "normal", 1)
    actual = emulate.run(
        Pointwise(), POINTWISE, None, CudaTarget("sm_90"), {"x": made.x, "w": made.w}
    )
    expected = reference.conv2d(made.x, made.w, POINTWISE)
    result = tensors.check(actual, expected, POINTWISE, "normal")
    assert result.ok, result.message


def test_a_module_of_both_languages_is_one_cuda_source():
    target = CudaTarget("sm_90")
    source = cuda_source(lower(Pointwise().build(POINTWISE, None, target, None)), target)
    for name in (PREPARE, CONV):
        assert source.count(f"__tvm_ffi_{name}(void* self_handle") == 2  # declared and defined
        assert f"{name}_kernel(" in source
    assert "__tvm_ffi_main" not in source


@pytest.mark.slow
@pytest.mark.nvcc
def test_a_module_of_both_languages_compiles(tmp_path):
    try:
        toolchain.find_nvcc()
    except toolchain.ToolchainError as error:
        pytest.skip(str(error))
    target = CudaTarget("sm_90")
    unit = tmp_path / "kernel.cu"
    unit.write_text(cuda_source(lower(Pointwise().build(POINTWISE, None, target, None)), target))
    report = toolchain.build_cuda_library(tmp_path / "kernel.so", unit, "sm_90", [])
    kernels_built = {resources.kernel for resources in toolchain.parse_resources(report)}
    assert kernels_built == {f"{PREPARE}_kernel", f"{CONV}_kernel"}
