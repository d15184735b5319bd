"""Memory of intermediate tensors: less than by TVM's plan, residuals in place where they may be."""

import re

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import models  # noqa: E402
import tvm  # noqa: E402
import tvm_ffi  # noqa: E402
from torch import nn  # noqa: E402
from tvm import relax  # noqa: E402
from tvm.relax.backend.cpu_generic import pipeline as tvms  # noqa: E402
from tvm.relax.frontend.torch import from_exported_program  # noqa: E402

from im2win_tvm.relax import UseIm2win, build, memory  # noqa: E402
from im2win_tvm.relax.build import _pipeline  # noqa: E402
from im2win_tvm.relax.memory import IN_PLACE, PlanMemory  # noqa: E402
from im2win_tvm.target import CudaTarget, resolve  # noqa: E402


def planned(model, x):
    """Modules with TVM's plan and with ours."""
    program = torch.export.export(model, (x,))
    before = lowered(UseIm2win("llvm")(from_exported_program(program, keep_params_as_input=False)))
    return before, PlanMemory()(before)


def lowered(module):
    """With TVM's plan."""
    target = resolve("llvm").tvm()
    passes = [
        *tvms.legalize_passes(target), *tvms.dataflow_lower_passes(target),
        relax.transform.StaticPlanBlockMemory(),
    ]  # fmt: skip
    with target:
        return tvm.transform.Sequential(passes)(module)


def run(module, x):
    rest = tvms.finalize_passes(resolve("llvm").tvm())[1:]
    built = build(module, "llvm", relax_pipeline=tvm.transform.Sequential(rest))
    [y] = relax.VirtualMachine(built, tvm.cpu())["main"](tvm.runtime.from_dlpack(x))
    return y.numpy()


def size(module):
    found = re.findall(r"alloc_storage\(R\.shape\(\[(\d+)\]\)", module["main"].script())
    return sum(map(int, found))


def in_place(module):
    """For each convolution with a residual, whether its output lies there."""
    places, found = {}, []
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Var):
                places[binding.var] = places.get(value)
                continue
            operator = getattr(value, "op", None)
            name = getattr(operator, "name", "")
            if name == "relax.memory.alloc_tensor":
                places[binding.var] = value.args[0], int(value.args[1])
            elif name == "relax.memory.ensure_zero_offset":
                places[binding.var] = places[value.args[0]]
            elif isinstance(operator, tvm.ir.GlobalVar):
                both = (module[operator].attrs or {}).get(IN_PLACE)
                if both is not None:
                    residual, output = (places.get(value.args[int(n)]) for n in both)
                    found.append(
                        residual is not None
                        and residual[0].same_as(output[0])
                        and residual[1] == output[1]
                    )
    return found


