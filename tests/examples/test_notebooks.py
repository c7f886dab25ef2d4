"""The notebooks in examples/ run, with small settings, and are stored with small outputs of a complete run."""

import base64
import io

from PIL import Image
import pytest

from tests.support.commands import ROOT, environment

nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")
nbformat = pytest.importorskip("nbformat")

MAX_BYTES = 150_000
SMALL = {  # replaces the cell of parameters: the least that shows all parts
  "01_first_steps": dict(COUNTS=[1, 16], EMOJI=[38, 14]),
  "02_train_on_your_pictures": dict(PICTURES="", CONFIG="debug", STEPS=4, CHANGES={}, WORKDIR="runs/notebook"),
  "03_generate": dict(PROMPT="strawberry, flat", SAMPLES=2, SETTINGS=[(2.0, 0.5)]),
  "04_search": dict(PROMPT="a red ring on a plain white background", CANDIDATES=2, WIDTH=2),
}
notebooks = pytest.mark.parametrize("name", SMALL)


def read(name):
  return nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)


def pictures(notebook):
  """Returns the pictures among the outputs of each cell."""
  outputs = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
  found = [data["image/png"] for data in outputs if "image/png" in data]
  return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_all_are_tested():
  assert sorted(path.stem for path in (ROOT / "examples").glob("*.ipynb")) == sorted(SMALL)


@notebooks
def test_runs(name, tmp_path):
  notebook = read(name)
  (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
  values = {}
  exec(parameters.source, values)
  assert set(SMALL[name]) == set(values) - {"__builtins__"}
  parameters.source = "\n".join(f"{key} = {value!r}" for key, value in SMALL[name].items())
  environ = environment(PYTHONPATH=str(ROOT), PYTHONWARNINGS="ignore")
  client = nbclient.NotebookClient(
    notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
  )
  client.execute(env=environ)
  found = pictures(notebook)
  assert found and all(min(picture.size) >= 96 for picture in found)
  texts = " ".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
  assert len(found) >= texts.count("show_grid(")


@notebooks
def test_is_stored_with_small_outputs_of_one_run(name):
  path = ROOT / "examples" / f"{name}.ipynb"
  assert path.stat().st_size <= MAX_BYTES
  notebook = read(name)
  nbformat.validate(notebook)
  cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  kinds = {output.output_type for cell in cells for output in cell.outputs}
  assert kinds <= {"display_data", "execute_result", "stream"}
  assert all(output.get("name") != "stderr" for cell in cells for output in cell.outputs)
  assert len(pictures(notebook)) >= 2
