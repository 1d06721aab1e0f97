import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from metamixer_ray.data import decoding
from metamixer_ray.data.decoding import Decoded, decode_all, decode_chunk, decode_pieces, to_rgb
from metamixer_ray.data.sources.base import Chunk
from tests.data.drawing import encoded, picture, pixels


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_rgb_comes_through_unchanged(kind: str, tmp_path: Path) -> None:
    data = encoded(picture(1), kind) if kind != "WEBP" else _lossless_webp()
    (tmp_path / "image").write_bytes(data)
    for raw in (data, str(tmp_path / "image"), picture(1), np.asarray(picture(1))):
        image = to_rgb(raw, None)
        assert image.dtype == np.uint8
        assert image.flags["C_CONTIGUOUS"]
        assert np.array_equal(image, pixels(1))


def _lossless_webp() -> bytes:
    import io

    out = io.BytesIO()
    picture(1).save(out, "WEBP", lossless=True)
    return out.getvalue()


def test_grey_of_8_and_16_bits() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    expected = np.stack([grey] * 3)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(to_rgb(encoded(Image.fromarray(grey)), None), expected)
    assert np.array_equal(to_rgb(encoded(deep), None), expected)
    assert np.array_equal(to_rgb(encoded(deep, "TIFF"), None), expected)
    assert np.array_equal(to_rgb(grey, None), expected)
    assert np.array_equal(to_rgb(grey[:, :, None], None), expected)


def test_palette_with_and_without_transparency() -> None:
    palette = picture(2).quantize(16)
    expected = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(to_rgb(encoded(palette), None), expected)
    palette.info["transparency"] = bytes(range(16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(to_rgb(encoded(palette), None), expected)


def test_alpha_is_dropped_not_blended() -> None:
    image = picture(3).convert("RGBA")
    image.putalpha(7)
    assert np.array_equal(to_rgb(encoded(image), None), pixels(3))
    assert to_rgb(encoded(picture(3).convert("LA")), None).shape == (3, 8, 8)


def test_cmyk() -> None:
    image = picture(4).convert("CMYK")
    assert np.array_equal(to_rgb(encoded(image, "TIFF"), None), pixels(4))


def test_orientation_in_exif_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    import io

    out = io.BytesIO()
    picture(5).save(out, "PNG", exif=exif)
    assert np.array_equal(to_rgb(out.getvalue(), None), pixels(5))


def test_the_first_frame_of_an_animation_counts() -> None:
    import io

    out = io.BytesIO()
    picture(6).save(out, "PNG", save_all=True, append_images=[picture(7)])
    assert np.array_equal(to_rgb(out.getvalue(), None), pixels(6))


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40), (64, 30)])
def test_resize_brings_the_short_side_to_size_and_keeps_the_centre(width: int, height: int) -> None:
    whole = picture(8, 64).crop((0, 0, width, height))
    scale = 10 / min(width, height)
    shrunk = whole.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (shrunk.width - 10) // 2, (shrunk.height - 10) // 2
    expected = np.asarray(shrunk.crop((left, top, left + 10, top + 10))).transpose(2, 0, 1).astype(int)
    tolerance = 1 if width != 64 else 60  # there the centre falls between two pixels
    assert np.abs(to_rgb(encoded(whole), 10).astype(int) - expected).max() <= tolerance


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = to_rgb(stripes, 8)
    assert np.abs(small.astype(int) - 127).max() < 20, "every pixel is the mean of what it covers"


