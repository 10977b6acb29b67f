"""The page about notebooks: its examples run, in order, with the shipped model."""

import re
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).parents[2] / "docs" / "garcon.md"


def test_the_examples_of_the_page_run() -> None:
    """A page lives only if a test executes it."""
    examples = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(examples) == 10
    names: dict[str, Any] = {}
    for number, example in enumerate(examples):
        exec(compile(example, f"{PAGE.name}, example {number}", "exec"), names)
    assert names["read"]["pattern.1"].axes == ("row", "head", "position", "key")
    assert len(names["t"].plan.hash) == 32
    terms = names["terms"]
    assert abs(sum(terms.others.values()) + sum(heads.sum(axis=0) for heads in terms.heads.values()) - terms.value).max() < 1e-9
    assert abs(terms.others["rounding"]).max() < 1e-4
    assert names["losses"].tensor.shape == (2,)
    texts = names["texts"]
    assert len(texts.texts) == len(texts.defaults) == 2
    assert texts.effects().height == 2
    grid, attribution = names["grid"], names["llm"].attribute("resid_post.*", names["text"], names["other"], names["metric"])
    last = grid.points[-1]
    exact, estimate = grid.tensor[-1] - grid.base, attribution[last].tensor[0]
    assert torch.nn.functional.cosine_similarity(exact, estimate, dim=0) > 0.5
