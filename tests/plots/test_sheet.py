"""Contact sheets: where pictures and words are, whatever the size."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageDraw

from qrlora_plots import contact_sheet, label_axes, text, text_card

COLOURS = [(200, 0, 0), (0, 160, 0), (0, 0, 220), (160, 160, 0), (0, 160, 160), (160, 0, 160), (90, 90, 90)]


def pictures(count, size=(40, 30)):
    return [Image.new("RGB", size, COLOURS[index % len(COLOURS)]) for index in range(count)]


def grid(rows, columns):
    return [f"alpha={row / 10:g}, beta={column / 4:g}" for row in range(rows) for column in range(columns)]


def inked(image):
    return image.crop(ImageChops.invert(image).getbbox())


def written(words, size):
    paper = Image.new("RGB", (2 * size * len(words), 4 * size), text.PAPER)
    ImageDraw.Draw(paper).text((size, size), words, fill=text.INK, font=text.font_for(words, size))
    return inked(paper)


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([(8, 8), (64, 64), (300, 100), (900, 1200)]))
def test_every_picture_is_where_its_numbers_are(rows, columns, size):
    sheet = contact_sheet(pictures(rows * columns, size), grid(rows, columns), max_size=256)
    assert len(sheet.row_labels) == rows and len(sheet.column_labels) == columns
    for index, cell in enumerate(sheet.cells):
        assert (cell.row, cell.column) == divmod(index, columns)
        colour = COLOURS[index % len(COLOURS)]
        left, top, right, bottom = cell.box
        assert max(right - left, bottom - top) <= 256 and right <= sheet.image.width and bottom <= sheet.image.height
        assert abs((right - left) / (bottom - top) - size[0] / size[1]) < 0.05 * size[0] / size[1]
        for point in ((left, top), (right - 1, bottom - 1), ((left + right) // 2, (top + bottom) // 2)):
            assert sheet.image.getpixel(point) == colour
    boxes = [cell.box for cell in sheet.cells]
    for index, one in enumerate(boxes):
        assert all(one[2] <= o[0] or o[2] <= one[0] or one[3] <= o[1] or o[3] <= one[1] for o in boxes[index + 1 :])


@pytest.mark.parametrize("size", [(16, 16), (512, 512), (1024, 768)])
def test_axis_labels_are_readable_at_any_size(size):
    labels = [f"alpha={a}, beta={b}" for a in (-0.25, 1) for b in (0, 0.5, 1)]
    sheet = contact_sheet(pictures(6, size), labels, max_size=1024, title="alpha: ink; beta: fox")
    letters = max(text.SMALLEST, round(3 * (sheet.cells[0].box[2] - sheet.cells[0].box[0]) / 42))
    assert letters >= sheet.image.width / 70  # reduced to 1000 pixels, letters are still 14 high
    first = sheet.cells[0].box
    line, gap = text.text_size("Ag", letters)[1], max(6, letters // 2)
    title = sheet.image.crop((0, 0, sheet.image.width, gap + line + gap // 2))
    assert inked(title).tobytes() == written("alpha: ink; beta: fox", letters).tobytes()
    for cell in sheet.cells[:3]:
        header = inked(sheet.image.crop((cell.box[0], gap + line + gap // 2, cell.box[2], first[1] - 1)))
        assert header.tobytes() == written(f"beta = {(0, 0.5, 1)[cell.column]:g}", letters).tobytes()
    for cell in sheet.cells[::3]:
        header = inked(sheet.image.crop((0, cell.box[1], first[0] - 1, cell.box[3])))
        assert header.tobytes() == written(("alpha = -0.25", "alpha = 1")[cell.row], letters).tobytes()


def test_a_third_axis_joins_the_rows_and_what_is_the_same_everywhere_is_left_out():
    names = ("late", "0: 1; 0.5: 0")
    cells = [f"alpha={a}, beta={b}, schedule={name}" for a in (0, 1) for b in (0.5, 1) for name in names]
    places, rows, columns = label_axes(cells)
    assert rows == ("alpha = 0, beta = 0.5", "alpha = 0, beta = 1", "alpha = 1, beta = 0.5", "alpha = 1, beta = 1")
    assert columns == ("schedule = late", "schedule = 0: 1; 0.5: 0")
    assert places == tuple((row, column) for row in range(4) for column in range(2))
    _, rows, columns = label_axes([f"alpha={a}, beta=1, schedule={name}" for a in (0, 1) for name in names])
    assert rows == ("alpha = 0", "alpha = 1") and columns[0] == "schedule = late"
    _, rows, columns = label_axes([f"alpha=1, beta=1, schedule={name}" for name in names])
    assert rows == ("beta = 1",) and len(columns) == 2
    assert label_axes(cells[:-1]) is None
    assert label_axes(["alpha=1, beta=1, schedule=late, act=always"]) is None


@pytest.mark.parametrize(
    "labels",
    [
        ["a", "b", "c"],
        ["alpha=1, beta=1", "alpha=1, beta=2", "alpha=2, beta=1"],  # a corner is missing
        ["alpha=1, beta=1", "alpha=1, gamma=2"],
        ["alpha=1, beta=1", "alpha=1, beta=1"],
        ["alpha=1", "alpha=2"],
    ],
)
def test_labels_that_are_no_grid_are_written_below(labels):
    assert label_axes(labels) is None
    sheet = contact_sheet(pictures(len(labels), (200, 200)), labels, columns=2)
    assert not sheet.row_labels and [cell.label for cell in sheet.cells] == labels
    letters = max(text.SMALLEST, round(2 * 200 / 42))
    for cell in sheet.cells:
        left, _, right, bottom = cell.box
        below = sheet.image.crop((left, bottom + 1, right, bottom + text.text_size("A", letters)[1]))
        assert inked(below).tobytes() == written(cell.label, letters).tobytes()


def test_columns():
    labels = list("abcdefg")
    assert max(cell.column for cell in contact_sheet(pictures(7), labels).cells) == 2
    assert max(cell.column for cell in contact_sheet(pictures(7), labels, columns=5).cells) == 4
    assert max(cell.row for cell in contact_sheet(pictures(7), labels, columns=50).cells) == 0


def test_pictures_of_different_sizes_keep_their_shape():
    sizes = [(512, 256), (100, 400), (30, 30)]
    mixed = [Image.new("RGB", size, COLOURS[index]) for index, size in enumerate(sizes)]
    for (width, height), cell in zip(sizes, contact_sheet(mixed, list("abc"), max_size=512).cells):
        shown = cell.box[2] - cell.box[0], cell.box[3] - cell.box[1]
        assert shown[0] * height == shown[1] * width


def test_long_labels_are_shortened_in_the_middle():
    name = "a_very_long_name_of_an_adapter_that_somebody_trained.safetensors"
    shown, size = text.fitted(name, 20, 200)
    assert size == text.SMALLEST and text.text_size(shown, size)[0] <= 200
    assert shown.startswith("a_very") and shown.endswith("tensors") and "..." in shown


def test_as_many_labels_as_pictures():
    with pytest.raises(ValueError, match="3 pictures and 2 labels"):
        contact_sheet(pictures(3), ["a", "b"])
    with pytest.raises(ValueError, match="0 pictures"):
        contact_sheet([], [])


def test_text_card_holds_every_line():
    lines = ["first line", "", "third line"]
    card = text_card(lines, size=20)
    for index in (0, 2):
        strip = card.crop((0, 27 * (index + 1), card.width, 27 * (index + 2)))
        assert inked(strip).tobytes() == written(lines[index], 20).tobytes()


@pytest.mark.parametrize(
    "words",
    [
        "letters " * 5_000,
        "line\nbreak\ttab\r\n",
        "\x00\x1b[31m\u2028\ud800",
        "".join(map(chr, range(0x4E00, 0x9000))),
        "alpha=" + " " * 20_000 + "x",
        "=" * 5_000 + "," * 5_000,
        "",
    ],
    ids=["long", "lines", "control", "characters", "spaces", "signs", "empty"],
)
def test_any_words_are_drawn_in_little_time(words):
    start = time.process_time()
    sheet = contact_sheet(pictures(4), [f"{words}{index}" for index in range(4)], title=words)
    rows = contact_sheet(pictures(2), [f"alpha={words.replace('=', '')}{index}, beta=1" for index in range(2)])
    assert time.process_time() - start < 5
    assert max(sheet.image.width, sheet.image.height, rows.image.width, rows.image.height) < 2000


@settings(max_examples=40)
@given(st.text(max_size=300), st.integers(13, 40), st.integers(1, 600))
def test_any_text_fits_or_is_as_short_as_it_gets(words, size, width):
    shown, fits = text.fitted(words, size, width)
    assert text.SMALLEST <= fits <= size
    assert text.text_size(shown, fits)[0] <= width or len(shown) <= 4


@given(st.text(st.sampled_from("=, ab1\n"), max_size=12))
def test_pairs_are_read_as_by_the_words_of_the_docstring(label):
    parts = label.split(",")
    is_pair = len(parts) in (2, 3) and all(
        part.count("=") == 1 and all(word.strip() for word in part.split("=")) for part in parts
    )
    assert (label_axes([label]) is not None) == is_pair


def test_other_letters_without_a_font_that_has_them(monkeypatch):
    """Pillow before 10.1 has one bitmap font of 256 letters, and raised."""
    monkeypatch.setattr(text, "_font", lambda name, size: None)
    if hasattr(text.ImageFont, "load_default_imagefont"):
        monkeypatch.setattr(text.ImageFont, "load_default", text.ImageFont.load_default_imagefont)
    sheet = contact_sheet(pictures(1), ["\u732b caf\u00e9"], title="\u0141")
    assert sheet.cells[0].label == "\u732b caf\u00e9" and text.one_line("\u732b caf\u00e9") == "? caf\u00e9"