def test_a_residual_network_takes_less():
    torch.manual_seed(0)
    blocks = [
        models.Bottleneck(32, 8, 1),
        models.Bottleneck(32, 8, 2),
    ]
    model = models.folded(nn.Sequential(models.normalised(3, 32), *blocks).eval())
    x = torch.randn(1, 3, 20, 20)
    before, after = planned(model, x)
    assert not any(in_place(before)) and in_place(after) == 2 * [True]
    # What comes into a block and out of it lies in one place, with two smaller tensors beside it.
    pixels = 20 * 20
    assert size(after) == 4 * pixels * (32 + 8 + 8) < size(before)
    assert "ensure_zero_offset" in after["main"].script()
    np.testing.assert_allclose(run(after, x), model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_concatenations_take_what_lives_at_once():
    model, x = models.folded(models.model("unet", 16)), torch.randn(1, 3, 32, 32)
    before, after = planned(model, x)
    # The last of them and what it is made of; what was kept on its way lies where it will.
    assert size(after) == 4 * 32 * 32 * (4 + 4 + 8) < size(before)


class Shared(nn.Module):
    """Residuals that are read afterwards, or by the same convolution, and one that may go."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(6))
        for conv in self.convs:
            conv.weight.data = torch.randint(-1, 2, conv.weight.shape).float()
            conv.bias.data = torch.randint(-2, 3, conv.bias.shape).float()

    def forward(self, x):
        first, *convs = self.convs
        kept = first(x)
        y = (convs[0](kept) + kept).relu()
        y = (convs[1](y) + kept).relu()
        z = convs[2](y)
        y = convs[3](y) + z
        return convs[4](torch.cat([y, z])) + convs[4](torch.cat([z, y]))


def test_what_is_read_later_stays():
    torch.manual_seed(0)
    model, x = Shared(), torch.randint(-2, 3, (1, 4, 6, 7)).float()
    _, after = planned(model, x)
    assert sorted(in_place(after)) == [False, False, True, True]
    np.testing.assert_array_equal(run(after, x), model(x).detach().numpy())


@pytest.fixture
def halves():
    """One half of an input is read at once, and the other at the end."""
    builder, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType((8,), "float32"))
    with builder.function("main", [x]):
        both = builder.emit(relax.op.split(x, 2))
        y = builder.emit(relax.op.permute_dims(builder.emit(relax.TupleGetItem(both, 0))))
        y = builder.emit(relax.op.permute_dims(y))
        builder.emit_func_output(relax.op.add(builder.emit(relax.TupleGetItem(both, 1)), y))
    return lowered(builder.get())


def test_a_tuple_keeps_only_what_is_taken_from_it(halves):
    main = halves["main"]
    bindings = [binding for block in main.body.blocks for binding in block.bindings]
    tensors, _ = memory._lives(bindings, main.body.body, halves)
    one, other, first, second = sorted(tensors, key=lambda tensor: tensor.first)
    assert one.last < second.first < other.last == second.last
    assert first.meets(one) and not second.meets(one)


def test_no_plan_takes_more_than_tvms(halves, monkeypatch):
    tvms = size(halves)
    monkeypatch.setattr(memory, "_places", lambda tensors: ({}, tvms))
    assert tvm_ffi.structural_equal(PlanMemory()(halves), halves)


def test_tensors_that_live_at_once_lie_apart():
    random = np.random.default_rng(3)
    for _ in range(50):
        starts, sizes = random.integers(0, 20, 12), random.integers(1, 3000, 12)
        ends = starts + random.integers(0, 9, 12)
        tensors = [
            memory._Tensor(int(size), int(first), int(last), [number])
            for number, (size, first, last) in enumerate(zip(sizes, starts, ends, strict=True))
        ]
        places, total = memory._places(tensors)
        assert all(place % 256 == 0 for place in places.values())
        for now in range(30):
            alive = sorted((places[t.variables[0]], t.size) for t in tensors if t.meets(at(now)))
            ends = [begin + size for begin, size in alive]
            assert all(end <= begin for end, (begin, _) in zip(ends, alive[1:], strict=False))
            assert max(ends, default=0) <= total


def at(moment):
    return memory._Tensor(0, moment, moment)


def test_small_tensors_lie_where_a_large_one_will():
    """Those of a network that concatenates what it has kept: no two can have one storage."""
    large, small = 4096, 1024
    tensors = [
        memory._Tensor(small, 0, 1, ["first"]),
        memory._Tensor(small, 0, 1, ["second"]),
        memory._Tensor(large, 2, 3, ["large"]),
        memory._Tensor(small, 0, 3, ["kept"]),
    ]
    places, total = memory._places(tensors)
    assert total == large + small and places["kept"] == large
    assert sorted((places["first"], places["second"])) == [0, small]


def test_the_rest_of_the_module_is_kept(halves):
    halves.update_global_info("vdevice", [relax.VDevice("llvm")])
    assert PlanMemory()(halves).global_infos["vdevice"]


def test_builds_for_cuda_have_the_plan():
    target = CudaTarget("sm_90a").tvm("llvm")
    names = [each.info.name for each in _pipeline(target).passes]
    place = names.index("PlanMemory")
    assert names[place - 1 : place + 2] == [
        "StaticPlanBlockMemory",
        "PlanMemory",
        "RewriteCUDAGraph",
    ]
