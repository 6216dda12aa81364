"""Every language says all that English says: nodes, settings, the page's words, reports, help pages."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("zh", "ja")
FILES = ("main", "nodeDefs", "settings")
TABLES = ("qrlora_words", "qrlora_reports")
# Code with English words in it, where a language has its own
SPOKEN = re.compile(r"<name>|name=value|\* style \+")
ENGLISH_PAGES = sorted((ROOT / "web" / "docs").glob("*.md"))


def read(path):
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def leaves(tree, path=()):
    """(path, text) of every text in nested dictionaries."""
    if isinstance(tree, dict):
        for key, one in tree.items():
            yield from leaves(one, (*path, key))
    else:
        yield path, tree


def own_script(text):
    """Whether a text has a letter that English has not."""
    return bool(re.search(r"[\u3040-\u30ff\u4e00-\u9fff]", text))


def test_there_is_a_folder_for_each_language():
    assert {path.name for path in (ROOT / "locales").iterdir()} == {"en", *LANGUAGES}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_is_missing_and_nothing_too_much(language, name):
    english, theirs = (dict(leaves(read(f"locales/{one}/{name}.json"))) for one in ("en", language))
    assert english.keys() - theirs.keys() == set() and theirs.keys() - english.keys() == set()
    assert all(theirs.values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_translated_and_names_of_inputs_are_not(language):
    english = dict(leaves(read("locales/en/nodeDefs.json")))
    for path, text in leaves(read(f"locales/{language}/nodeDefs.json")):
        if path[-1] in ("tooltip", "description"):
            assert own_script(text), f"{language} {path}: {text!r}"
        elif path[-1] == "name":
            assert text == english[path], f"{language} {path}: graphs and messages call it {english[path]}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_settings_are_those_of_the_page(language):
    script = (ROOT / "web" / "qrlora_settings.js").read_text(encoding="utf-8").replace("\\u0394", "\u0394")
    english, theirs = read("locales/en/settings.json"), read(f"locales/{language}/settings.json")
    ids = dict(re.findall(r'const (\w+) = "(QRLoRA\.\w+)"', script))
    named = re.findall(r'id: (\w+),.*?name: "([^"]+)",\s*tooltip:\s*"([^"]+)"', script, re.DOTALL)
    assert len(named) == len(ids) == len(english) == 3
    for constant, name, tooltip in named:
        key = ids[constant].replace(".", "_")
        assert (english[key]["name"], english[key]["tooltip"]) == (name, tooltip)
        assert own_script(theirs[key]["name"]) and own_script(theirs[key]["tooltip"])


@pytest.mark.parametrize("table", TABLES)
def test_the_page_has_every_sentence_in_every_language(table):
    """With the same values in it."""
    words = read(f"web/{table}.json")
    assert set(words) == set(LANGUAGES)
    keys = {sentence for language in LANGUAGES for sentence in words[language]}
    for language in LANGUAGES:
        assert keys - words[language].keys() == set(), language
        for english, sentence in words[language].items():
            assert sorted(re.findall(r"\{\w+\}", english)) == sorted(re.findall(r"\{\w+\}", sentence)), sentence


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("english", ENGLISH_PAGES, ids=lambda path: path.stem)
def test_a_help_page_says_all_that_the_english_one_says(english, language):
    """Every input, value, message and address of the English page stands in the other one, and every row of a table."""
    page = english.with_suffix("") / f"{language}.md"
    theirs, ours = page.read_text(encoding="utf-8"), english.read_text(encoding="utf-8")
    assert theirs.startswith("# ") and own_script(theirs)
    codes = set(re.findall(r"`([^`\n]+)`", ours)) - set(re.findall(r"`([^`\n]+)`", theirs))
    assert {code for code in codes if not SPOKEN.search(code)} == set()
    for pattern in (r'\*"([^"]+)"\*', r"\]\((https?://[^)]+)\)"):
        assert set(re.findall(pattern, ours)) <= set(re.findall(pattern, theirs)), pattern
    for mark in (r"^\|", r"^    \S", r"^- "):
        count = [len(re.findall(mark, text, re.MULTILINE)) for text in (ours, theirs)]
        assert count[0] == count[1], f"{mark}: {count}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_help_page_has_the_title_of_its_node(language):
    nodes = read(f"locales/{language}/nodeDefs.json")
    for page in (ROOT / "web" / "docs").glob(f"*/{language}.md"):
        title = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        assert title == nodes[page.parent.name]["display_name"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_its_readme_has_every_template_and_node(language):
    text = (ROOT / f"README.{language}.md").read_text(encoding="utf-8")
    english = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "example_workflows").glob("*.json"):
        assert f"| {path.stem} |" in text and f"| {path.stem} |" in english
    names = {one: read(f"locales/{one}/nodeDefs.json") for one in ("en", language)}
    for node, one in names["en"].items():
        if "Toy" not in node:
            assert f"| {one['display_name']} |" in english and f"| {names[language][node]['display_name']} |" in text
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / link.replace("%20", " ")).exists(), link
