"""Label maps by themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from montage.kernels import labels

grids = st.tuples(st.integers(1, 70), st.integers(1, 70))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), grids, grids, st.integers(1, 5))
def test_every_level_is_a_partition(seed, size, grid, count):
    """For any sizes."""
    owner = torch.randint(count, size, generator=torch.Generator().manual_seed(seed))
    level = labels.at_grid(owner, grid)
    assert level.shape == grid
    assert (labels.to_masks(level, count).sum(0) == 1).all()


def test_a_level_takes_the_top_left_pixel_of_each_cell():
    owner = torch.randint(7, (64, 64), generator=torch.Generator().manual_seed(0))
    for factor in (2, 4, 8):
        assert torch.equal(labels.at_grid(owner, (64 // factor, 64 // factor)), owner[::factor, ::factor])


@pytest.mark.parametrize("pixels, cells", [((512, 768), (64, 96)), ((520, 512), (65, 64))])
def test_labels_survive_the_way_to_pixels_and_back(pixels, cells):
    owner = torch.randint(4, cells, generator=torch.Generator().manual_seed(1))
    masks = labels.to_masks(labels.at_grid(owner, pixels), 4)
    assert torch.equal(labels.at_grid(labels.from_masks(masks, 0), cells), owner)


def test_soft_masks_become_a_partition_and_bare_pixels_the_base():
    masks = torch.zeros(3, 4, 4)
    masks[0, :, 0], masks[1, :, 0], masks[2, :, 1] = 0.4, 0.6, 0.1
    owner = labels.from_masks(masks, base=2)
    assert owner[:, 0].tolist() == [1] * 4 and owner[:, 1].tolist() == [2] * 4 and (owner[:, 2:] == 2).all()


def test_thin_and_antialiased_strokes_constrain():
    """Nearest sampling would give 0 cells for both."""
    marks = torch.zeros(2, 512, 512)
    marks[0, 96:100, 10:360] = 1
    marks[1, 300:310, 50:60] = 254 / 255
    cells = labels.pool(marks, (64, 64))
    assert (cells == 0).sum() == 44 and (cells == 1).sum() == 4
    assert (labels.pool(marks, (33, 65)) == 0).any()


def test_a_cell_goes_to_the_stroke_that_covers_more_of_it():
    marks = torch.zeros(2, 16, 16)
    marks[0, :3, :8], marks[1, 3:8, :8] = 1, 1
    assert labels.pool(marks, (2, 2)).tolist() == [[1, -1], [-1, -1]]


def test_a_label_picture_reads_back():
    owner = torch.randint(-1, 13, (20, 20), generator=torch.Generator().manual_seed(2))
    picture = labels.picture(owner, 13)
    noisy = (picture * 255).round() / 255 + 0.01
    assert torch.equal(labels.from_picture(noisy, 13), labels.to_masks(owner, 13))


def test_colours_are_distinct():
    colours = labels.palette(32)
    distances = torch.cdist(colours, colours) + torch.eye(32)
    assert distances.min() > 0.05 and colours.amax(1).min() > 0.2


def test_white_paper_marks_nothing():
    """Nor do greys, a shaded paper, and colours that no label has; soft edges lose no more than a pixel."""
    paper = torch.ones(40, 40, 3)
    paper[:, 20:] = torch.linspace(1, 0, 20)[:, None]
    assert not labels.from_picture(paper, 10).any()
    assert not labels.from_picture(torch.tensor([1.0, 1.0, 0.0]).expand(8, 8, 3), 10).any()
    paper[10:20, 5:15] = labels.palette(10)[3]
    noise = 2 * torch.rand(40, 40, 3, generator=torch.Generator().manual_seed(0)) - 1
    marks = labels.from_picture((paper + 0.03 * noise).clamp(0, 1), 10)
    assert marks[3, 10:20, 5:15].all() and marks.sum() == 100
    soft = torch.nn.functional.avg_pool2d(paper.movedim(-1, 0), 3, 1, 1, count_include_pad=False).movedim(0, -1)
    marks = labels.from_picture(soft, 10)
    assert marks[3, 11:19, 6:14].all() and marks.sum() == marks[3, 10:20, 5:15].sum()


def test_a_paste_takes_each_pixel_from_its_picture():
    pictures = torch.rand(5, 9, 7, 3)
    owner = torch.randint(5, (9, 7))
    expected = (labels.to_masks(owner, 5)[..., None] * pictures).sum(0)
    assert torch.equal(labels.paste(pictures, owner), expected)


def test_a_paste_makes_nothing_larger_than_its_result():
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if found.untyped_storage().data_ptr() != pictures.untyped_storage().data_ptr():
                self.bytes = max(self.bytes, found.untyped_storage().nbytes())
            return found

    pictures, owner = torch.rand(32, 16, 16, 3), torch.randint(32, (16, 16))
    with Largest() as largest:
        result = labels.paste(pictures, owner)
    assert largest.bytes <= max(result.nbytes, owner.nbytes)
