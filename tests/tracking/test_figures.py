import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import rcParams
from matplotlib.figure import Figure
from PIL import Image

from metamixer_ray.tally import Tally
from metamixer_ray.tracking.figures import (
    EVALUATION_FIGURES,
    agreement_curves,
    attention_sheet,
    describe_label,
    evaluation_figures,
    figure_png,
    learning_curves,
    mixing_sheet,
)
from tests.tracking.examples import make_images, make_rows


def png_size(figure: Figure) -> tuple[int, int]:
    before = dict(rcParams)
    image = Image.open(io.BytesIO(figure_png(figure, dpi=60)))
    assert image.format == "PNG"
    assert np.asarray(image).std() > 1
    assert dict(rcParams) == before
    return image.size


def assert_laid_out(figure: Figure) -> None:
    """Every picture and text of a page is on it, and covers no other."""
    [axes] = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    boxes += {patch.get_extents().bounds: patch.get_extents() for patch in axes.patches}.values()
    assert len(boxes) > len(axes.texts) > 1
    for place, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
        assert not any(
            box.x0 < other.x1 and other.x0 < box.x1 and box.y0 < other.y1 and other.y0 < box.y1
            for other in boxes[:place]
        )


def legend_texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("peers", [1, 2, 8])
def test_learning_curves_name_every_peer(peers: int) -> None:
    rows = make_rows(peers, 12, every=3)
    figure = learning_curves(rows, make_rows(peers, 12, shift=-0.03))
    accuracy, loss = figure.axes
    texts = legend_texts(figure)
    for row_peer, text in zip(rows[-1]["peers"], texts, strict=False):
        assert text.startswith(f"{row_peer['name']}  {100 * row_peer['top1']:.2f} %")
        assert "alone" in text
    assert texts[peers].startswith("ensemble  65.00")
    assert accuracy.lines[0].get_xdata().tolist() == [3, 6, 9, 12]
    assert len(loss.lines[0].get_xdata()) == 12
    assert any(line.get_linestyle() == "--" for line in accuracy.lines)
    width, height = png_size(figure)
    assert width > height > 200


def test_learning_curves_of_a_first_epoch_that_was_not_evaluated() -> None:
    figure = learning_curves(make_rows(2, 5, every=5)[:1])
    assert [text.get_text() for text in figure.axes[0].texts] == ["not evaluated yet"]
    assert png_size(figure)[0] > 200


def test_one_evaluated_epoch_is_seen_where_it_lies() -> None:
    rows = make_rows(2, 5, every=5)
    figure = learning_curves(rows)
    accuracy, loss = figure.axes
    assert len(accuracy.lines) == 3
    assert all(line.get_xdata().tolist() == [5] and line.get_marker() == "o" for line in accuracy.lines[-1:])
    assert all(line.get_marker() != "None" for line in accuracy.lines)
    assert accuracy.get_xlim() == loss.get_xlim()
    png_size(figure)
    assert all(tick == int(tick) for tick in accuracy.get_xticks())


def test_agreement_has_a_line_per_stage() -> None:
    figure = agreement_curves(make_rows(3, 8, every=2))
    assert figure is not None
    assert [line.get_label() for line in figure.axes[0].lines] == ["stage 1", "stage 2", "stage 3"]
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), 90)
    assert png_size(figure)[0] > 200


def test_no_agreement_no_figure() -> None:
    assert agreement_curves(make_rows(2, 3, every=9)[:2]) is None


@pytest.mark.parametrize("quadruples", [1, 3])
def test_mixing_sheet_shows_every_image_with_its_label(quadruples: int) -> None:
    count = 4 * quadruples
    images = make_images(count)
    mixed = ["0.62 cat + 0.38 ship"] * count
    figure = mixing_sheet(images, images, images[::-1], labels=["cat"] * count, local_labels=mixed, global_labels=mixed)
    shown = figure.axes[0].get_images()
    assert len(shown) == 3 * count
    assert all(image.get_interpolation() == "nearest" for image in shown)
    np.testing.assert_array_equal(shown[1].get_array(), images[1].transpose(1, 2, 0))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts.count("cat") == count
    assert texts.count("0.62 cat\n+ 0.38 ship") == 2 * count
    assert texts.count("after local mixing") == quadruples
    assert_laid_out(figure)
    width, height = png_size(figure)
    assert min(width, height) > 200


def test_mixing_sheet_wants_quadruples() -> None:
    images = make_images(3)
    texts = ["cat"] * 3
    with pytest.raises(ValueError, match="quadruples"):
        mixing_sheet(images, images, images, labels=texts, local_labels=texts, global_labels=texts)


