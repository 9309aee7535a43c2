"""A step's seconds are the device's, whenever the host looks."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from packtrain.train.pending import Mark


def test_seconds_between_two_marks() -> None:
    first = Mark(torch.device("cpu"))
    time.sleep(0.05)
    second = Mark(torch.device("cpu"))
    time.sleep(0.2)
    second.wait()
    assert 0.05 <= second.since(first) < 0.2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_host_may_look_late() -> None:
    device = torch.device("cuda")
    square = torch.randn(4096, 4096, device=device)
    marks = [Mark(device)]
    for _ in range(2):
        for _ in range(20):
            square = torch.nn.functional.normalize(square @ square)
        marks.append(Mark(device))
    time.sleep(0.5)
    marks[-1].wait()
    one, two = (later.since(earlier) for earlier, later in itertools.pairwise(marks))
    assert 0 < two < 0.4
    assert one < 0.5
