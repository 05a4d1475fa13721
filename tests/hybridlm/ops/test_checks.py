import pytest
import torch

from hybridlm.ops.checks import check_seq_idx, check_shape, check_shapes


def test_letters_take_their_size_where_they_are_first_seen_and_must_agree_after():
    sizes = check_shapes(("x", torch.zeros(2, 3, 4), "b t d"), ("w", torch.zeros(4, 5), "d k"))
    assert sizes == {"b": 2, "t": 3, "d": 4, "k": 5}
    with pytest.raises(ValueError, match=r"w must have shape \(d k\) with d=4; got \(3, 5\)"):
        check_shapes(("x", torch.zeros(2, 3, 4), "b t d"), ("w", torch.zeros(3, 5), "d k"))


def test_another_number_of_dimensions_is_an_error():
    with pytest.raises(ValueError, match=r"x must have shape \(b t\)"):
        check_shape("x", torch.zeros(2), "b t", {})


def test_no_time_steps_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="x has no time steps"):
        check_shapes(("x", torch.zeros(2, 0, 4), "b t d"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_documents_are_numbered_by_integers(dtype):
    check_seq_idx(torch.zeros(1, 2, dtype=torch.int32), 1, 2)
    with pytest.raises(ValueError, match="must be integers"):
        check_seq_idx(torch.zeros(1, 2, dtype=dtype), 1, 2)
