"""Export masked diffusion models: ONNX with explicit K/V caches, verified against PyTorch.

for progress in mdexport.build(model, Path("bundle"), mdexport.Options(precision="fp16")):
    print(progress)
"""

from mdexport.build import Options, Progress, build
from mdexport.denoiser import Decoder, Denoiser, Encoder
from mdexport.model import Model

__all__ = ["Decoder", "Denoiser", "Encoder", "Model", "Options", "Progress", "build"]