@pytest.mark.parametrize(("peers", "stages", "size"), [(2, 3, 32), (5, 4, 32), (1, 1, 160)])
def test_attention_sheet_has_a_map_per_peer_and_stage(peers: int, stages: int, size: int) -> None:
    count = 2
    rng = np.random.default_rng(0)
    attention = [[rng.random((count, 8 >> s, 8 >> s)) for s in range(stages)] for _ in range(peers)]
    attention[0][0][0] = 0  # a dead stage
    correct = np.zeros((peers, count), dtype=bool)
    correct[0] = True
    figure = attention_sheet(
        make_images(count, size),
        attention,
        names=[f"{p}-net" for p in range(peers)],
        labels=["cat", "ship"],
        predictions=[["cat 0.93", "dog 0.41"]] * peers,
        correct=correct,
    )
    shown = figure.axes[0].get_images()
    maps = [image for image in shown if image.get_cmap().name == "plasma" and image.get_array().ndim == 2]
    assert len(maps) == peers * stages * count
    assert len({tuple(image.get_extent()) for image in maps}) == len(maps)
    assert shown[0].get_interpolation() == ("nearest" if size == 32 else "antialiased")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sum(text.startswith("✓") for text in texts) == count
    assert sum(text.startswith("✗") for text in texts) == (peers - 1) * count
    assert set(texts) >= {f"{p}-net" for p in range(peers)}
    assert_laid_out(figure)
    assert max(png_size(figure)) <= 4000


def test_huge_figures_stay_within_four_thousand_pixels() -> None:
    figure = learning_curves(make_rows(2, 3))
    figure.set_size_inches(60, 5)
    assert max(Image.open(io.BytesIO(figure_png(figure))).size) <= 4000


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda w: sum(w) > 0.1))
def test_labels_in_words_are_sorted_and_complete(weights: list[float]) -> None:
    classes = ["cat", "ship", "frog"]
    text = describe_label(weights, classes)
    shown = [name for weight, name in sorted(zip(weights, classes, strict=True), key=lambda p: -p[0]) if weight > 0.005]
    assert [part.split()[-1] for part in text.split(" + ")] == shown


def test_labels_in_words() -> None:
    assert describe_label({"ship": 0.375, "cat": 0.625, "dog": 0.0}) == "0.62 cat + 0.38 ship"
    assert describe_label([0.0, 1.0], ["cat", "ship"]) == "ship"


@pytest.mark.parametrize(("peers", "classes"), [(1, 3), (5, 45)])
def test_evaluation_figures_show_every_peer(peers: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (400,), generator=generator)
    each = torch.randn(peers, 400, classes, generator=generator)
    each.scatter_add_(2, labels.expand(peers, -1)[:, :, None], 2 * torch.rand(peers, 400, 1, generator=generator))
    tally = Tally(peers, classes, torch.device("cpu"))
    tally.add(each.softmax(2), labels)
    names = [f"peer{i}-net" for i in range(peers)]
    told = {
        "run": "resnet32-wrn40-2-mobilenetv2-metamixer-dml-photos-20261122-155459",
        "split": f"/data/{30 * 'w'}/*.parquet, test split",
        **tally.scores(names),
        **tally.details(list(map(str, range(classes)))),
    }
    drops = {"peers": [{**p, "relative_drop": 0.1} for p in told["peers"]], "ensemble": told["ensemble"]}
    if peers > 1:
        drops["ensemble"] = {**told["ensemble"], "relative_drop": None}
    spoilt = {"severity": "severity 3", "corruptions": {"blur": {"setting": "much", **drops}}}
    figures = evaluation_figures({**told, **spoilt})
    assert list(figures) == ["per_class", "calibration", *(["agreement"] if peers > 1 else []), "corruptions"]
    assert tuple(figures) == EVALUATION_FIGURES or peers == 1
    shown = [*names, *(["ensemble"] if peers > 1 else [])]
    assert [text.rpartition("  ")[0] for text in legend_texts(figures["per_class"])] == shown
    assert len(figures["per_class"].axes[0].get_yticks()) == min(classes, 40)
    diagrams = [axes.get_title() for axes in figures["calibration"].axes if axes.get_title()]
    assert diagrams == shown
    if peers > 1:
        cells = [text.get_text() for text in figures["agreement"].axes[0].texts]
        assert len(cells) == peers**2
        assert cells[1] == f"{100 * told['pairwise_agreement'][0][1]:.1f}"
    assert [label.get_text().partition("\n")[0] for label in figures["corruptions"].axes[0].get_xticklabels()] == [
        "clean",
        "blur",
    ]
    for figure in figures.values():
        assert min(png_size(figure)) > 200
        assert figure.get_suptitle().endswith("400 images")
        [title] = [text for text in figure.texts if text.get_text() == figure.get_suptitle()]
        box = title.get_window_extent()
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
