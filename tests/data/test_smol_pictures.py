"""Pictures and captions read out of packages."""

import packages
import pytest

from unime_jax.data import clipart_titles, pictures, smol, smol_pictures, wordnet
from unime_jax.types import UserError

STAMPS = "usr/share/tuxpaint/stamps/"


def test_stamps():
    files = {
        STAMPS + "animals/birds/cartoon/tux.txt": "Tux—the mascot!\nde.utf8=Tux\n".encode(),
        STAMPS + "animals/birds/cartoon/tux.png": b"png",
        STAMPS + "animals/birds/cartoon/tux.svg": b"svg",
        STAMPS + "food/bread.txt": b"A loaf.",
        STAMPS + "food/bread.svg": b"svg",
        STAMPS + "food/no_picture.txt": b"Nothing.",
        STAMPS + "food/no_caption.txt": b"\n",
        STAMPS + "food/no_caption.png": b"png",
        STAMPS + "food/no_text.png": b"png",
    }
    tux, bread = smol_pictures.tux_paint(files.items())
    assert (tux.caption, tux.kind, tux.content) == ("Tux—the mascot!", "image", b"png")
    assert (tux.category, tux.name) == ("animals/birds/cartoon", "tux")
    assert tux.keywords == ("animals", "birds")
    assert (bread.caption, bread.kind) == ("A loaf.", "svg")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("animals/cat.png", True),
        ("animals/cat.txt", True),
        ("animals/cat.svg", True),
        ("animals/cat.ogg", False),
        ("animals/cat_mirror.png", False),
        ("symbols/alphabets/a.png", False),
    ],
)
def test_which_stamps_are_read(name, wanted):
    assert smol_pictures.wanted_stamp(STAMPS + name) == wanted


def test_drawings():
    root = "usr/share/games/pysiogame/res/images/art4apps/"
    files = [(root + "animals/baby_rabbit.jpg", b"1"), (root + "fruit_n_veg/fig.jpg", b"2")]
    rabbit, fig = smol_pictures.art4apps(files)
    assert (rabbit.caption, rabbit.keywords) == ("baby rabbit", ("animals",))
    assert fig.keywords == ("fruit or vegetable", "food")


def test_emoji_names():
    xml = (
        '<ldml><annotations><annotation cp="🐅">animal | tiger</annotation>'
        '<annotation cp="🐅" type="tts">tiger</annotation>'
        '<annotation cp="🇫🇷" type="tts">flag: France</annotation>'
        '<annotation cp="👋🏿" type="tts">waving hand: dark skin tone</annotation>'
        "</annotations></ldml>"
    )
    path = "usr/share/unicode/cldr/common/annotations/en.xml"
    tiger, flag = smol_pictures.emoji([(path, xml.encode())])
    assert (tiger.caption, tiger.keywords, tiger.kind) == ("tiger", ("animal",), "emoji")
    assert flag.caption == "flag of France"
    assert tiger.content.decode() == "🐅"
    with pytest.raises(UserError, match="not valid XML"):
        smol_pictures.emoji([(path, b"<ldml>")])


@pytest.fixture(scope="module")
def titles():
    nouns = "apple worm cat dog hat park tree Christmas_tree dragon head Dan candle"
    lines = [f"{i:08d} 06 n 01 {word} 0 000 | a thing" for i, word in enumerate(nouns.split())] + [
        "00000900 18 n 01 Xaver_Huber 0 000 | a person"
    ]
    empty = "  1 licence\n"
    data = {f"data.{part}": empty for part in wordnet.PARTS}
    adjectives = [f"{i:08d} 00 a 01 {word} 0 000 | so" for i, word in enumerate(["red", "nude"])]
    data["data.adj"] = empty + "\n".join(adjectives)
    data["data.noun"] = empty + "\n".join(lines)
    return clipart_titles.Titles(wordnet.WordNet({**data, "index.noun": empty}))


@pytest.mark.parametrize(
    ("stem", "title"),
    [
        ("apple_with_worm_dan_gerh_01", "apple with worm"),
        ("red_hat", "red hat"),
        ("hat_01", "hat"),
        ("hat_park_01", "hat"),
        ("dragon_head_nicu_buculei_01", "dragon head"),
        ("christmas_tree_02", "christmas tree"),
        ("apple_bw", "apple"),
        ("gatto_cat_architetto_fra_01", "cat"),
        ("cavallo_architetto_franc_03", "horse"),
        ("Pinguino4", "penguin"),
        ("md_costea_bogdan_", None),
        ("red", None),
        ("with_01", None),
        ("xaver_head", None),
        ("nude_cat", None),
        ("xyzzy_cat", None),
    ],
)
def test_titles_of_clip_art(titles, stem, title):
    # The miniature dictionary knows horse and penguin only by translation.
    if title in ("horse", "penguin"):
        titles._nouns |= {title}
    assert titles.read(stem) == title


def test_clip_art_is_read_once(titles):
    root = "usr/share/openclipart/png/"
    files = [(root + "food/fruit/apple_01.png", b"same"), (root + "unsorted/apple_02.png", b"same"),
             (root + "unsorted/hat.png", b"hat"), (root + "unsorted/qwerty.png", b"?")]  # fmt: skip
    apple, hat = smol_pictures.open_clip_art(files, titles)
    assert (apple.category, apple.keywords) == ("food/fruit", ("food", "fruit"))
    assert (hat.caption, hat.keywords) == ("hat", ())
    assert not smol_pictures.wanted_clipart(root + "computer/icons/lemon-theme/x.png")
    assert not smol_pictures.wanted_clipart(root + "recreation/games/cards/white/x.png")
    assert smol_pictures.wanted_clipart(root + "animals/cat.png")


# ---- decoding


def raw(name, content, kind="image"):
    return smol_pictures.RawPair("tuxpaint", "a", name, name, (), content, kind)


def test_bad_pictures_are_skipped_named_and_counted():
    pairs = [raw("good", packages.png()), raw("bad", b"x"), raw("huge", packages.bomb())]
    pairs += [raw("also good", packages.png("blue"))]
    counted = []
    kept, skipped, problems = smol.decode_pairs(pairs, None, counted.append)
    assert [found.raw.name for found in kept] == ["good", "also good"]
    assert skipped == {"tuxpaint": 2} and counted == [1, 2, 3, 4]
    assert problems[0].startswith("tuxpaint a/bad: ") and "a/huge" in problems[1]
    for found in kept:
        assert pictures.open_rgb(found.image, "x").size == (20, 12)
        assert found.fingerprint.shape == (192,)


def test_svg_needs_its_renderer(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install resvg-py"):
        smol.decode_pairs([raw("a", b"<svg/>", "svg")], None)


def test_emoji_are_drawn_once(assets):
    from unime_jax.data import assets as fetched

    with fetched.Cache(assets.parent / "packages") as cache:
        font = smol.read_font({"emoji": cache.path(smol.PACKAGES["emoji"])})
    wanted = {"🐅": True, "👩‍🚀": True, "🇫🇷": True, "a": False, "🐅🐅": False, "\U0010ffff": False}
    for characters, drawn in wanted.items():
        assert (font.render(characters) is not None) == drawn, characters
    pairs = [raw(c, c.encode(), "emoji") for c in ("🇫🇷", "🇲🇫", "🐅")]  # France, St. Martin
    kept, skipped, problems = smol.decode_pairs(pairs, font)
    assert [found.raw.name for found in kept] == ["🇫🇷", "🐅"]
    assert skipped["tuxpaint"] == 1 and problems == []
