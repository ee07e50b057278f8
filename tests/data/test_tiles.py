"""Tiles of Phi-3.5-V and LLaVA-1.6, and the places of their features."""

import json
import math
import pathlib
import types

import numpy as np
import pytest
from PIL import Image, ImageOps
from safetensors.numpy import load_file

from unime_jax.data import preprocess, processor_files, tiles
from unime_jax.types import ImageSpec, UserError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "phi3v_tiny"
PHI = ImageSpec("phi_hd", 336, 144, crops=16)
GRIDS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
LLAVA = ImageSpec("llava_anyres", 336, 576, grids=GRIDS)
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
SIZES = [
    *[(1, 1), (8000, 50), (50, 8000), (336, 336), (335, 337), (1, 700), (640, 480), (480, 641)],
    *[(1000, 333), (333, 1000), (17, 23), (1200, 1199), (673, 336), (672, 672), (100, 301)],
]


def normalised(found):
    """What the device makes of uint8 tiles: f32[C, 3, S, S]."""
    return ((found / np.float32(255) - MEAN) / STD).transpose(0, 3, 1, 2)


def noise(width, height, seed=0):
    """A picture with structure at all scales."""
    rng = np.random.default_rng((seed, width, height))
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((width, height))
    fine = rng.integers(-40, 40, (height, width, 3))
    return Image.fromarray((np.asarray(small) + fine).clip(0, 255).astype(np.uint8))


# ---- Phi-3.5-V


def thumbnail(canvas, rows, columns):
    """Bicubic, a = -0.75, half-pixel centres, no antialiasing: f32[H, W, 3] -> f32[336, 336, 3]."""
    for axis, count in ((0, rows), (1, columns)):
        at = (np.arange(336) + 0.5) * count - 0.5
        first = np.floor(at).astype(int)
        out = 0.0
        for tap in (-1, 0, 1, 2):
            distance = np.abs(at - first - tap)
            near = 1.25 * distance**3 - 2.25 * distance**2 + 1
            far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
            weight = np.where(distance <= 1, near, far)
            taken = canvas.take((first + tap).clip(0, canvas.shape[axis] - 1), axis)
            out = out + taken * np.expand_dims(weight, (1 - axis, 2))
        canvas = out
    return canvas


def phi(**kwargs):
    return preprocess.Preprocessor(GOLDEN, PHI, prompt="phi35v", max_tokens=4096, **kwargs)


@pytest.mark.parametrize("number", range(4))
def test_phi_tiles_and_thumbnail_are_the_published_processors(number):
    golden = {
        key.removeprefix(f"image_{number}."): value
        for key, value in load_file(GOLDEN / "golden.safetensors").items()
        if key.startswith(f"image_{number}")
    }
    found = phi().image(Image.fromarray(golden[f"image_{number}"]))
    rows, columns = found.layout.grid
    assert [rows * 336, columns * 336] == golden["image_size"].tolist()
    assert found.layout.positions == golden["num_img_tokens"][0]
    ours = normalised(found.tiles)
    theirs = golden["pixel_values_strided"]
    count = len(ours) + 1
    np.testing.assert_array_equal(ours[..., ::12, ::12], theirs[1:count])
    assert not theirs[count:].any()
    means = golden["pixel_values_mean_per_crop"]
    np.testing.assert_allclose(ours.mean((1, 2, 3), dtype=np.float64), means[1:count], atol=1e-7)
    canvas = ours.reshape(rows, columns, 3, 336, 336).transpose(0, 3, 1, 4, 2)
    whole = thumbnail(canvas.reshape(rows * 336, columns * 336, 3), rows, columns)
    np.testing.assert_allclose(whole[::12, ::12].transpose(2, 0, 1), theirs[0], atol=3e-6)
    np.testing.assert_allclose(whole.mean(), means[0], atol=1e-6)


def published_hd(width, height, crops):
    """The published code's arithmetic: (rows, columns) of a picture."""
    portrait = width < height
    if portrait:
        width, height = height, width
    ratio = width / height
    scale = 1
    while scale * np.ceil(scale / ratio) <= crops:
        scale += 1
    new_width = int((scale - 1) * 336)
    rows, columns = math.ceil(int(new_width / ratio) / 336), new_width // 336
    return (columns, rows) if portrait else (rows, columns)


@pytest.mark.parametrize("crops", [1, 2, 4, 7, 16])
def test_phi_grids_of_many_sizes(crops):
    rng = np.random.default_rng(crops)
    many = [tuple(map(int, row)) for row in np.exp(rng.uniform(0, 8, (300, 2))).astype(int)]
    seen = set()
    for width, height in SIZES + many:
        if max(width, height) > 336 * crops * min(width, height):
            with pytest.raises(UserError, match="too thin"):
                phi(image_crops=crops).layout(width, height)
            continue
        layout = phi(image_crops=crops).layout(width, height)
        rows, columns = layout.grid
        assert layout.grid == published_hd(width, height, crops), (width, height)
        assert layout.positions == (rows * columns + 1) * 144 + 1 + (rows + 1) * 12
        assert layout.tiles == rows * columns <= crops
        seen.add(layout.grid)
    assert len(seen) >= min(crops, 9)


