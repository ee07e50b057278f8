"""Decoding images of any kind."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import packages
import pytest
from PIL import Image, ImageOps

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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(kind, orientation):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (4, 8, 3), np.uint8)).resize((16, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(image, kind, exif=exif, **options)
    plain = Image.open(io.BytesIO(encoded(image, kind, **options))).convert("RGB")
    plain.getexif()[0x0112] = orientation
    wanted = np.asarray(ImageOps.exif_transpose(plain))
    assert wanted.shape == ((8, 16, 3) if orientation < 5 else (16, 8, 3))
    for source in (content, Image.open(io.BytesIO(content))):
        assert pictures.size_of(source) == wanted.shape[1::-1]
        np.testing.assert_array_equal(np.asarray(pictures.load_rgb(source)), wanted)
    lazy = Image.open(io.BytesIO(content))
    np.testing.assert_array_equal(np.asarray(pictures.load_rgb(lazy)), wanted)


def test_exif_behind_the_pixels_of_a_png_counts():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.new("RGB", (8, 4), "red"), exif=exif)
    at = content.index(b"eXIf") - 4
    chunk = content[at : at + 12 + int.from_bytes(content[at : at + 4], "big")]
    end = content.index(b"IEND") - 4
    moved = content[:at] + content[at + len(chunk) : end] + chunk + content[end:]
    assert len(moved) == len(content) and moved != content
    assert pictures.size_of(moved) == pictures.load_rgb(moved).size == (4, 8)


def test_a_size_is_read_without_decoding(tmp_path):
    rng = np.random.default_rng(0)
    content = encoded(Image.fromarray(rng.integers(0, 255, (64, 48, 3), np.uint8)))
    cut = content[: len(content) // 2]
    (tmp_path / "cut.png").write_bytes(cut)
    assert pictures.size_of(cut) == pictures.size_of(tmp_path / "cut.png") == (48, 64)
    with pytest.raises(UserError, match="cut.png: not a readable image"):
        pictures.load_rgb(tmp_path / "cut.png")
    with pytest.raises(UserError, match="^image: not a readable image"):
        pictures.load_rgb(Image.open(io.BytesIO(cut)))
    for read in (pictures.size_of, pictures.load_rgb):
        with pytest.raises(UserError, match="is more than 100 MP"):
            read(packages.bomb(12000, 9000))
        with pytest.raises(UserError, match="is more than 100 MP"):
            read(Image.open(io.BytesIO(packages.bomb(12000, 9000))))
        with pytest.raises(UserError, match="0 x 5 pixels is no image"):
            read(Image.new("RGB", (0, 5)))
        with pytest.raises(UserError, match="missing.png: cannot be read"):
            read(tmp_path / "missing.png")
        with pytest.raises(UserError, match="not list"):
            read([1, 2])


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert Image.open(io.BytesIO(content)).n_frames == 2
        found = np.asarray(pictures.load_rgb(content))
        assert (np.abs(found.astype(int) - [255, 0, 0]) < 4).all(), kind


def test_one_image_may_stand_in_many_rows():
    """Pillow decodes in place, and rows are decoded by several threads."""
    rng = np.random.default_rng(0)
    whole = Image.fromarray(rng.integers(0, 255, (300, 300, 3), np.uint8))
    for _ in range(20):
        lazy = Image.open(io.BytesIO(encoded(whole, compress_level=1)))
        with ThreadPoolExecutor(8) as pool:
            for found in pool.map(pictures.load_rgb, [lazy] * 16):
                np.testing.assert_array_equal(np.asarray(found), np.asarray(whole))


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
    swapped = encoded(Image.frombytes("I;16B", (6, 4), b"\x80\0" * 24), "TIFF")
    assert Image.open(io.BytesIO(swapped)).mode == "I;16B"
    np.testing.assert_allclose(np.asarray(pictures.load_rgb(swapped)), 127, atol=1)


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
