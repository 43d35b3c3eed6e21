"""The committed notebooks: run in order, clean, small, and the same as their text forms. CI runs them again."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.notebook

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
MAX_BYTES = 600_000


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


def cells_of(path: Path) -> list:
    import jupytext  # of the notebook extra

    return jupytext.read(path).cells


def test_text_form_has_the_same_cells(path):
    forms = (path, path.with_suffix(".md"))
    notebook, text = ([(cell.cell_type, cell.source) for cell in cells_of(form)] for form in forms)
    assert notebook == text, f"run jupytext --sync {path.name}"


def test_outputs_are_of_one_clean_run(path):
    code = [cell for cell in cells_of(path) if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.get("name", output.output_type) for cell in code for output in cell.outputs}
    assert kinds <= {"stdout", "display_data"}


def test_file_is_small(path):
    assert path.stat().st_size < MAX_BYTES
