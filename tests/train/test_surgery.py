"""Freezing: by dotted names with *, nothing else and never everything."""

from __future__ import annotations

import pytest
from torch import nn

from fleetune.train.surgery import freeze


def model() -> nn.Module:
    layers = nn.ModuleDict(
        {"embeddings": nn.Embedding(4, 3), "layer": nn.ModuleList(nn.Linear(3, 3) for _ in range(11))}
    )
    return nn.ModuleDict({"encoder": layers, "classifier": nn.Linear(3, 2)})


def frozen(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ([], set()),
        (["*.embeddings.*"], {"encoder.embeddings.weight"}),
        (["encoder.layer.1.*"], {"encoder.layer.1.weight", "encoder.layer.1.bias"}),
        (["classifier.bias", "*.layer.0.weight"], {"classifier.bias", "encoder.layer.0.weight"}),
        (["*.layer.10.*", "*.layer.10.bias"], {"encoder.layer.10.weight", "encoder.layer.10.bias"}),
    ],
)
def test_the_parameters_that_match_are_frozen(patterns: list[str], names: set[str]) -> None:
    net = model()
    assert freeze(net, patterns) == len(names)
    assert frozen(net) == names


def test_a_pattern_without_a_match_is_named_with_the_nearest_and_nothing_is_frozen() -> None:
    net = model()
    with pytest.raises(ValueError) as caught:
        freeze(net, ["classifier.*", "*.embedings.*"])
    assert str(caught.value) == (
        "model.freeze.1 = '*.embedings.*': no parameter has such a name; there is `encoder.embeddings.weight`"
    )
    assert frozen(net) == set()


def test_a_name_is_matched_as_it_is_written() -> None:
    with pytest.raises(ValueError, match=r"model\.freeze\.0 = '\*\.Embeddings\.\*': no parameter has such a name"):
        freeze(model(), ["*.Embeddings.*"])
    with pytest.raises(ValueError, match="no parameter has such a name"):
        freeze(model(), ["embeddings"])


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.freeze = \['encoder\.\*', 'class\*'\]: freezes every parameter"):
        freeze(model(), ["encoder.*", "class*"])