@pytest.mark.parametrize("size", SIZES)
def test_phi_tiles_of_every_shape(size):
    """The published code in Pillow's words: turn, resize, pad in white, turn back, cut."""
    image = noise(*size)
    turned = image.transpose(Image.Transpose.TRANSPOSE) if size[0] < size[1] else image
    ratio = turned.width / turned.height
    scale = max(s for s in range(1, 17) if s * math.ceil(s / ratio) <= 16)
    small = turned.resize((336 * scale, int(336 * scale / ratio)), Image.Resampling.BILINEAR)
    spare = math.ceil(small.height / 336) * 336 - small.height
    padded = ImageOps.expand(small, (0, spare // 2, 0, spare - spare // 2), "white")
    if size[0] < size[1]:
        padded = padded.transpose(Image.Transpose.TRANSPOSE)
    boxes = [
        (left, top, left + 336, top + 336)
        for top in range(0, padded.height, 336)
        for left in range(0, padded.width, 336)
    ]
    found = phi(image_crops=16).image(image)
    assert len(boxes) == len(found.tiles) == found.layout.tiles
    for box, tile in zip(boxes, found.tiles, strict=True):
        np.testing.assert_array_equal(tile, np.asarray(padded.crop(box)))


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (3, 2), (4, 4)])
def test_phi_features_stand_line_by_line(grid):
    rows, columns = grid
    layout = tiles._phi_layout(rows, columns, 144)
    expected = []
    for line in range(rows * 12):
        for column in range(columns):
            slot = 0 if grid == (1, 1) else 1 + line // 12 * columns + column
            expected += [2 + slot * 144 + line % 12 * 12 + x for x in range(12)]
        expected.append(0)
    expected.append(1)
    for line in range(12):
        expected += [*(2 + line * 12 + x for x in range(12)), 0]
    assert layout.index.tolist() == expected


def test_a_thin_picture_is_refused_by_name():
    with pytest.raises(UserError, match="row 1: 6000 x 1 pixels: too thin"):
        phi().embed_rows([[5], [-1, 5]], [None, Image.new("RGB", (6000, 1))])
    with pytest.raises(UserError, match="^1 x 6000 pixels: too thin, .* from 1 to 0"):
        phi().layout(1, 6000)
    assert phi().layout(1344, 1).grid == (1, 4)


def test_few_numbers_of_tiles_make_groups():
    found = phi().embed_rows([[5, -1, 6]] * 2, [noise(900, 300), noise(800, 400)])
    wide = {grid: group for group, _ in found for grid in map(tuple, group.grid)}
    assert set(wide) == {(1, 3), (1, 2)}
    assert wide[1, 2].tiles.shape[:2] == (1, 2) and wide[1, 3].tiles.shape[:2] == (1, 4)
    assert wide[1, 3].tiles[0, 2].any() and not wide[1, 3].tiles[0, 3].any()
    kinds = {phi(image_crops=16).transform.bucket(count) for count in range(1, 17)}
    assert kinds == {1, 2, 4, 6, 9, 12, 16}
    assert phi(image_crops=30).transform.bucket(25) == 25


# ---- LLaVA-1.6


@pytest.fixture(scope="module")
def theirs():
    """transformers' processor of the published checkpoint, on Pillow."""
    module = pytest.importorskip("transformers.models.llava_next.image_processing_pil_llava_next")
    return module.LlavaNextImageProcessorPil(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        image_grid_pinpoints=[list(grid) for grid in GRIDS],
    )


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    directory = tmp_path_factory.mktemp("none")
    return preprocess.Preprocessor(directory, LLAVA, prompt="llava16", max_tokens=4096)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_llava_tiles_are_transformers(theirs, llava, size):
    image = noise(*size)
    expected = theirs(image, return_tensors="np")
    found = llava.image(image)
    assert expected["image_sizes"][0].tolist() == [size[1], size[0]]
    np.testing.assert_allclose(normalised(found.tiles), expected["pixel_values"][0], atol=1e-6)
    assert found.layout.tiles == len(found.tiles)