def test_broken_images_are_reported_at_their_place() -> None:
    png = encoded(picture(1, 64))
    raws = [b"", b"not an image", png[: len(png) // 2], None, png, np.zeros((4, 4, 2), np.uint8)]
    decoded = decode_chunk(Chunk(list(raws), [0] * 6, ["place"] * 6), None)
    assert [image is None for image in decoded.images] == [True, True, True, True, False, True]
    assert all("cannot be decoded" in str(problem) for i, problem in enumerate(decoded.problems) if i != 4)
    assert decoded.problems[4] is None
    assert "UnidentifiedImageError: cannot identify image file)" in str(decoded.problems[1])


def test_floating_point_pixels_are_refused() -> None:
    floats = Image.fromarray(np.random.default_rng(0).random((8, 8)).astype(np.float32))
    decoded = decode_chunk(Chunk([encoded(floats, "TIFF")], [0], [""]), None)
    assert "floating-point" in str(decoded.problems[0])


def test_a_decompression_bomb_is_an_error_not_a_crash() -> None:
    for side in (10_000, 20_000):  # Pillow warns of the first and refuses the second
        bomb = encoded(Image.new("1", (side, side)))
        assert len(bomb) < 200_000
        decoded = decode_chunk(Chunk([bomb], [0], [""]), 32)
        assert decoded.images == [None]
        assert "too large" in str(decoded.problems[0])


@pytest.mark.parametrize("side", [3, 4097])
def test_an_image_keeps_its_own_size_only_where_that_could_be_asked_for(side: int) -> None:
    header = encoded(Image.new("1", (side, 8)))[:45]  # the pixels aren't there: nothing may try to decode them
    decoded = decode_chunk(Chunk([header, np.zeros((8, side), np.uint8)], [0] * 2, [""] * 2), None)
    for problem in decoded.problems:
        assert str(problem).startswith(f"the image is {side} x 8 pixels, ")
        assert "--image-size N" in str(problem)
    assert to_rgb(encoded(Image.new("1", (side, 8))), 8).shape == (3, 8, 8)


def flat(pieces: list[Decoded]) -> list[tuple[object, ...]]:
    """All that was decoded, row by row."""
    return [
        (None if image is None else image.tobytes(), label, place, problem)
        for piece in pieces
        for image, label, place, problem in zip(piece.images, piece.labels, piece.places, piece.problems, strict=True)
    ]


RAWS = st.lists(st.one_of(st.just(b"broken"), st.integers(4, 9)), min_size=1, max_size=40)


@given(raws=RAWS, limit=st.integers(1, 2000))
def test_pieces_hold_few_bytes_and_together_all_rows(raws: list[bytes | int], limit: int) -> None:
    images = [raw if isinstance(raw, bytes) else encoded(picture(i, raw)) for i, raw in enumerate(raws)]
    chunk = Chunk(list(images), list(range(len(raws))), [f"row {i}" for i in range(len(raws))])
    whole = decode_chunk(chunk, None)
    assert whole.rest is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "PIECE_BYTES", limit)
        pieces = list(decode_pieces(chunk, None))
    assert flat(pieces) == flat([whole])
    for piece in pieces:
        assert sum(image.nbytes for image in piece.images[:-1] if image is not None) < limit


@pytest.mark.parametrize("processes", [1, 2])
def test_large_images_come_in_pieces_from_a_pool_too(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    data = [encoded(picture(i)) for i in range(20)]
    chunks = [
        Chunk([data[(c + i) % 20] for i in range(30)], [c] * 30, [f"{c}, {i}" for i in range(30)]) for c in range(9)
    ]
    expected = flat(list(decode_all(iter(chunks), size=None, rows=270, processes=1)))
    monkeypatch.setattr(decoding, "HELPED_FROM_ROWS", 1)
    monkeypatch.setattr(decoding, "PIECE_BYTES", 7 * 3 * 8 * 8)
    pieces = list(decode_all(iter(chunks), size=None, rows=270, processes=processes))
    assert flat(pieces) == expected
    assert max(len(piece.images) for piece in pieces) == 7


def test_a_pool_gives_the_same_in_the_same_order() -> None:
    data = [encoded(picture(i)) for i in range(50)]
    chunks = [Chunk([data[(7 * c + i) % 50] for i in range(100)], [c] * 100, [""] * 100) for c in range(41)]
    alone = list(decode_all(iter(chunks), size=6, rows=4100, processes=1))
    pooled = list(decode_all(iter(chunks), size=6, rows=4100, processes=2))
    assert [d.labels for d in pooled] == [d.labels for d in alone]
    for a, b in zip(alone, pooled, strict=True):
        assert np.array_equal(np.stack(a.images), np.stack(b.images))
