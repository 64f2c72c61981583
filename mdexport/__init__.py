"""Export masked diffusion models: ONNX with explicit K/V caches, verified against PyTorch.

for progress in mdexport.build(model, Path("bundle"), mdexport.Options(precision="fp16")):
    print(progress)
"""

from mdexport.build import Model, Options, Progress, build
from mdexport.denoiser import Decoder, Denoiser

__all__ = ["Decoder", "Denoiser", "Model", "Options", "Progress", "build"]
