"""gIoU and cIoU against counts by hand and a loop over pixels."""

import json

import numpy as np
import pytest
from PIL import Image

from laver_megatron.__main__ import main
from laver_megatron.scores.segmentation import IGNORED, score_masks


def mask(*rows: str) -> np.ndarray:
    """1 object, 0 none, . ignored."""
    return np.array([[IGNORED if pixel == "." else int(pixel) for pixel in row] for row in rows], dtype=np.uint8)


def test_by_hand():
    """1 of 3 pixels, 4 of 4, and an empty one that is right: gIoU (1/3 + 1 + 1) / 3, cIoU (1 + 4) / (3 + 4)."""
    pairs = [
        (mask("110", "000"), mask("011", "000")),
        (mask("11", "11"), mask("11", "11")),
        (mask("00", "00"), mask("00", "00")),
    ]
    scores = score_masks((predicted == 1, target) for predicted, target in pairs)
    assert scores.giou == pytest.approx((1 / 3 + 2) / 3)
    assert scores.ciou == pytest.approx(5 / 7)
    assert (scores.num_masks, scores.num_empty) == (3, 1)


def test_a_mask_where_nothing_is_counts_nothing():
    scores = score_masks([(mask("10") == 1, mask("00"))])
    assert (scores.giou, scores.ciou, scores.num_empty) == (0.0, 0.0, 1)


def test_ignored_pixels_count_in_neither():
    """The last is empty but for what is ignored, so it is right."""
    pairs = [(mask("1111") == 1, mask("11..")), (mask("0011") == 1, mask("00.."))]
    assert score_masks(pairs[:1]).giou == 1.0
    assert score_masks(pairs) == score_masks([(mask("11") == 1, mask("11")), (mask("00") == 1, mask("00"))])


def test_against_a_loop():
    generator = np.random.default_rng(0)
    pairs = [
        (generator.random((9, 7)) < 0.4, generator.choice([0, 1, IGNORED], (9, 7), p=[0.6, 0.3, 0.1]).astype(np.uint8))
        for _ in range(20)
    ]
    ratios, sums = [], np.zeros(2)
    for predicted_HW, target_HW in pairs:
        both = either = 0
        for chosen, wanted in zip(predicted_HW.ravel(), target_HW.ravel(), strict=True):
            if wanted != IGNORED:
                both += bool(chosen) and wanted == 1
                either += bool(chosen) or wanted == 1
        ratios.append(both / either)
        sums += both, either
    scores = score_masks(pairs)
    assert (scores.giou, scores.ciou) == pytest.approx((np.mean(ratios), sums[0] / sums[1]))


@pytest.fixture
def folders(tmp_path):
    predicted, target = tmp_path / "predicted", tmp_path / "target"
    predicted.mkdir()
    target.mkdir()
    Image.fromarray(mask("110", "000") * 255).save(predicted / "a.png")
    Image.fromarray(mask("011", "000")).save(target / "a.png")
    Image.fromarray(mask("01", "01") == 1).save(predicted / "b.png")  # of one bit
    Image.fromarray(mask("01", "0.")).save(target / "b.png")
    return predicted, target


def refused(capsys, folders) -> str:
    with pytest.raises(SystemExit) as end:
        main(["score-masks", "--predicted", str(folders[0]), "--target", str(folders[1])])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_folders(folders, capsys):
    main(["score-masks", "--predicted", str(folders[0]), "--target", str(folders[1]), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found == {"giou": pytest.approx(2 / 3), "ciou": pytest.approx(2 / 4), "num_masks": 2, "num_empty": 0}
    main(["score-masks", "--predicted", str(folders[0]), "--target", str(folders[1])])
    assert capsys.readouterr().out == "gIoU 66.67  cIoU 50.00  2 masks, 0 of them without an object\n"


def test_what_is_refused(folders, capsys, tmp_path):
    predicted, target = folders
    assert "no .png" in refused(capsys, (predicted, tmp_path))
    assert "absent" in refused(capsys, (predicted, tmp_path / "absent"))
    Image.fromarray(mask("00", "00")).save(target / "c.png")
    assert "1 masks, such as c.png, are missing" in refused(capsys, folders)
    Image.fromarray(mask("000", "000")).save(predicted / "c.png")
    assert "(2, 3) pixels, its target (2, 2)" in refused(capsys, folders)
    Image.fromarray(mask("00", "00")).save(predicted / "c.png")
    Image.fromarray(mask("0.", "00")).save(target / "c.png")
    assert "no pixel is 1" in refused(capsys, folders)
    Image.fromarray(mask("01", "00") * 7).save(target / "c.png")
    assert "holds 7; a target's pixels are 0, 1 and 255" in refused(capsys, folders)
    Image.new("RGB", (2, 2)).save(target / "c.png")
    assert "mode RGB" in refused(capsys, folders)
    (target / "c.png").write_text("no picture")
    assert "is no picture" in refused(capsys, folders)


def test_damaged_and_gigantic_masks_are_named(folders, capsys, monkeypatch):
    predicted, _ = folders
    path = next(predicted.iterdir())
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert f"{path} cannot be read: image file is truncated" in refused(capsys, folders)
    path.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    assert "cannot be read: Image size (" in refused(capsys, folders)
