"""The packaged templates are OpenAI's, and what a user may write in their place."""

from __future__ import annotations

import ast
import json
from importlib.resources import files
from pathlib import Path

import open_clip
import pytest

from qatlab.core.errors import UserError
from qatlab.models.prompts import prompts


def test_imagenets_are_those_of_open_clip() -> None:
    for name, theirs in (
        ("imagenet80", open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("imagenet7", open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        assert prompts(name).templates == tuple(template("{}") for template in theirs)


@pytest.mark.parametrize(
    ("name", "dataset"),
    [("cifar18", "CIFAR10"), ("cifar18", "CIFAR100"), ("dtd8", "DescribableTextures"), ("sun2", "SUN397")],
)
def test_the_others_are_those_of_openais_page(shared_data: Path, name: str, dataset: str) -> None:
    page = (shared_data / "lists" / "openai_prompts.md").read_text()
    section = page.split(f"\n## {dataset}\n")[1].split("\n## ")[0]
    listed = ast.literal_eval(section.split("templates = ")[1].split("\n```")[0])
    assert list(prompts(name).templates) == listed
    benchmark = json.loads((shared_data / "lists" / "clip_benchmark_en_templates.json").read_text())
    key = {"CIFAR10": "cifar10", "CIFAR100": "cifar100", "DescribableTextures": "dtd", "SUN397": "sun397"}[dataset]
    assert list(prompts(name).templates) == [template.replace("{c}", "{}") for template in benchmark[key]]


def test_a_set_has_as_many_templates_as_its_name_says() -> None:
    packaged = json.loads((files("qatlab") / "assets" / "templates.json").read_text())
    numbers = {name: "".join(filter(str.isdigit, name)) for name in packaged}
    assert {name: len(prompts(name).templates) for name in numbers} == {
        name: int(number or 1) for name, number in numbers.items()
    }
    assert [name for name, number in numbers.items() if not number] == ["single", "mcm", "neglabel"]


def test_what_results_call_them() -> None:
    assert prompts("cifar18").name == "cifar18"
    assert prompts("a photo of a {}").name == prompts(["a photo of a {}"]).name == "a photo of a {}"
    assert prompts(["a {}", "the {}"]).name == "2 templates"


def test_class_names_go_where_the_braces_are() -> None:
    found = prompts(["a {} photo", "{} and {}"]).of(["cat", "{0}"])
    assert found == [["a cat photo", "cat and cat"], ["a {0} photo", "{0} and {0}"]]


def test_mistakes_are_told_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"suite\.templates=imagenet8 is neither .* \(did you mean 'imagenet80'\?\)"):
        prompts("imagenet8")
    with pytest.raises(UserError, match=r"suite\.templates=\['imagenet80'\]: each needs a \{\}"):
        prompts(["imagenet80"])
    with pytest.raises(UserError, match=r"suite\.templates=\[\]"):
        prompts([])
