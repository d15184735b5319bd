"""Calling a kernel: whose memory is used, what is refused, and what may happen at once."""

import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from problems import DTYPES, LAYOUTS

import im2win_tvm
from im2win_tvm import ArgumentError, compiler, reference, tensors, toolchain
from im2win_tvm.epilogue import NONE
from im2win_tvm.kernel import Kernel
from im2win_tvm.lower import lower
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules.cuda_simt_async_tiles import Config
from im2win_tvm.select import select
from im2win_tvm.target import CudaTarget

PROBLEM = ConvProblem(2, 3, (9, 11), 5, (3, 2), (2, 1), ((1, 0), (2, 1)))
FULL = dict(bias=True, residual=True, activation="relu")


@cache
def compiled(problem=PROBLEM, **options):
    return im2win_tvm.compile(problem, "llvm", **options)


def operands(problem=PROBLEM, seed=0, kind="integer"):
    made = tensors.fill(problem, kind, seed, bias=True, residual=True)
    expected = reference.conv2d(made.x, made.w, problem, made.bias, made.residual, "relu")
    return made, expected


def call(kernel, made, **changed):
    given = {**made._asdict(), **changed}
    return kernel(
        given["x"], given["w"], given["bias"], residual=given["residual"], out=given.get("out")
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_in_and_out(layout, dtype):
    problem = PROBLEM.replace(layout=layout, dtype=dtype)
    kernel = compiled(problem, **FULL)
    made, expected = operands(problem)
    y = call(kernel, made)
    assert type(y) is np.ndarray and y.flags.c_contiguous and y.dtype == dtype
    np.testing.assert_array_equal(y, expected)
    out = tensors.poisoned(problem.output_shape, dtype)
    address = out.ctypes.data
    assert call(kernel, made, out=out) is out and out.ctypes.data == address
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_in_and_out(layout, dtype):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    problem = PROBLEM.replace(layout=layout, dtype=dtype)
    kernel = compiled(problem, **FULL)
    made, expected = operands(problem)
    given = type(made)(*map(torch.from_numpy, made))
    y = call(kernel, given)
    assert type(y) is torch.Tensor and y.dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(y.numpy(), expected)
    out = torch.full(problem.output_shape, torch.nan, dtype=y.dtype)
    address = out.data_ptr()
    assert call(kernel, given, out=out) is out and out.data_ptr() == address
    np.testing.assert_array_equal(out.numpy(), expected)


def test_frameworks_may_be_mixed_and_other_dlpack_is_taken():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    import tvm_ffi

    kernel, (made, expected) = compiled(**FULL), operands()
    out = tvm_ffi.from_dlpack(tensors.poisoned(PROBLEM.output_shape, "float32"))
    call(kernel, made, x=tvm_ffi.from_dlpack(made.x), w=torch.from_numpy(made.w), out=out)
    np.testing.assert_array_equal(np.from_dlpack(out), expected)
    with pytest.raises(ArgumentError, match=r"^out: needed for arrays of Tensor"):
        call(kernel, made, x=tvm_ffi.from_dlpack(made.x))


def test_no_operand_is_written():
    kernel, (made, expected) = compiled(**FULL), operands()
    before = type(made)(*(array.copy() for array in made))
    np.testing.assert_array_equal(call(kernel, made), expected)
    for array, copy in zip(made, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_nothing_is_written_beside_the_output():
    kernel, (made, expected) = compiled(**FULL), operands()
    memory = np.full(expected.size + 200, 77, np.float32)
    out = memory[100:-100].reshape(expected.shape)
    assert call(kernel, made, out=out) is out
    np.testing.assert_array_equal(out, expected)
    assert (memory[:100] == 77).all() and (memory[-100:] == 77).all()


def test_read_only_arrays_are_taken_as_they_are(tmp_path):
    """Mapped from a file that is read-only: to write there would end the process."""
    kernel, (made, expected) = compiled(**FULL), operands()
    mapped = {}
    for name, array in made._asdict().items():
        np.save(tmp_path / f"{name}.npy", array)
        mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    np.testing.assert_array_equal(call(kernel, made, **mapped), expected)
    out = tensors.poisoned(expected.shape, "float32")
    out.flags.writeable = False
    with pytest.raises(ArgumentError, match=r"^out: the array is read-only$"):
        call(kernel, made, out=out)
    assert np.isnan(out).all()


def misaligned(array, offset):
    """A copy of the array that starts `offset` bytes after a multiple of 64."""
    memory = np.empty(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    view = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    assert view.ctypes.data % 64 == offset
    return view


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_the_natural_alignment_is_enough(layout, dtype):
    problem = ConvProblem(1, 16, (8, 16), 32, 3, padding=1, dtype=dtype, layout=layout)
    kernel = compiled(problem, **FULL)
    made, expected = operands(problem)
    size = np.dtype(dtype).itemsize
    for offset in (size, 3 * size, 64 - size):
        moved = type(made)(*(misaligned(array, offset) for array in made))
        out = misaligned(tensors.poisoned(problem.output_shape, dtype), offset)
        np.testing.assert_array_equal(call(kernel, moved, out=out), expected)
    with pytest.raises(ArgumentError, match=rf"^x: data at 0x\w+ is not aligned to {size} bytes"):
        call(kernel, made, x=misaligned(made.x, 1))


def strided(array):
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


NAMES = ("x", "w", "bias", "residual", "out")
REFUSED = {
    "every other element": (strided, r"strides \(.*\) are not those of a contiguous array"),
    "reversed": (lambda a: a[..., ::-1], r"strides \(.*-1,?\) are not those of"),
    "Fortran order": (
        lambda a: np.asfortranarray(a) if a.ndim > 1 else strided(a),
        r"strides \(.*\) are not those of a contiguous",
    ),
    "broadcast": (
        lambda a: np.broadcast_to(a[..., :1], a.shape),
        r"strides \(.*0,?\) are not those of|the array is read-only",
    ),
    "one axis more": (lambda a: a[None], r"shape \(1, .*\); this kernel takes \("),
    "one element less": (lambda a: a[..., 1:], r"shape \(.*\); this kernel takes \("),
    "as many elements": (lambda a: a.reshape(-1, 1), r"shape \(\d+, 1\); this kernel takes \("),
    "float64": (lambda a: a.astype("float64"), "dtype float64; this kernel takes float32"),
    "float16": (lambda a: a.astype("float16"), "dtype float16; this kernel takes float32"),
    "int32": (lambda a: a.astype("int32"), "dtype int32; this kernel takes float32"),
    "other byte order": (lambda a: a.astype(">f4"), "byte order '>'; native is allowed"),
    "a list": (lambda a: a.tolist(), "list is not an array; allowed are NumPy arrays"),
    "a number": (lambda a: 1.0, "float is not an array"),
}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", REFUSED)
def test_wrong_arrays_are_refused_by_name_and_nothing_is_written(kind, name):
    change, message = REFUSED[kind]
    kernel, (made, _) = compiled(**FULL), operands()
    given = {**made._asdict(), "out": tensors.poisoned(PROBLEM.output_shape, "float32")}
    out = given["out"]
    given[name] = change(given[name])
    with pytest.raises(ArgumentError, match=f"^{name}: ({message})"):
        call(kernel, made, **given)
    assert np.isnan(out).all()


def test_a_wrong_number_of_operands_is_refused_by_name():
    made, _ = operands()
    out = tensors.poisoned(PROBLEM.output_shape, "float32")
    for name, rest in (("bias", made.residual), ("residual", made.bias)):
        with pytest.raises(ArgumentError, match=f"^{name}: missing; .* compiled with {name}=True"):
            call(compiled(**FULL), made, out=out, **{name: None})
        only = {("residual" if name == "bias" else "bias"): rest}
        plain = dict(bias=None, residual=None) | {name: getattr(made, name)}
        with pytest.raises(ArgumentError, match=f"^{name}: given; .* compiled with {name}=False"):
            call(compiled(), made, out=out, **plain)
        assert only  # both halves ran
    with pytest.raises(ArgumentError, match=r"^w: NoneType is not an array"):
        call(compiled(**FULL), made, w=None)
    assert np.isnan(out).all()


def test_tensors_elsewhere_or_with_gradients_are_refused_by_name():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    kernel, (made, expected) = compiled(**FULL), operands()
    given = type(made)(*map(torch.from_numpy, made))
    for name, tensor in given._asdict().items():
        with pytest.raises(ArgumentError, match=f"^{name}: is on 'meta'; .* runs on 'cpu'"):
            call(kernel, given, **{name: tensor.to("meta")})
        wanting = tensor.clone().requires_grad_()
        with pytest.raises(ArgumentError, match=f"^{name}: requires grad, .* no backward"):
            call(kernel, given, **{name: wanting})
        with torch.no_grad():
            np.testing.assert_array_equal(call(kernel, given, **{name: wanting}).numpy(), expected)
    channels_last = given.x.contiguous(memory_format=torch.channels_last)
    with pytest.raises(ArgumentError, match=r"^x: strides .*layout='NHWC' for channels-last"):
        call(kernel, given, x=channels_last)


def test_an_output_over_the_input_is_refused():
    problem = ConvProblem(1, 4, (6, 6), 4, 3, padding=1)
    memory = np.zeros(5 * 36, np.float32)
    x, out = memory[:144].reshape(1, 4, 6, 6), memory[36:].reshape(1, 4, 6, 6)
    kernel, w = compiled(problem), np.ones(problem.weight_shape, np.float32)
    for given in (x, out):
        with pytest.raises(ArgumentError, match=r"^out: overlaps x"):
            kernel(x, w, out=given)
    assert not memory.any()


def test_sparse_tensors_are_refused():
    torch = pytest.importorskip("torch")
    x = torch.ones(PROBLEM.input_shape).to_sparse()
    with pytest.raises(ArgumentError, match=r"^x: layout torch.sparse_coo; .* takes torch.strided"):
        compiled()(x, torch.ones(PROBLEM.weight_shape))


def test_weights_are_prepared_once():
    kernel, (made, expected) = compiled(**FULL), operands()
    prepared = kernel.prepare(made.w)
    made.w[...] = np.nan  # not looked at again
    for _ in range(3):
        np.testing.assert_array_equal(call(kernel, made, w=prepared), expected)
    # Of a kernel that packs alike: same weights, another input and epilogue.
    other = PROBLEM.replace(batch=1, input_size=(5, 6), padding=0)
    plain = im2win_tvm.compile(other, "llvm", config=dict(**kernel.metadata["schedule"]["config"]))
    x = tensors.fill(other, "integer").x
    fresh, _ = operands()
    np.testing.assert_array_equal(plain(x, prepared), reference.conv2d(x, fresh.w, other))


@pytest.mark.parametrize(
    "other",
    [
        PROBLEM.replace(layout="NHWC"),
        PROBLEM.replace(dtype="float16"),
        PROBLEM.replace(kernel_size=(2, 3)),
        PROBLEM.replace(out_channels=4),
        PROBLEM.replace(in_channels=4, out_channels=10, groups=2),
    ],
    ids=str,
)
def test_weights_prepared_by_a_kernel_unlike_this_are_refused(other):
    kernel, (made, _) = compiled(**FULL), operands()
    out = tensors.poisoned(PROBLEM.output_shape, "float32")
    prepared = compiled(other).prepare(tensors.fill(other).w)
    with pytest.raises(ArgumentError, match=r"^w: prepared by a kernel with another config"):
        call(kernel, made, w=prepared, out=out)
    assert np.isnan(out).all()


def test_weights_prepared_in_other_blocks_are_refused():
    kernel, (made, _) = compiled(**FULL), operands()
    config = kernel.metadata["schedule"]["config"] | dict(lanes=2, vectors=1, splits=1)
    other = im2win_tvm.compile(PROBLEM, "llvm", config=config)
    with pytest.raises(ArgumentError, match=r"^w: prepared by a kernel with another config"):
        call(kernel, made, w=other.prepare(made.w))


def test_weights_prepared_in_another_order_of_k_are_refused(monkeypatch):
    """Equal shapes tell nothing: I' and the input differ in which of a window's elements are
    neighbours. CUDA kernels are described here, and neither compiled nor run."""
    monkeypatch.setattr(toolchain, "nvcc_version", lambda: "13.0")
    target, config, made = CudaTarget("sm_90"), Config(16, 32, 9, 4, 4, taps=False), []
    for name in ("cuda_simt_async", "cuda_simt_async_explicit"):
        choice = select(PROBLEM, target, name, config)
        module = lower(choice.schedule.build(PROBLEM, choice.config, target))
        metadata = compiler.describe(PROBLEM, target, choice, NONE, module)
        made.append(Kernel(Path("none.so"), metadata))
    one, other = made
    assert one.metadata["arguments"]["packed"] == other.metadata["arguments"]["packed"]
    assert one._origin != other._origin


def test_threads_share_a_kernel():
    """Also its very first calls, which load the library."""
    problem = ConvProblem(2, 16, (20, 21), 24, 3, padding=1)
    kernel = im2win_tvm.compile(problem, "llvm", **FULL)
    cases = [operands(problem, seed) for seed in range(4)]

    def work(case):
        made, expected = case
        wrong = 0
        for _ in range(40):
            out = tensors.poisoned(problem.output_shape, "float32")
            wrong += not np.array_equal(call(kernel, made, out=out), expected)
        return wrong

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, cases)) == [0, 0, 0, 0]


def test_kernels_can_be_compiled_in_threads():
    problems = [PROBLEM.replace(out_channels=n) for n in range(1, 7)]
    with ThreadPoolExecutor(4) as pool:
        kernels = list(pool.map(lambda p: im2win_tvm.compile(p, "llvm", **FULL), problems))
    for problem, kernel in zip(problems, kernels, strict=True):
        made, expected = operands(problem)
        np.testing.assert_array_equal(call(kernel, made), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_computes_too():
    """OpenMP's threads stay with the parent: a child that waits for them never ends."""
    kernel, (made, expected) = compiled(**FULL), operands()
    call(kernel, made)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(call(kernel, made), expected) else 1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(os.waitpid, child, 0)
        try:
            assert waiting.result(timeout=30)[1] == 0
        finally:
            if not waiting.done():
                os.kill(child, 9)


def test_metadata_says_what_was_built():
    kernel = compiled(**FULL)
    m = kernel.metadata
    assert kernel.problem == PROBLEM and m["descriptor"] == str(PROBLEM)
    assert m["epilogue"] == dict(bias=True, residual=True, activation="relu")
    assert (m["accuracy"], m["schedule"]["name"]) == ("fp32", "cpu_blocked")
    assert compiled(PROBLEM.replace(dtype="float16"), **FULL).metadata["accuracy"] == "fp16"
    shapes = {name: tuple(a["shape"]) for name, a in m["arguments"].items()}
    assert shapes["x"] == PROBLEM.input_shape and shapes["y"] == PROBLEM.output_shape
    assert shapes["w"] == PROBLEM.weight_shape and shapes["bias"] == (5,)
    assert math.prod(shapes["packed"]) >= math.prod(PROBLEM.weight_shape)
    assert list(itertools.chain(*(c["arguments"] for c in m["calls"])))[-1] == "y"
    for package in ("apache-tvm", "apache-tvm-ffi", "im2win_tvm"):
        assert m["versions"][package]


def test_wrong_epilogues_are_refused():
    with pytest.raises(ValueError, match="activation='silu': allowed are"):
        im2win_tvm.compile(PROBLEM, "llvm", activation="silu")
    with pytest.raises(ValueError, match="bias=array"):
        im2win_tvm.compile(PROBLEM, "llvm", bias=np.zeros(5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(target="metal"), "target='metal': allowed are 'llvm', 'cuda'"),
        (dict(target="llvm", arch="zx80"), "arch='zx80': LLVM knows no such processor"),
        (dict(target="cuda", arch="sm_60"), "arch='sm_60': allowed are 'sm_70' and later"),
        (dict(target="cuda", arch="90"), "arch='90': allowed are 'sm_70' and later"),
    ],
    ids=str,
)
def test_wrong_targets_are_refused(arguments, message):
    with pytest.raises(im2win_tvm.TargetError) as caught:
        im2win_tvm.compile(PROBLEM, **arguments)
    assert str(caught.value).startswith(message)
