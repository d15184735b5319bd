"""Memory of intermediate tensors: less than by TVM's plan, residuals in place where they may be."""

import re

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import models  # noqa: E402
import tvm  # noqa: E402
from torch import nn  # noqa: E402
from tvm import relax  # noqa: E402
from tvm.relax.backend.cpu_generic import pipeline as tvms  # noqa: E402
from tvm.relax.frontend.torch import from_exported_program  # noqa: E402

from im2win_tvm.relax import UseIm2win, build  # noqa: E402
from im2win_tvm.relax.memory import IN_PLACE, PlanMemory  # noqa: E402
from im2win_tvm.target import resolve  # noqa: E402


def planned(model, x):
    """Modules with TVM's plan and with ours."""
    program = torch.export.export(model, (x,))
    module = UseIm2win("llvm")(from_exported_program(program, keep_params_as_input=False))
    target = resolve("llvm").tvm()
    passes = [
        *tvms.legalize_passes(target), *tvms.dataflow_lower_passes(target),
        relax.transform.StaticPlanBlockMemory(),
    ]  # fmt: skip
    with target:
        before = tvm.transform.Sequential(passes)(module)
    return before, PlanMemory()(before)


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
    storages, found = {}, []
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Var):
                storages[binding.var] = storages.get(value)
                continue
            operator = getattr(value, "op", None)
            if getattr(operator, "name", "") == "relax.memory.alloc_tensor":
                storages[binding.var] = value.args[0]
            elif isinstance(operator, tvm.ir.GlobalVar):
                places = (module[operator].attrs or {}).get(IN_PLACE)
                if places is not None:
                    residual, output = (storages.get(value.args[int(n)]) for n in places)
                    found.append(residual is not None and residual.same_as(output))
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
    np.testing.assert_allclose(run(after, x), model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


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
