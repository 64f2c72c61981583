"""Run exported masked diffusion models: samplers, plans and pipelines on NumPy alone.

    with mdruntime.load("maskgit256-fp16") as pipeline:
        images = pipeline.generate(labels=[207, 88], seed=0)  # uint8 (2, 256, 256, 3)

The samplers follow Hayakawa et al., "Demystifying MaskGIT Sampler and Beyond" (arXiv 2510.04525).
"""

from mdruntime.bundle import Bundle, open_bundle
from mdruntime.errors import (
    BundleError,
    EngineError,
    MdruntimeError,
    ProviderError,
    SamplingError,
    VerificationError,
)
from mdruntime.loading import load, load_text
from mdruntime.manifest import Manifest
from mdruntime.pipeline import Pipeline
from mdruntime.sampler import Canvas, Step, unmask
from mdruntime.sampling import Sampling
from mdruntime.session import FunctionSession, Session
from mdruntime.text import TextPipeline, TextStep
from mdruntime.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "BundleError",
    "Canvas",
    "EngineError",
    "FunctionSession",
    "Manifest",
    "MdruntimeError",
    "Pipeline",
    "ProviderError",
    "Sampling",
    "SamplingError",
    "Session",
    "Step",
    "TextPipeline",
    "TextStep",
    "Verification",
    "VerificationError",
    "load",
    "load_text",
    "open_bundle",
    "unmask",
    "verify",
]
