"""common/git.py: of this checkout, wherever the process runs; empty answers without git."""

import subprocess

import pytest

from common import git
from common.git import run_git, short_commit
from tests.support.launch import ROOT


@pytest.fixture(autouse=True)
def _fresh():
    short_commit.cache_clear()
    yield
    short_commit.cache_clear()


def test_the_commit_is_that_of_the_checkout_or_empty(monkeypatch, tmp_path):
    """For information: no data set is refused because of it."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                          text=True, check=False)
    monkeypatch.chdir(tmp_path)
    assert short_commit() == done.stdout.strip()
    monkeypatch.setenv("PATH", "")  # no git
    assert short_commit() == done.stdout.strip()  # what runs does not change
    short_commit.cache_clear()
    assert short_commit() == "" and run_git("diff") == b""


def test_a_checkout_without_a_commit_has_none(monkeypatch, tmp_path):
    """git prints the name that it could not resolve."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(git, "CHECKOUT", tmp_path)
    assert run_git("rev-parse", "HEAD") == b""


def test_a_folder_that_is_not_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(git, "CHECKOUT", tmp_path)
    assert short_commit() == "" and run_git("rev-parse", "HEAD") == b""
