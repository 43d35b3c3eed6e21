"""What a model is, as frozen dataclasses that know nothing of files, families or devices.

The letters used for array dimensions everywhere in moejax:

| letter | dimension                     | letter | dimension                             |
|--------|-------------------------------|--------|---------------------------------------|
| B      | batch (sequences)             | E      | experts                               |
| S      | sequence (tokens of one)      | K      | experts chosen for each token (top-k) |
| T      | tokens, B * S                 | C      | capacity (rows of one exchange cell)  |
| D      | model width                   | F      | hidden width of an expert or MLP      |
| N      | attention heads               | P      | devices along the expert axis `ep`    |
| G      | key/value heads               | R      | devices along the tensor axis `tp`    |
| H      | width of one head             | V      | vocabulary                            |
| L      | width of a latent (MLA)       |        |                                       |
"""

from moejax.config.experts import Activation, ActivationName, ClampedSwiGLU, MoEConfig, RouterConfig
from moejax.config.mixers import AttentionConfig, DeltaNetConfig, LatentAttentionConfig, Mixer, RopeConfig
from moejax.config.model import LayerConfig, ModelConfig, NormConfig

__all__ = [
    "Activation",
    "ActivationName",
    "AttentionConfig",
    "ClampedSwiGLU",
    "DeltaNetConfig",
    "LatentAttentionConfig",
    "LayerConfig",
    "Mixer",
    "MoEConfig",
    "ModelConfig",
    "NormConfig",
    "RopeConfig",
    "RouterConfig",
]
