from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from fastmto.engine.flat import ALIGNMENT, FlatParameters, as_vector, is_dense


def test_parameters_become_aligned_views_with_their_values_shapes_and_strides() -> None:
    conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    params = [
        *conv.parameters(),
        nn.Parameter(torch.randn(4, 7).T),
        nn.Parameter(torch.tensor(2.0)),
    ]
    before = [(p.detach().clone(), p.shape, p.stride()) for p in params]
    flat = FlatParameters(params)
    for p, (value, shape, stride), start in zip(params, before, flat.segments, strict=False):
        assert torch.equal(p, value)
        assert (p.shape, p.stride()) == (shape, stride)
        assert p.data_ptr() == flat.data.data_ptr() + int(start) * 4
        assert p.data_ptr() % ALIGNMENT == 0
    assert flat.numel == sum(p.numel() for p in params)
    assert len(flat) == int(flat.segments[-1]) == len(flat.data)


def test_places_between_tensors_are_zero_also_in_filled_rows() -> None:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(20))]
    flat = FlatParameters(params)
    assert float(flat.data.sum()) == 23
    rows = flat.rows(3, torch.float64, fill=2.0)
    assert float(rows.sum()) == 3 * 23 * 2.0
    assert all(row.data_ptr() % ALIGNMENT == 0 for row in rows)
    for view, p in zip(flat.stacked_views(rows), params, strict=True):
        assert view.shape == (3, *p.shape)
        assert torch.equal(view, torch.full_like(view, 2.0))


def test_writing_the_buffer_moves_the_model_and_loading_moves_the_buffer() -> None:
    model = nn.Linear(3, 4)
    flat = FlatParameters(list(model.parameters()))
    flat.data.fill_(0.5)
    assert torch.equal(model.weight, torch.full((4, 3), 0.5))
    model.load_state_dict({"weight": torch.ones(4, 3), "bias": torch.zeros(4)})
    assert sum(float(view.sum()) for view in flat.views(flat.data)) == 12


def test_state_dict_torch_save_and_deepcopy_of_the_model_still_work() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    keys = list(model.state_dict())
    FlatParameters(list(model.parameters()))
    assert list(model.state_dict()) == keys
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.zero_()
    assert not torch.equal(twin[0].weight, model[0].weight)
    assert all(torch.equal(v, loaded[k]) for k, v in twin.state_dict().items())


def test_tied_weights_stay_tied() -> None:
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight
    FlatParameters(list(dict.fromkeys([*a.parameters(), *b.parameters()])))
    assert a.weight is b.weight


@pytest.mark.parametrize("change", ["double", "data"])
def test_a_parameter_that_left_the_buffer_is_named(change: str) -> None:
    model = nn.Linear(3, 4)
    flat = FlatParameters(list(model.parameters()))
    flat.check("shared parameter")
    if change == "double":
        model.double()
    else:
        model.weight.data = torch.zeros(4, 3)
    with pytest.raises(RuntimeError, match=r"a shared parameter of shape \(4, 3\).*build"):
        flat.check("shared parameter")


def test_dense_means_no_gaps_and_no_overlaps() -> None:
    base = torch.zeros(4, 6)
    assert is_dense(base)
    assert is_dense(base.T)
    assert is_dense(base[:2])
    assert is_dense(torch.zeros(()))
    assert is_dense(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    assert not is_dense(base[:, :3])
    assert not is_dense(torch.zeros(1).expand(4))
    assert as_vector(base.T).data_ptr() == base.data_ptr()
