"""Subjects are found by reading files, and a kernel hash follows the code and nothing else."""

import ast
import shutil
from pathlib import Path

import pytest

from attn_ladder import stage

ROOT = Path(__file__).resolve().parents[1]
SUBJECT = '''"""A title."""

from attn_ladder.helper import double
from attn_ladder.stage import Stage

STAGE = Stage(title="One", removes="sync")


def forward(q):
    """Docstring."""
    return double(q)  # comment
'''
HELPER = "def double(x):\n    return 2 * x\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of one stage, one peer and one variant in place of the real one."""
    folder = tmp_path / "attn_ladder"
    for name in ("peers", "variants"):
        (folder / name).mkdir(parents=True)
    shutil.copy(stage.__file__, folder / "stage.py")
    (folder / "helper.py").write_text(HELPER)
    (folder / "other.py").write_text("x = 1\n")
    (folder / "stage1_one.py").write_text(SUBJECT)
    (folder / "peers" / "rival.py").write_text(
        'from attn_ladder.stage import Peer\nPEER = Peer(title="Rival", distribution="rival")\n'
    )
    (folder / "variants" / "less.py").write_text(
        "from attn_ladder.stage import Variant\n"
        'VARIANT = Variant(title="Less", of="stage1", changes="less")\n'
    )
    monkeypatch.setattr(stage, "PACKAGE", folder)
    forget()
    yield folder
    forget()


def forget():
    stage.subjects.cache_clear()
    stage.source_hash.cache_clear()


def hash_after(path: Path, text: str, subject: str = "stage1") -> str:
    path.write_text(text)
    forget()
    return stage.kernel_hash(subject)


def test_the_real_subjects():
    found = stage.subjects()
    assert found["stage1"].kind == "stage"
    assert {"fa3", "cudnn", "fa2"} <= {s.name for s in found.values() if s.kind == "peer"}
    kinds = [s.kind for s in found.values()]
    assert kinds == sorted(kinds, key=["stage", "peer", "variant", "control"].index)
    assert all(len(stage.kernel_hash(name)) == 16 for name in found)


def test_literals_are_read_without_importing(package):
    found = stage.subjects()
    assert list(found) == ["stage1", "rival", "less"]
    assert (found["stage1"].title, found["stage1"].removes) == ("One", "sync")
    assert found["rival"].distribution == "rival"
    assert found["less"].of == "stage1"


def test_an_unknown_subject_lists_the_known_ones(package):
    with pytest.raises(ValueError, match="'stage9' is unknown; known subjects: stage1, rival"):
        stage.subject("stage9")


def test_a_file_without_a_literal_is_refused(package):
    (package / "peers" / "empty.py").write_text("x = 1\n")
    forget()
    with pytest.raises(ValueError, match="no literal STAGE, PEER"):
        stage.subjects()


def test_a_name_used_twice_is_refused(package):
    shutil.copy(package / "peers" / "rival.py", package / "variants" / "rival.py")
    forget()
    with pytest.raises(ValueError, match="'rival' is used twice"):
        stage.subjects()


def test_comments_docstrings_and_layout_do_not_count(package):
    before = stage.kernel_hash("stage1")
    text = (
        SUBJECT.replace("A title", "Another").replace("Docstring", "More").replace("# comment", "")
    )
    assert (
        hash_after(package / "stage1_one.py", text.replace("    return", "\n    return")) == before
    )


def test_code_counts(package):
    before = stage.kernel_hash("stage1")
    text = SUBJECT.replace("double(q)", "double(q) + 1")
    assert hash_after(package / "stage1_one.py", text) != before


def test_what_a_subject_imports_counts_and_the_rest_does_not(package):
    before = stage.kernel_hash("stage1")
    assert hash_after(package / "other.py", "x = 2\n") == before
    assert hash_after(package / "helper.py", HELPER.replace("2", "3")) != before


def test_another_subject_does_not_count(package):
    before = stage.kernel_hash("rival")
    text = SUBJECT.replace("double(q)", "double(q) + 1")
    assert hash_after(package / "stage1_one.py", text, "rival") == before


def test_the_hash_does_not_know_the_version_of_python():
    """Fields that later versions add to the syntax tree are empty and do not count."""
    tree = ast.parse("def f(x):\n    return x\n")
    before = stage._text(tree)
    tree.body[0]._fields = (*tree.body[0]._fields, "type_params")
    tree.body[0].type_params = []
    assert stage._text(tree) == before
    tree.body[0].type_params = [ast.Name("T")]
    assert stage._text(tree) != before
