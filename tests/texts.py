"""A small text tower of every family of open_clip: the family's own options, other sizes, weights of realistic scale."""

from __future__ import annotations

import copy
import math
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

LAYERS, WIDTH, CONTEXT, VOCABULARY, FEATURES = 2, 32, 12, 60, 16
SIZES = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": WIDTH, "heads": 4, "layers": LAYERS}
VISION = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
# An architecture of open_clip for each family. All forms of a text tower that its architectures have are among them, but
# for those from Hugging Face.
FAMILIES = {
    "CLIP": "ViT-B-32-quickgelu",
    "CLIPA": "ViT-L-14-CLIPA",
    "worldwide": "ViT-H-14-worldwide",
    "SigLIP": "ViT-B-16-SigLIP",
    "SigLIP2": "ViT-B-16-SigLIP2",
    "SigLIP i18n": "ViT-SO400M-16-SigLIP-i18n-256",
    "MobileCLIP": "MobileCLIP-B",
    "MobileCLIP2": "MobileCLIP2-S0",
    "PE-Core": "PE-Core-B-16",
    "CoCa": "coca_ViT-B-32",
}
PROJECTED = [family for family in FAMILIES if family != "SigLIP i18n"]  # those with a projection behind the text tower


def config(family: str) -> dict[str, Any]:
    """The family's own architecture with small sizes."""
    found = copy.deepcopy(open_clip.get_model_config(FAMILIES[family]))
    assert found is not None
    found |= {"embed_dim": FEATURES, "vision_cfg": dict(VISION)}
    found["text_cfg"] |= SIZES
    if found["text_cfg"].get("proj_type") == "none":
        found["text_cfg"]["width"] = FEATURES
    for name in ("hf_tokenizer_name", "tokenizer_kwargs"):
        found["text_cfg"].pop(name, None)
    if "multimodal_cfg" in found:
        found["multimodal_cfg"] |= {**SIZES, "attn_pooler_heads": 4}
        found["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
    return found


def build(family: str) -> Any:
    """The family's model, whose ``encode_text`` is the witness of everything that is made of its text tower."""
    options = config(family)
    custom = options.pop("custom_text", False)
    torch.manual_seed(0)
    kind: Any = open_clip.CLIP
    if custom:
        kind = open_clip.CoCa if "multimodal_cfg" in options else open_clip.CustomTextCLIP
    return realistic(kind(**options)).eval()


def tokens(family: str, count: int = 8) -> Tensor:
    """Texts (count, CONTEXT) that end at various places, with padding behind; the last one takes the whole context."""
    text = config(family)["text_cfg"]
    end = text.get("eos_id", 2) if text.get("pool_type") == "eos" else VOCABULARY - 1
    found = torch.randint(3, VOCABULARY - 1, (count, CONTEXT), generator=torch.Generator().manual_seed(1))
    for row, tokens in enumerate(found):
        last = CONTEXT - 1 if row == count - 1 else 3 + row % (CONTEXT - 3)
        tokens[last], tokens[last + 1 :] = end, 0
    return found


@torch.no_grad()
def realistic(model: nn.Module) -> nn.Module:
    """``model`` with weights N(0, 1/fan_in), gains U(0.5, 1.5), biases, and in the norms some channels that are outliers."""
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding) or "embedding" in name:
                tensor.normal_()
            elif isinstance(module, nn.LayerNorm) and name == "weight":
                tensor.uniform_(0.5, 1.5)
                tensor[:: len(tensor) // 2] *= 12
            elif tensor.ndim > 1:
                tensor.normal_(std=1 / math.sqrt(tensor[0].numel()))
            elif tensor.ndim == 1:
                tensor.normal_(std=0.3)
    return model


@torch.no_grad()
def apart(found: Tensor, expected: Tensor) -> float:
    """The largest distance of two features, relative to the length of the expected one."""
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())
