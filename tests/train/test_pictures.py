"""Pictures and captions by the rules that the node and `encode` share: what is read, how, and what is refused."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.train import tiny
from train.data import pictures
from train.data.captions import (
    DEFAULT_PROMPT,
    DatasetError,
    caption_of,
    caption_warnings,
    folder_version,
    picture_files,
    with_trigger,
)
from train.data.pictures import fitted, read_picture, require_visible


def test_camera_rotation(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    image.save(tmp_path / "a.jpg", exif=exif, quality=100)
    turned = read_picture(tmp_path / "a.jpg")
    assert turned.size == (20, 40)
    assert turned.getpixel((10, 5))[2] > 200 > turned.getpixel((10, 35))[2]


@pytest.mark.parametrize(
    "mode, options, expected",
    [
        ("P", {"transparency": 0}, "RGBA"),
        ("P", {}, "RGB"),
        ("L", {}, "RGB"),
        ("LA", {}, "RGBA"),
        ("1", {}, "RGB"),
        ("RGBA", {}, "RGBA"),
    ],
)
def test_modes(tmp_path, mode, options, expected):
    image = Image.new("RGBA" if "A" in mode else "RGB", (8, 8), (200, 100, 50))
    image.convert(mode).save(tmp_path / "a.png", **options)
    assert read_picture(tmp_path / "a.png").mode == expected


def test_sixteen_bits_are_not_cut_off(tmp_path):
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    read = np.asarray(read_picture(tmp_path / "a.png"))
    np.testing.assert_allclose(read[..., 0], levels / 257, atol=1)


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red, green, _ = read_picture(tmp_path / "a.jpg").getpixel((4, 4))
    assert red > 200 and green < 60


def test_fitted_keeps_the_place(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    left, right = fitted(image, (20, 20), (0.0, 0.5)), fitted(image, (20, 20), (1.0, 0.5))
    assert left.getpixel((10, 10)) == (255, 0, 0) and right.getpixel((10, 10)) == (0, 0, 255)


def test_a_dark_picture_of_sixteen_bits_stays_dark(tmp_path):
    Image.fromarray(np.full((8, 8), 200, np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(read_picture(tmp_path / "a.png")).max() == 1


def test_floating_point_greys(tmp_path):
    levels = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(levels).save(tmp_path / "a.tif")
    np.testing.assert_allclose(np.asarray(read_picture(tmp_path / "a.tif"))[..., 0], levels * 255, atol=1)
    Image.fromarray(np.full_like(levels, np.inf)).save(tmp_path / "b.tif")
    with pytest.raises(DatasetError, match=r"b\.tif cannot be read"):
        read_picture(tmp_path / "b.tif")


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "tiff", "avif", "gif"])
def test_formats(tmp_path, ending):
    path = tiny.picture(tmp_path / f"a.{ending}", 64, 48)
    assert picture_files(tmp_path) == [path]
    assert read_picture(path).size == (64, 48)


def test_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_picture(tmp_path / "a.gif").convert("RGB").getpixel((4, 4)) == (255, 0, 0)


def test_what_a_file_holds_decides_and_few_decoders_are_let_near(tmp_path):
    """Encapsulated PostScript under a picture's name would be handed to Ghostscript."""
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EndProlog\nshowpage\n%%EOF\n"
    )
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.format == "EPS"
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png", format="PPM")
    for name in ("a.png", "b.png"):
        with pytest.raises(DatasetError, match=f"{name} cannot be read .it is none of PNG, JPEG") as caught:
            read_picture(tmp_path / name)
        assert str(tmp_path) not in str(caught.value)
    tiny.picture(tmp_path / "c.png", format="JPEG")  # a wrong ending alone is no fault
    assert read_picture(tmp_path / "c.png").size == (96, 64)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pixels_are_counted_before_they_are_decoded(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    _empty_png(path, 13_000, 13_000)
    assert path.stat().st_size < 300_000

    def never(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", never)
    with pytest.raises(DatasetError, match=r"bomb\.png has 13000x13000 pixels, 128 million"):
        read_picture(path)
    _empty_png(path, 100_000, 100_000)  # beyond Pillow's own limit, too
    with pytest.raises(DatasetError, match=r"bomb\.png"):
        read_picture(path)


def test_errors_name_the_file_and_not_its_folder(tmp_path):
    folder = tmp_path / "a secret place"
    whole = tiny.picture(folder / "a.png", 200, 200).read_bytes()
    for content in (b"", b"no picture", whole[: len(whole) // 2]):
        (folder / "a.png").write_bytes(content)
        with pytest.raises(DatasetError, match=r"a\.png cannot be read") as caught:
            read_picture(folder / "a.png")
        assert "secret" not in str(caught.value)


def test_a_link_that_leads_nowhere_is_told(tmp_path):
    tiny.picture(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    assert [path.name for path in picture_files(tmp_path)] == ["a.png", "b.png"]
    assert folder_version(tmp_path)
    with pytest.raises(DatasetError, match=r"b\.png is a link that leads nowhere"):
        read_picture(tmp_path / "b.png")


def test_hidden_files_are_no_pictures(tmp_path):
    for name in ("._a.jpg", ".hidden.png", "notes.txt", "a.psd"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DatasetError, match="no pictures"):
        picture_files(tmp_path)
    path = tiny.picture(tmp_path / "A.JPG")
    assert picture_files(tmp_path) == [path]


def test_captions(tmp_path):
    path = tiny.picture(tmp_path / "a.png")
    assert caption_of(path, DEFAULT_PROMPT, "<c>") == "a photo of a <c> dog"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf  a [trigger] cat\r\n")
    assert caption_of(path, DEFAULT_PROMPT, " <c> ") == "a <c> cat"
    assert caption_of(path, DEFAULT_PROMPT, "<s>", source="prompt") == "a photo of a <s> dog"
    with pytest.raises(DatasetError, match="trigger is not set") as caught:
        caption_of(path, DEFAULT_PROMPT, "  ")
    assert caught.value.reason == "settings"
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DatasetError, match=r"a\.png has no caption: write a\.txt"):
        caption_of(path, DEFAULT_PROMPT, "<c>")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match=r"a\.txt cannot be read as UTF-8"):
        caption_of(path, DEFAULT_PROMPT, "<c>")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DatasetError, match=r"write a\.txt beside it, or set captions to auto"):
        caption_of(path, DEFAULT_PROMPT, "<c>", source="files")


def test_a_trigger_that_no_caption_holds_is_told():
    (warning,) = caption_warnings(["a photo of a <c> dog"], "<s>")
    assert "'<s>'" in warning and "[trigger]" in warning
    assert not caption_warnings(["a photo of a <c> dog", "a cat"], "<c>")
    assert not caption_warnings(["a photo"], "")
    assert with_trigger("no placeholder", "") == "no placeholder"


def test_a_mask_that_hides_everything():
    with pytest.raises(DatasetError, match=r"a\.png is transparent everywhere"):
        require_visible("a.png", np.zeros((4, 4)))
    require_visible("a.png", np.eye(4))
    require_visible("a.png", None)


def test_the_version_of_a_folder_follows_pictures_and_captions(tmp_path):
    tiny.picture(tmp_path / "a.png")
    seen = [folder_version(tmp_path)]
    for change in (
        lambda: (tmp_path / "a.txt").write_text("a dog"),
        lambda: (tmp_path / "a.txt").write_text("a cat!"),
        lambda: tiny.picture(tmp_path / "b.gif"),
        lambda: (tmp_path / "b.gif").rename(tmp_path / "c.gif"),
    ):
        change()
        seen.append(folder_version(tmp_path))
    assert len(set(seen)) == len(seen)
    (tmp_path / "._a.png").write_bytes(b"x")
    assert folder_version(tmp_path) == seen[-1]


def test_without_avif_the_message_says_what_to_install(tmp_path, monkeypatch):
    path = tiny.picture(tmp_path / "a.avif")
    monkeypatch.setattr(pictures.features, "check", lambda name: False)
    with pytest.raises(DatasetError, match=r"Pillow 11\.3"):
        read_picture(path)


def _empty_png(path, width, height):
    """A grey PNG of any size that packs to next to nothing."""

    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    packer, rows = zlib.compressobj(9), io.BytesIO()
    for _ in range(min(height, 13_000)):
        rows.write(packer.compress(bytes(1 + width)))
    rows.write(packer.flush())
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows.getvalue()) + chunk(b"IEND", b"")
    )
