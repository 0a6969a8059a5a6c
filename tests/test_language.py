"""What of plain English a test can check: in pages, comments, docstrings and messages."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from tests.test_layout import PRODUCT, ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [*sorted((ROOT / "launch").iterdir()), *sorted((ROOT / "configs").glob("*.yaml")),
           ROOT / "Makefile"]
# Wrong word -> the field's own, or the plain one.
WORDS = {
    r"for ever\b": "without end, or nothing",
    r"\banew\b": "again",
    r"\bbeside\b(?! the point)": "next to, besides, on top of",
    r"(?<![Tt]here )\bis no (?!longer|more|less)(?=\w+ ?\w*[,.;:)])": "is not a",
    r"\bheld-out\b": "validation",
    r"\b[RO][1-3]\b|\bI[0-2]\b": "words, not codes",
}
RENAMED = "model/variants.py"  # which knows the codes, to refuse them
# Held out is what an importer's split and the backbones' own measurements call it.
HELD_OUT = ("data/manifest/", "playground/")


def words_of(source: str) -> str:
    """Comments and strings of a Python file, a line each."""
    found = [token.string for token in tokenize.generate_tokens(io.StringIO(source).readline)
             if token.type == tokenize.COMMENT]
    found += [node.value for node in ast.walk(ast.parse(source))
              if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n".join(found)


def wrong_words(text: str, name: str) -> list[str]:
    return [f"{found[0]!r}: better {better}" for word, better in WORDS.items()
            if not (word == r"\bheld-out\b" and name.startswith(HELD_OUT))
            and not (better == "words, not codes" and name == RENAMED)
            for found in re.finditer(word, text)]


@pytest.mark.parametrize("name", PRODUCT)
def test_words_of_the_code(name):
    assert not wrong_words(words_of((ROOT / name).read_text(encoding="utf-8")), name)


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=lambda path: path.name)
def test_words_of_pages_and_scripts(path):
    text = path.read_text(encoding="utf-8").split("## Moved names")[0]
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    text = re.sub(r"^\| \| .*$|F[0-9]", "", text, flags=re.MULTILINE)  # numbered defects
    assert not wrong_words(text, path.name)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_titles_start_with_a_noun_or_a_verb(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    assert titles
    assert not [one for one in titles
                if re.match(r"(What|Where|Which|Who|How|When|Why)\b", one)], path


@pytest.mark.parametrize("text", [
    "kept for ever", "drawn anew", "beside it", "this is no folder.", "held-out loss", "init I1"])
def test_wrong_words_are_recognised(text):
    assert wrong_words(text, "train.py") and not wrong_words("There is no folder.", "train.py")


def test_words_of_a_file_are_its_comments_and_strings():
    assert words_of("x = 'beside'  # anew\nanew = 1\n") == "# anew\nbeside"


def test_no_page_is_named_that_is_not_there():
    """Of pages in the repository, by a name that ends with .md."""
    names = {path.name for path in ROOT.rglob("*.md") if ".venv" not in path.parts}
    for name in PRODUCT:
        for found in re.findall(r"\b([\w-]+\.md)\b", (ROOT / name).read_text(encoding="utf-8")):
            assert found in names or found in ("data_card.md", "index.md"), f"{name} names {found}"
    assert Path(ROOT / "docs").is_dir()
