"""The preprocessing of every weight tag that open_clip has is the one that open_clip gives it."""

from __future__ import annotations

from dataclasses import asdict

import open_clip
import pytest
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from qatlab.config import ModelConfig
from qatlab.models.preprocessing import known

# One of each family that people use, with its tag: all that is asked of them beside the tags themselves is here.
SEEN = {
    ("ViT-B-16", "openai"): ("bicubic", "shortest", 0.48145466),
    ("ViT-B-16", "dfn2b"): ("bicubic", "shortest", 0.48145466),
    ("ViT-B-16-SigLIP", "webli"): ("bicubic", "squash", 0.5),
    ("ViT-B-16-SigLIP2", "webli"): ("bicubic", "squash", 0.5),
    ("coca_ViT-B-32", "laion2b_s13b_b90k"): ("bicubic", "shortest", 0.48145466),
    ("convnext_base", "laion400m_s13b_b51k"): ("bicubic", "shortest", 0.48145466),
    ("MobileCLIP-S1", "datacompdr"): ("bilinear", "shortest", 0.0),
    ("EVA02-B-16", "merged2b_s8b_b131k"): ("bicubic", "shortest", 0.48145466),
    ("PE-Core-B-16", "meta"): ("bilinear", "squash", 0.5),
    ("RN50", "openai"): ("bicubic", "shortest", 0.48145466),
}


@pytest.mark.parametrize(("name", "tag"), open_clip.list_pretrained())
def test_models_d5_a_tag_has_open_clips_preprocessing(name: str, tag: str) -> None:
    look = known(ModelConfig(name, tag)).preprocess
    theirs = merge_preprocess_dict(asdict(PreprocessCfg()), open_clip.get_pretrained_cfg(name, tag))
    for key, value in look.items():
        assert value == (list(theirs[key]) if isinstance(theirs[key], tuple) else theirs[key])
    if (name, tag) in SEEN:
        assert (look["interpolation"], look["resize_mode"], look["mean"][0]) == SEEN[name, tag]


def test_every_family_is_among_the_tags() -> None:
    assert {*open_clip.list_pretrained()} >= SEEN.keys()