def test_llava_features_stand_as_transformers_packs_them(llava):
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.llava_next.modeling_llava_next")
    config = types.SimpleNamespace(
        vision_config=types.SimpleNamespace(image_size=336, patch_size=14),
        image_grid_pinpoints=[list(grid) for grid in GRIDS],
    )
    rng = np.random.default_rng(0)
    many = [tuple(map(int, row)) for row in np.exp(rng.uniform(0, 8.5, (60, 2))).astype(int)]
    sizes = SIZES + many
    layouts = [llava.layout(*size) for size in sizes]
    # Features that are their own place in the visual sequence; the newline is 0.
    features = [torch.arange(layout.tiles * 576).reshape(-1, 576, 1) + 1 for layout in layouts]
    expected, lengths = module.LlavaNextModel.pack_image_features(
        types.SimpleNamespace(config=config),
        features,
        torch.tensor([(height, width) for width, height in sizes]),
        "default",
        image_newline=torch.zeros(1),
    )
    for size, layout, packed, length in zip(sizes, layouts, expected, lengths, strict=True):
        assert layout.index.tolist() == packed[:, 0].tolist(), size
        assert layout.positions == length
    assert {layout.grid for layout in layouts} == {(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)}


def test_llava_canvases_in_any_order():
    """With the published order the least waste decides nothing; configs may have another."""
    utils = pytest.importorskip("transformers.image_processing_utils")
    rng = np.random.default_rng(0)
    sizes = SIZES + [tuple(map(int, row)) for row in rng.integers(1, 1200, (200, 2))]
    for _ in range(4):
        grids = tuple(GRIDS[i] for i in rng.permutation(5))
        transform = tiles.AnyResolution(ImageSpec("llava_anyres", 336, 576, grids=grids))
        for width, height in sizes:
            best = utils.select_best_resolution((height, width), grids)
            grid = best[0] // 336, best[1] // 336
            assert transform.layout(width, height).grid == grid, (width, height, grids)


# ---- settings


def test_every_picture_may_take_the_same(llava):
    one = phi(image_size=336, image_crops=1)
    assert (one.fixed_layout.grid, one.fixed_layout.positions) == ((1, 1), 313)
    assert one.image(noise(50, 400)).tiles.shape == (1, 336, 336, 3)
    resized = noise(50, 400).resize((336, 336), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(one.image(noise(50, 400)).tiles[0], np.asarray(resized))
    assert phi(image_size=336).fixed_layout.grid == (2, 2)  # the checkpoint's 4 crops
    low = preprocess.Preprocessor(
        GOLDEN.parent, LLAVA, prompt="llava16", max_tokens=4096, image_size=336
    )
    assert (low.fixed_layout.tiles, low.fixed_layout.positions) == (3, 1176)
    for free in (phi(), llava):
        with pytest.raises(UserError, match="set config.data.image_size"):
            _ = free.fixed_layout


def test_the_number_of_crops_is_the_checkpoints(tmp_path):
    def grid(**kwargs):
        return processor_files.make_transform(PHI, tmp_path, **kwargs).layout(50, 50).grid

    assert grid() == (4, 4)  # no file: the published 16
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"num_crops": 9}))
    assert grid() == (3, 3) and grid(crops=4) == (2, 2)
    with pytest.raises(UserError, match="image_crops=4: .*llava_anyres.* leave it 0"):
        processor_files.make_transform(LLAVA, tmp_path, crops=4)


@pytest.mark.parametrize(
    ("spec", "settings", "named"),
    [
        (PHI, {"image_mean": [0.5, 0.5, 0.5]}, "image_mean"),
        (PHI, {"rescale_factor": 10**400}, "rescale_factor"),
        (PHI, {"image_std": [0.26862954, 0.26130258]}, "image_std"),
        (PHI, {"num_img_tokens": 256}, "num_img_tokens"),
        (PHI, {"num_crops": 0}, "num_crops=0"),
        (PHI, {"do_convert_rgb": False}, "do_convert_rgb"),
        (LLAVA, {"resample": 2}, "resample"),
        (LLAVA, {"rescale_factor": 1.0}, "rescale_factor"),
        (LLAVA, {"do_normalize": False}, "do_normalize"),
        (LLAVA, {"size": {"shortest_edge": 224}}, "size.shortest_edge"),
        (LLAVA, {"crop_size": 224}, "crop_size=224"),
        (LLAVA, {"image_grid_pinpoints": [[336, 672]]}, "image_grid_pinpoints"),
    ],
)
def test_settings_that_change_pixels_are_refused(tmp_path, spec, settings, named):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"preprocessor_config.json: {named}"):
        processor_files.make_transform(spec, tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    with pytest.raises(UserError, match=f"processor_config.json: {named}"):
        processor_files.make_transform(spec, tmp_path)


def test_what_transformers_saves_is_accepted(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["size"] and saved["image_mean"]
    assert processor_files.make_transform(LLAVA, tmp_path).layout(336, 336).tiles == 3


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match="preprocessor_config.json is not readable JSON"):
        processor_files.make_transform(PHI, tmp_path)
    with pytest.raises(UserError, match="unknown kind of image_spec: 'cubes'"):
        processor_files.make_transform(ImageSpec("cubes", 3, 3), tmp_path)
