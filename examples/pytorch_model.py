"""A PyTorch model whose convolutions are replaced where that makes them faster.

Needs PyTorch: pip install 'im2win_tvm[torch]'. Runs on the GPU if PyTorch has one.
"""

import torch

import im2win_tvm.torch

device = "cuda" if torch.cuda.is_available() else "cpu"
model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 64, 7, stride=2, padding=3),
    torch.nn.ReLU(),
    torch.nn.Conv2d(64, 64, 3, padding=1),
    torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(1),
    torch.nn.Flatten(),
    torch.nn.Linear(64, 10),
)
model = model.to(device).eval()
x = torch.randn(1, 3, 96, 96, device=device)

with torch.no_grad():
    expected = model(x)
    print(im2win_tvm.torch.convert(model, x, freeze=True))
    error = (model(x) - expected).abs().max().item()
print(f"largest difference from before: {error:.1e}")
assert error < 1e-4
