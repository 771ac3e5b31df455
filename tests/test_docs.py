"""The code in the docs runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"


def code_of(path):
    return "\n".join(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda p: p.stem)
def test_python_code_runs(path):
    exec(compile(code_of(path), str(path), "exec"), {"__name__": "docs"})


def test_the_tutorials_detector_learns():
    names = {"__name__": "docs"}
    exec(code_of(DOCS / "own_detector.md"), names)
    detector, boxes = names["detector"], names["Boxes"](torch.tensor([[8.0, 8.0, 44.0, 40.0]]))
    assert all(p.grad is not None for p in detector.parameters())
    args = (torch.rand(2, 3, 64, 64), [boxes] * 2, [torch.tensor([1])] * 2)
    optimizer = torch.optim.Adam(detector.parameters(), lr=0.02)
    history = []
    for _ in range(60):
        losses = detector(*args)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: value.item() for name, value in losses.items()})
    assert history[-1]["loss_cls"] < 0.5 * history[0]["loss_cls"]
    assert history[-1]["loss_box_reg"] < 0.5 * history[0]["loss_box_reg"]
