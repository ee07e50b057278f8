"""Decoding images of any kind."""

import io

import numpy as np
import packages
import pytest
from PIL import Image

from unime_jax.data import pictures
from unime_jax.types import UserError


def encoded(image, kind="PNG", **kwargs) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **kwargs)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
def test_every_mode_becomes_rgb(mode):
    if mode in ("I;16", "I"):
        image = Image.fromarray(np.full((4, 6), 65535, np.uint16 if mode == "I;16" else np.int32))
    else:
        image = Image.new("RGB", (6, 4), "white").convert(mode)
    kind = "TIFF" if mode in ("CMYK", "YCbCr", "I") else "PNG"
    found = pictures.open_rgb(encoded(image, kind), "x")
    assert (found.mode, found.size) == ("RGB", (6, 4))
    np.testing.assert_allclose(np.asarray(found), 255, atol=2)


def test_transparency_is_white_and_margins_can_be_cut():
    image = Image.new("RGBA", (10, 8), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (2, 3, 5, 7))
    content = encoded(image)
    whole = np.asarray(pictures.open_rgb(content, "x"))
    assert whole.shape == (8, 10, 3)
    assert (whole[0, 0] == 255).all() and (whole[3, 2] == [255, 0, 0]).all()
    cut = np.asarray(pictures.open_rgb(content, "x", trim=True))
    assert cut.shape == (4, 3, 3) and (cut == [255, 0, 0]).all()


def test_a_palette_with_a_transparent_colour():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((0, 0), 1)
    found = np.asarray(pictures.open_rgb(encoded(image, transparency=0), "x"))
    assert (found[0, 0] == [200, 0, 0]).all() and (found[1, 1] == 255).all()


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (8, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    assert pictures.open_rgb(encoded(image, "JPEG", exif=exif), "x").size == (4, 8)


@pytest.mark.parametrize(
    "content",
    [b"", b"not an image", packages.png()[:40], packages.bomb()],
    ids=["empty", "text", "truncated", "bomb"],
)
def test_what_cannot_be_read_is_named(content):
    with pytest.raises(UserError, match=r"^shelf/7.png: "):
        pictures.open_rgb(content, "shelf/7.png")


def test_a_large_picture_is_refused_by_its_header():
    with pytest.raises(UserError, match="x: 12000 x 9000 pixels is more than 100 MP"):
        pictures.open_rgb(packages.bomb(12000, 9000), "x")


def test_sixteen_bits_a_channel_keep_their_brightness():
    grey = Image.fromarray(np.full((4, 6), 32768, np.uint16))
    found = pictures.open_rgb(encoded(grey), "x")
    np.testing.assert_allclose(np.asarray(found), 127, atol=1)


def test_a_cut_jpeg_is_no_image():
    rng = np.random.default_rng(0)
    whole = encoded(Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)), "JPEG")
    with pytest.raises(UserError, match="not a readable image"):
        pictures.open_rgb(whole[: len(whole) // 2], "x")


def test_what_may_be_given_as_an_image(tmp_path):
    image = Image.new("RGB", (5, 3), "blue")
    path = tmp_path / "x.png"
    image.save(path)
    for source in (image, path, str(path), path.read_bytes(), bytearray(path.read_bytes())):
        assert pictures.load_rgb(source).size == (5, 3)
    with pytest.raises(UserError, match="missing.png: cannot be read"):
        pictures.load_rgb(tmp_path / "missing.png")
    with pytest.raises(UserError, match="not ndarray"):
        pictures.load_rgb(np.zeros((3, 3)))


def test_square_keeps_the_aspect_on_white():
    found = pictures.square(Image.new("RGB", (20, 10), "red"), 8)
    assert found.shape == (8, 8, 3) and found.dtype == np.uint8
    assert (found[:2] == 255).all() and (found[-2:] == 255).all()
    assert (found[2:6] == [255, 0, 0]).all()


def test_augmentation_follows_its_generator():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (40, 30, 3), np.uint8))
    views = [
        pictures.square(pictures.augment(image, np.random.default_rng(seed)), 16)
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(views[0], views[1])
    assert (views[0] != views[2]).any()
    tiny = Image.new("RGB", (1, 1))
    for seed in range(20):
        pictures.square(pictures.augment(tiny, np.random.default_rng(seed)), 4)


def test_shrink_stores_at_most_256_pixels():
    stored = Image.open(io.BytesIO(pictures.shrink(Image.new("RGB", (1000, 500), "red"))))
    assert (stored.size, stored.format) == ((256, 128), "JPEG")
    small = Image.open(io.BytesIO(pictures.shrink(Image.new("RGB", (10, 5)))))
    assert small.size == (10, 5)


def test_copies_of_a_picture_have_about_the_same_fingerprint():
    x, y = np.meshgrid(np.arange(200), np.arange(120))
    colours = np.stack([x + y, 200 - x, 2 * y], -1).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(colours)
    stored = pictures.open_rgb(pictures.shrink(image.resize((131, 79))), "x")
    same = pictures.fingerprint(image) - pictures.fingerprint(stored)
    assert np.abs(same).mean() < pictures.SAME_PICTURE
    other = pictures.fingerprint(image) - pictures.fingerprint(Image.fromarray(colours[:, ::-1]))
    assert np.abs(other).mean() > 2 * pictures.SAME_PICTURE


def test_svg_measured_in_points():
    pytest.importorskip("resvg_py")
    svg = (
        b'<svg xmlns="http://www.w3.org/2000/svg" width="150pt" height="75pt">'
        b'<rect width="100%" height="100%" fill="#00f"/></svg>'
    )
    image = pictures.open_rgb(pictures.render_svg(svg, "x"), "x")
    assert image.size == (512, 256)
    assert (np.asarray(image)[100, 100] == [0, 0, 255]).all()
    with pytest.raises(UserError, match="a.svg: not a readable SVG"):
        pictures.render_svg(b"<svg", "a.svg")
