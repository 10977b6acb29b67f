"""Pictures for Dagster's UI can be read: numbers are written out, decades have names, and what does not change looks so."""

import pytest

from interp_assets.planning.plots import as_markdown, make_figure, use_log, write_number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.5e6, "1.5M"),
        (2e9, "2B"),
        (20_000.0, "20k"),
        (1024.0, "1,024"),
        (32.1, "32.1"),
        (-0.25, "-0.25"),
        (0.002, "0.002"),
        (3e-7, "3e-07"),
    ],
)
def test_numbers_of_an_axis_are_written_out(value: float, text: str) -> None:
    """1.5M can be read at a glance; 1.50 under a 1e6 in the corner cannot."""
    assert write_number(value) == text


def test_what_hardly_changes_is_drawn_as_a_line_and_without_an_offset() -> None:
    """The L0 of a top-k SAE is k: an axis from 0.0000 to 0.0005 with +3.2e1 above it says otherwise."""
    figure, axes = make_figure("step", "L0")
    axes.plot([0, 1, 2], [32.0, 32.0005, 32.0])
    as_markdown(figure, "L0")
    low, high = axes.get_ylim()
    assert low < 31.9
    assert high > 32.1
    assert axes.yaxis.get_offset_text().get_text() == ""
    assert "32" in [label.get_text() for label in axes.get_yticklabels()]


def test_a_logarithmic_axis_names_its_decades() -> None:
    """A loss that falls from 100 to 0.01 has 100, 10, 1, 0.1 and 0.01 beside it; one that falls by half has numbers, too."""
    for values, wanted in (([100.0, 0.01], {"100", "10", "1", "0.1", "0.01"}), ([1.0, 0.18], {"1", "0.5", "0.2"})):
        figure, axes = make_figure("step", "loss")
        axes.plot(range(len(values)), values)
        use_log(axes, "y")
        as_markdown(figure, "loss")
        assert wanted <= {label.get_text() for label in axes.get_yticklabels()}


def test_a_map_keeps_all_of_its_rows() -> None:
    """Its axis runs down: taken for one that hardly changes, it showed the two rows in the middle of twelve."""
    figure, axes = make_figure("head", "layer")
    axes.imshow([[0.0, 1.0]] * 12)
    as_markdown(figure, "heads")
    assert axes.get_ylim() == (11.5, -0.5)
